"""evaluate.py: a run of either stage, alone and on two ranks, begun and gone on with, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from model.load_image_text import assemble_image_text
from model.tokenizer import CaptionTokenizer
from model.weights import ours
from tests.conftest import ROOT
from tests.data.shard_files import jpeg
from tests.model.llm_common import train_pieces
from tests.ranks import run_ranks
from tests.tiny_run import WITHOUT, chatglm_nodes, vqa_arguments, write_run
from tests.train.tiny_evaluation import train_tokenizer
from train.config import compose
from train.config_evaluate import evaluate_config
from train.evaluation import CONFIG, METRICS, PREDICTIONS, evaluate

SMALL = [
    "experiment=smoke", "train/evaluator=scenes", "train.evaluator.retrieval.source.num_scenes=7",
    "train.evaluator.retrieval.rerank=3", "train.evaluator.caption.examples=2", "train.evaluator.retrieval.examples=2",
    "data.loader.max_text_tokens=12", "model.vision.num_layers=1", "model.vision.frozen=true",
]  # fmt: skip


def write_checkpoint(run: Path, step: int, model: torch.nn.Module) -> None:
    torch.manual_seed(step)
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in learnt.values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    folder = run / f"checkpoints/step_{step}"
    folder.mkdir(parents=True)
    save_file({f"model.{name}": tensor.detach() for name, tensor in learnt.items()}, folder / "weights.safetensors")
    state = {"step": step, "frozen": ours.frozen_fingerprint(model, "model")}
    (folder / "state.json").write_text(json.dumps(state))


def begun(run: Path) -> torch.nn.Module:
    """A run of pretrain up to its first step: its config, a tokenizer of its own.  -> its model"""
    config = compose("pretrain", [*SMALL, f"run.dir={run}"])
    codec = CaptionTokenizer(str(train_tokenizer(run / "tokenizer")))
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    torch.manual_seed(config.run.seed)
    nodes: Any = OmegaConf.to_container(config.model, resolve=True)
    return assemble_image_text(nodes, codec)[0]


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pretrain leaves it: a tokenizer of its own, an encoder whose frozen weights were drawn, two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "one"
    model = begun(run)
    for step in (1, 2):
        write_checkpoint(run, step, model)
    (run / "checkpoints/latest").symlink_to("step_2")
    (run / "checkpoints/best").symlink_to("step_1")
    return run


@pytest.fixture
def run(stage_one: Path, tmp_path: Path) -> Path:
    """A copy, in another place than where it was trained."""
    return shutil.copytree(stage_one, tmp_path / "moved", symlinks=True)


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The command line for questions with several answers each, to a run of finetune.py around a tiny ChatGLM."""
    run = tmp_path / "two"
    write_run(run, chatglm_nodes(train_pieces(tmp_path / "ice_text.model"), tmp_path / "base"))
    return [f"run={run}", *vqa_arguments(tmp_path)]


def evaluated(*argv: str) -> tuple[dict[str, Any], bytes]:
    """What stands in metrics.json, and all of predictions.jsonl."""
    folder = evaluate(evaluate_config(list(argv)))
    return json.loads((folder / METRICS).read_text("utf-8")), (folder / PREDICTIONS).read_bytes()


def both(*several: list[str]) -> list[tuple[dict[str, Any], bytes]]:
    return [evaluated(*argv) for argv in several]


def test_two_ranks_write_what_one_writes(run: Path, asked: list[str]) -> None:
    """Retrieval and captions of stage one, answers of stage two."""
    one, two = both([f"run={run}"], asked)
    found, predictions = one
    assert found["checkpoint"] == "step_2" and found["metrics"]["retrieval/zh/num_images"] == 7
    assert found["metrics"].keys() >= {"retrieval/en/itm/mean", "caption/zh/jieba/cider", "caption/en/13a/bleu_4"}
    # 7 rows each way, for both languages, and 7 captions in each
    assert len(predictions.splitlines()) == 2 * (2 * 7 + 7)
    assert (run / "eval/step_2/retrieval_zh.png").is_file() and (run / "eval/step_2/caption_en.png").is_file()
    found, predictions = two
    assert found["metrics"]["vqa/en/open/num_questions"] == 3 and "vqa/en/vqa_accuracy" in found["metrics"]
    rows = [json.loads(line) for line in predictions.splitlines()]
    assert [row["question"] for row in rows] == ["What is in the picture? Answer in a word or two."] * 3
    for on_rank in run_ranks(2, both, [f"run={run}", "name=two"], [*asked, "name=two"]):
        for (expected, expected_lines), (found, lines) in zip((one, two), on_rank, strict=True):
            assert (found["ranks"], found["metrics"]) == (2, expected["metrics"])
            assert lines == expected_lines


def test_a_restart_keeps_what_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, predictions = evaluated(f"run={run}")
    file = run / "eval/step_2" / PREDICTIONS
    # as a kill leaves it: some captions and one direction of one language are missing, a line is cut
    kept = [line for line in predictions.splitlines() if b'"en/text_to_image"' not in line]
    file.write_bytes(b"\n".join(kept[5:])[:-10])
    monkeypatch.setattr("train.evaluator.caption.before_end", lambda ids, eos_id: list(ids)[:1])
    metrics, again = evaluated(f"run={run}")
    old, new = predictions.splitlines(), again.splitlines()
    assert len(new) == len(old)
    changed = [json.loads(line) for line in set(new) - set(old)]
    assert {(row["evaluator"], row["part"]) for row in changed} == {("caption", "en")}, (
        "what was there was not made again"
    )
    assert [row["index"] for row in sorted(changed, key=lambda row: row["index"])] == [0, 1, 2, 3, 4]
    changed_names = {name for name, value in metrics["metrics"].items() if value != expected["metrics"][name]}
    assert changed_names and all(name.startswith("caption/en/") for name in changed_names)


