"""Fine-tuning with adapters: the same gradient however a step is cut, every ZeRO stage, and the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.adapter import Lora, QLora
from model.visual_chat import VisualChatModel
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.tiny_chat import tiny_chat, train_pieces
from tests.train.tiny_stage_two import step_gradient, two_steps
from train.distributed import Ranks
from train.engine import close_process_group
from train.evaluator.before_after import before_and_after
from train.loss.stage_two import StageTwoLoss
from train.optim import parameter_groups
from train.stage import Stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def adapted(pieces: str, *, quantised: bool = False) -> VisualChatModel:
    """An adapter that says something from the start: with B at 0 its A has no gradient."""
    model = tiny_chat(Path(pieces), llm={"hidden_size": 64, "inner_size": 128, "initial_std": 0.15})
    (QLora if quantised else Lora)(rank=2).attach(model, device=CPU)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


# --------------------------------------------------------------------- ranks with and without pictures, every stage


JOBS = [(0, False), (1, False), (2, False), (3, False), (0, True), (2, True)]  # ZeRO stage, whether in 4 bits


def trained(ranks: Ranks, pieces: str, jobs: list[tuple[int, bool]]) -> dict[tuple[int, bool], dict[str, Any]]:
    """Two steps, of which the first gives one rank nothing but text."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for zero_stage, quantised in jobs:
        stage = Stage(adapted(pieces, quantised=quantised), StageTwoLoss(), ranks)
        groups = parameter_groups(
            list(stage.named_parameters()), lr=1e-3, weight_decay=0.0, part_lr={"model.llm": 1e-2}
        )
        frozen = {n: p.detach().clone() for n, p in stage.named_parameters() if not p.requires_grad}
        engine, losses = two_steps(stage, groups, ranks, zero_stage)
        weights = {name: tensor.clone() for name, tensor in engine.full_weights()}
        with engine.evaluating():
            now = {n: p.detach() for n, p in stage.named_parameters() if n in frozen}
            changed = [name for name, before in frozen.items() if not torch.equal(now[name], before)]
        found[zero_stage, quantised] = {"losses": losses, "weights": weights, "changed": changed}
    return found


def everything(pieces: str, accumulates: list[int], jobs: list[tuple[int, bool]]) -> dict[str, Any]:
    """All that one process is started for: starting takes longer than the work."""
    ranks = Ranks.connect(CPU)
    found = {
        "gradients": {n: step_gradient(Stage(adapted(pieces), StageTwoLoss(), ranks), ranks, n) for n in accumulates},
        "trained": trained(ranks, pieces, jobs),
    }
    close_process_group()
    return found


@pytest.fixture(scope="module")
def ran(pieces: Path) -> dict[str, Any]:
    alone = run_ranks(1, everything, str(pieces), [1, 4], [(0, False), (0, True)], timeout=120)[0]
    return {"alone": alone, "two": run_ranks(2, everything, str(pieces), [1], JOBS, timeout=180)}


