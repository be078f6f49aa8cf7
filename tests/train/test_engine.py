"""ZeRO stages and ranks divide the work and change no number; the state by parameter name fits any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.train.tiny_training import TinyModel, curves
from train.engine import resolve_precision, store_frozen

STEPS, SAVED = 6, 3
KINDS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]


def job_name(zero_stage: int, offload: bool) -> str:
    return f"zero{zero_stage}{'+offload' if offload else ''}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All curves of one process, then all of two, in as few processes as possible (each costs seconds)."""
    folder = str(tmp_path_factory.mktemp("engine"))
    alone: list[dict[str, Any]] = []
    for zero_stage, offload in KINDS:
        kind = {"zero_stage": zero_stage, "offload": offload}
        name = job_name(zero_stage, offload)
        alone += [
            {"name": name, "last": STEPS, **kind},
            {"name": f"{name} half", "last": SAVED, "save": name, **kind},
            {"name": f"{name} resumed", "first": SAVED, "last": STEPS, "resume": checkpoint(name), **kind},
        ]
    alone.append({"name": "bf16", "zero_stage": 1, "precision": "bf16", "last": STEPS})
    two = [
        {"name": job_name(zero_stage, offload), "zero_stage": zero_stage, "offload": offload, "last": STEPS}
        for zero_stage, offload in KINDS
    ]
    # Each stage goes on, on two ranks, from what another stage wrote on one.
    two += [
        {
            "name": f"zero{stage} from {written}",
            "zero_stage": stage,
            "first": SAVED,
            "last": STEPS,
            "resume": checkpoint(written),
        }
        for stage, written in [(0, "zero3"), (1, "zero0"), (2, "zero1"), (3, "zero2+offload")]
    ]
    one_rank = run_ranks(1, curves, alone, folder)[0]
    return {"one": one_rank, "two": run_ranks(2, curves, two, folder)[0], "folder": folder}


def checkpoint(name: str) -> str:
    return f"{name}/checkpoints/step_{SAVED}"


@pytest.mark.parametrize(("zero_stage", "offload"), KINDS)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_same_curve_as_zero_0_on_one_process(
    results: dict[str, Any], zero_stage: int, offload: bool, ranks: str
) -> None:
    expected = torch.tensor(results["one"]["zero0"]["curve"])
    curve = torch.tensor(results[ranks][job_name(zero_stage, offload)]["curve"])
    torch.testing.assert_close(curve, expected, atol=1e-5, rtol=1e-5)


def test_curve_is_plain_adamw() -> None:
    """The reference is torch alone: one model, AdamW with two groups, clipping; no engine."""
    from tests.train.tiny_training import TinyLoader, tiny_objectives
    from train.distributed import Ranks

    model = TinyModel().train()
    model.frozen.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": [p for p in trainable if p.ndim <= 1]}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    expected = []
    for step in TinyLoader(Ranks.alone()).steps(0):
        if step.step == STEPS:
            break
        losses = [sum(tiny_objectives(model, b, Ranks.alone())[0].values()) for b in step.micro_batches]  # type: ignore[arg-type]
        (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step.step / 20)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((float(sum(losses).detach()) / len(losses), float(norm)))  # type: ignore[union-attr]
    curve = run_ranks(1, curves, [{"name": "it", "zero_stage": 0, "last": STEPS}], "")[0]["it"]["curve"]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_zero_3_partitions_the_parameters(results: dict[str, Any]) -> None:
    for part, whole, held in results["two"]["zero3"]["partitioned"]:
        assert part == -(-whole // 2), "each of two ranks holds half, rounded up"
        assert held == 0, "and nothing of the whole outside a pass"


@pytest.mark.parametrize(("zero_stage", "offload"), KINDS)
def test_resume_is_bit_exact(results: dict[str, Any], zero_stage: int, offload: bool) -> None:
    name = job_name(zero_stage, offload)
    expected, resumed = results["one"][name], results["one"][f"{name} resumed"]
    assert resumed["curve"] == expected["curve"][SAVED:]
    for kind in ("weights", "optimizer"):
        assert resumed[kind].keys() == expected[kind].keys()
        for key, tensor in expected[kind].items():
            assert torch.equal(resumed[kind][key], tensor), key


@pytest.mark.parametrize(
    "name", ["zero0 from zero3", "zero1 from zero0", "zero2 from zero1", "zero3 from zero2+offload"]
)
def test_resume_on_other_ranks_and_stage(results: dict[str, Any], name: str) -> None:
    expected = results["one"]["zero0"]
    resumed = results["two"][name]
    torch.testing.assert_close(
        torch.tensor(resumed["curve"]), torch.tensor(expected["curve"][SAVED:]), atol=1e-6, rtol=1e-6
    )
    for kind in ("weights", "optimizer"):
        torch.testing.assert_close(resumed[kind], expected[kind], atol=1e-6, rtol=1e-6)


def test_frozen_parts_keep_their_bytes_and_stay_in_eval_mode(results: dict[str, Any]) -> None:
    for name, result in results["one"].items():
        assert result["frozen_same"], name
        assert not any(result["frozen_modes"]), name
        assert not any(key.startswith("model.frozen") for key in result["weights"]), name


def test_checkpoint_names_every_trainable_parameter(results: dict[str, Any]) -> None:
    folder = Path(results["folder"], checkpoint("zero3"))
    expected = {f"model.{name}" for name, p in TinyModel().named_parameters() if p.requires_grad}
    assert load_file(folder / "weights.safetensors").keys() == expected
    states = {f"{name}.{key}" for name in expected for key in ("exp_avg", "exp_avg_sq", "step")}
    assert load_file(folder / "optimizer.safetensors").keys() == states
    assert not list(folder.rglob("*.p*t*h")) and not list(folder.rglob("*.pkl"))


def test_bf16_keeps_trainable_weights_in_fp32(results: dict[str, Any]) -> None:
    losses, expected = (torch.tensor(results["one"][name]["curve"])[:, 0] for name in ("bf16", "zero0"))
    assert not torch.equal(losses, expected), "autocast did nothing"
    torch.testing.assert_close(losses, expected, atol=2e-2, rtol=2e-2)
    weights = results["one"]["bf16"]["weights"]
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


def test_precisions() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve_precision("fp16", torch.device("cpu"))
    model = TinyModel()
    store_frozen(model, "bf16")
    assert {p.dtype for p in model.frozen.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="trainable parameters are fp32"):
        store_frozen(model.head.bfloat16(), "bf16")