def test_results_of_another_evaluation_are_not_mixed_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(f"run={run}", "train.evaluator.caption=null")
    with pytest.raises(ValueError, match=r"predictions of another evaluation \(.*rerank: 3 -> 2.*name=.*resume=never"):
        evaluated(f"run={run}", "train.evaluator.caption=null", "train.evaluator.retrieval.rerank=2")
    other = ["train.evaluator.caption=null", "train.evaluator.retrieval.rerank=2"]
    metrics, _ = evaluated(f"run={run}", *other, "name=other")
    assert (run / "eval/other" / CONFIG).is_file() and not any(
        name.startswith("caption") for name in metrics["metrics"]
    )
    again, _ = evaluated(f"run={run}", *other, "resume=never", f"dir={run}/eval/step_2")
    assert again["metrics"] == metrics["metrics"]
    assert "R@1" in capsys.readouterr().out


def test_predictions_of_other_questions_or_weights_are_not_kept(asked: list[str], tmp_path: Path) -> None:
    """The same names, and something else behind them."""
    first, _ = evaluated(*asked)
    assert (first["precision"], first["device"]) == ("fp32", "cpu")
    assert evaluated(*asked)[0] == first
    questions = tmp_path / "questions.json"
    before = questions.read_text()
    questions.write_text(before.replace("What is", "Who is", 1))
    with pytest.raises(ValueError, match=r"another evaluation \(samples.vqa: \w+ -> \w+\): give this one a name"):
        evaluated(*asked)
    weights = ours.fingerprint_of_folder(tmp_path / "base")  # of a folder that is no run
    moved = shutil.copytree(tmp_path / "base", tmp_path / "moved")
    assert ours.fingerprint_of_folder(moved) == weights
    file = next(moved.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert ours.fingerprint_of_folder(moved) != weights


def test_checkpoints_by_name(run: Path) -> None:
    short = [f"run={run}", "train.evaluator.caption=null"]
    best, _ = evaluated(*short, "checkpoint=best")
    one, _ = evaluated(*short, "checkpoint=step_1", "name=again")
    two, _ = evaluated(*short, "checkpoint=step_2")
    assert best["checkpoint"] == one["checkpoint"] == "step_1" and best["metrics"] == one["metrics"]
    assert best["weights"] != two["weights"] and best["metrics"] != two["metrics"]
    beginning, _ = evaluated(*short, "checkpoint=none")
    assert beginning["checkpoint"] == "as_loaded"
    with pytest.raises(ValueError, match="has no checkpoint step_7; it has best, latest, step_1, step_2"):
        evaluated(*short, "checkpoint=step_7")


def test_other_frozen_weights_are_refused(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.run.seed = 5
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(ValueError, match="the frozen weights are not those"):
        evaluated(f"run={run}")


def test_other_evaluators_take_their_sizes_from_the_run(run: Path, tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", "zh": [f"第{n}张图", "图"], "en": f"picture {n}"} for n in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    path = f"train.evaluator.retrieval.source.path={tmp_path}/test.jsonl"
    config = evaluate_config([f"run={run}", "train/evaluator=jsonl_pairs", path])
    assert config.train.evaluator.retrieval.transform.image_size == 64
    metrics, _ = evaluated(f"run={run}", "train/evaluator=jsonl_pairs", path)
    assert (run / "eval/step_2_jsonl_pairs" / METRICS).is_file()
    assert metrics["metrics"]["retrieval/zh/num_texts"] == 6 and metrics["metrics"]["caption/en/num_images"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["run={run}", "checkpont=best"],
            "unknown key checkpont (on the command line: checkpont=best): did you mean checkpoint",
        ),
        (["run={run}", "train.evaluator.retrieval.rerankk=4"], "did you mean train.evaluator.retrieval.rerank?"),
        ([], "not set: run"),
        (["run={run}", "precision=int3"], "one of auto, fp32, bf16, fp16"),
        (["run={run}", "train/evaluator=coco_cn"], "not set: train.evaluator.retrieval.source.image_root"),
    ],
)
def test_a_mistyped_config_says_so(
    run: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate_config([argument.format(run=run) for argument in argv])
    assert message in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder; say run=outputs/NAME"):
        evaluated(f"run={tmp_path}/nothing", "device=cpu")


def test_the_command(stage_one: Path) -> None:
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        "evaluate.py",
        f"run={stage_one}",
        "name=command",
        "train.evaluator.caption=null",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ITM text to image: R@1" in done.stdout and "numbers in" in done.stdout  # without training's libraries
    assert (stage_one / "eval/command" / METRICS).is_file()


def test_what_goes_wrong_is_a_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import evaluate as entry

    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"run={run}", "checkpoint=step_9"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1 and "error: " in (said := capsys.readouterr().err) and "Traceback" not in said


def test_what_is_wrong_with_a_file_to_measure_on_is_a_sentence(run: Path, tmp_path: Path) -> None:
    """Hydra builds the source of an evaluator, and would tell where it was in forty lines."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"image": "a.png", "zh": "", "en": "a cat"}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"row 1: field 'zh': expected a caption, or a list of captions, found \"\""
    ) as e:
        evaluated(f"run={run}", "train/evaluator=jsonl_pairs", f"train.evaluator.retrieval.source.path={file}")
    assert str(e.value).startswith("jsonl_pairs: ")