def test_eight_at_once_are_two_four_times_and_four_on_each_of_two_ranks(ran: dict[str, Any]) -> None:
    expected = ran["alone"]["gradients"][1]
    assert sum("lora_" in name for name in expected) == 24 and "model.projection.weight" in expected
    for found in [ran["alone"]["gradients"][4], *(rank["gradients"][1] for rank in ran["two"])]:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.any(), name
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_every_zero_stage_trains_alike_and_nobody_hangs(ran: dict[str, Any]) -> None:
    for rank in ran["two"]:
        for zero_stage, quantised in JOBS:
            expected, told = ran["alone"]["trained"][0, quantised], rank["trained"][zero_stage, quantised]
            assert told["changed"] == [], "frozen weights stay byte for byte"
            torch.testing.assert_close(told["losses"], expected["losses"], atol=1e-4, rtol=1e-4)
            for name, value in expected["weights"].items():
                torch.testing.assert_close(told["weights"][name], value, atol=5e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- the command

STEPS, SAVED = 4, 2
SMALL = [
    "experiment=smoke_stage_two",
    "model/adapter=lora",
    "model.adapter.rank=2",
    "model.vision.num_layers=1",
    "model.llm.steps=20",
    "data.source.scenes.num_scenes=100",
    "train.global_batch_size=8",
    "train.accumulate=2",
    f"train.steps={STEPS}",
    f"train.save_every={SAVED}",
    f"train.eval_every={STEPS}",
    "train.evaluator.answers.source.num_scenes=3",
    "train.evaluator.answers.max_new_tokens=6",
    "train.evaluator.probe.source.num_scenes=3",
    "train.evaluator.probe.max_new_tokens=6",
]
TIMINGS = {"samples_per_second", "data_wait", "tflops", "peak_share"}


def finetune(run_dir: Path, *overrides: str, ranks: int = 0, expect: int = 0) -> str:
    what = ["finetune.py", *SMALL, f"run.dir={run_dir}", *overrides]
    command = ["bash", "scripts/launch.sh", str(ranks), *what] if ranks else [sys.executable, *what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "QUEQIAO_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150
    )
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, finetune(run)


def test_the_command_tells_what_trains_and_what_came_of_it(straight: tuple[Path, str]) -> None:
    run, said = straight
    table = {line.split("  ")[0]: line.split() for line in said.splitlines() if line.endswith(" fp32")}
    assert (
        table["vision"][1] == "0" and table["llm"][1] == "0" and int(table["llm, adapter"][2].replace(",", "")) > 1000
    )
    assert "model.projection" in said and "contrastive" not in said
    assert [line["step"] for line in metrics(run, "eval")] == [0, 0, STEPS, STEPS]
    assert "measured" in said and "answers/zh/normalised_match" in said and "probe/en/normalised_match" in said
    weights = load_file(run / f"checkpoints/step_{STEPS}/weights.safetensors")
    kinds = {name.split(".")[1] + (" adapter" if "lora_" in name else "") for name in weights}
    assert kinds == {"qformer", "ln_vision", "projection", "llm adapter"}, "they are one checkpoint"


def test_peft_loads_what_the_command_wrote(straight: tuple[Path, str]) -> None:
    from peft import PeftModel

    from model.llm.warm_up import load

    run, _ = straight
    model = PeftModel.from_pretrained(load(run / "llm").network, str(run / "adapter"))
    weights = load_file(run / f"checkpoints/step_{STEPS}/weights.safetensors")
    place = "transformer.layers.1.mlp.dense_4h_to_h.lora_B.default.weight"
    expected = weights[f"model.llm.network.{place}"]
    assert expected.any() and torch.equal(model.get_base_model().get_parameter(place), expected)
    beside = load_file(run / "adapter/trained.safetensors")
    assert {f"model.{name}" for name in beside} == {name for name in weights if "lora_" not in name}
    assert json.loads((run / "adapter/queqiao.json").read_text())["base_model"] == str(run / "llm")


def test_chat_rebuilds_what_was_trained(straight: tuple[Path, str]) -> None:
    """The encoder's random weights too, which are in no file."""
    from omegaconf import OmegaConf

    from model.build import build
    from model.load import load

    run, _ = straight
    model = load(run, device="cpu")
    weights = load_file(run / f"checkpoints/step_{STEPS}/weights.safetensors")
    own = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(own[name], expected) for name, expected in weights.items())
    for expected in metrics(run, "eval")[-2:]:
        node = OmegaConf.load(run / "config.yaml").train.evaluator[expected["evaluator"]]
        evaluator = build(node, codec=model.llm.codec, name=expected["evaluator"])
        found = evaluator(model, device=CPU, ranks=Ranks.alone()).metrics
        assert found == {name: expected[name] for name in found} and len(found) > 2


def test_the_same_command_resumes_to_the_same_bits(straight: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight[0], run, symlinks=True)
    (run / f"checkpoints/step_{STEPS}/complete").unlink()
    shutil.rmtree(run / "adapter")
    said = finetune(run, f"model.llm.folder={straight[0] / 'llm'}")
    assert f"resuming after step {SAVED}" in said
    assert metrics(run) == metrics(straight[0]) and metrics(run, "eval") == metrics(straight[0], "eval")
    for file in (f"checkpoints/step_{STEPS}/optimizer.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / file).read_bytes() == (straight[0] / file).read_bytes(), file
    assert (run / "adapter/trained.safetensors").is_file()


def test_two_ranks_with_four_bits(straight: tuple[Path, str], tmp_path: Path) -> None:
    """The losses are near those of the whole weights, the answers are divided among ranks and come out whole."""
    said = finetune(
        tmp_path / "run",
        "model/adapter=qlora",
        "train/engine=zero2",
        f"model.llm.folder={straight[0] / 'llm'}",
        ranks=2,
    )
    assert "nf4" in said and said.count(f"step 1/{STEPS}") == 1
    for found, expected in zip(metrics(tmp_path / "run"), metrics(straight[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.1) and found["loss"] != expected["loss"]
    assert [line["zh/num_questions"] for line in metrics(tmp_path / "run", "eval")] == [3.0] * 4


def test_before_and_after(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "eval", "step": 0, "evaluator": "probe", "zh/right": 0.5, "zh/num_questions": 4},
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "eval", "step": 1, "evaluator": "late", "zh/right": 0.5},
        {"kind": "eval", "step": 2, "evaluator": "probe", "zh/right": 0.25, "zh/num_questions": 4},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    expected = ["measured        step  before  step  after", "probe/zh/right     0     0.5     2   0.25"]
    assert [line for line in before_and_after(file).splitlines() if "---" not in line] == expected
    file.write_text(json.dumps(lines[0]))
    assert before_and_after(file) == ""
