"""Stage two on a GPU: bf16 and 4 bits beside fp32 on the CPU, the fused kernel, answers, and the command itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.batch import Dialogue
from model.adapter import Lora, QLora
from model.generation import Decoding
from model.visual_chat import VisualChatModel
from tests.tiny_chat import SAMPLES, batch_of, tiny_chat, train_pieces
from tests.train.test_finetune import STEPS, finetune, metrics
from train.distributed import Ranks
from train.engine import store_frozen
from train.loss.stage_two import StageTwoLoss
from train.stage import Stage

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def adapted(pieces: Path, device: torch.device, *, quantised: bool, recompute: bool = False) -> VisualChatModel:
    """The same numbers on any device: weights and adapters are drawn on the CPU."""
    changes = {"hidden_size": 64, "inner_size": 128, "initial_std": 0.15, "checkpoint_activations": recompute}
    model = tiny_chat(pieces, llm=changes)
    (QLora if quantised else Lora)(rank=2).attach(model, device=device)
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model


def loss_and_gradient(
    model: VisualChatModel, device: torch.device, precision: str, samples: Sequence[Dialogue] = SAMPLES
) -> tuple[float, Tensor]:
    stage = Stage(model, StageTwoLoss(), Ranks.alone())
    store_frozen(stage, precision)
    stage.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = stage(batch_of(model, samples).to(device)).losses["lm"]
    loss.backward()
    gradients = [p.grad.flatten().cpu() for _, p in sorted(stage.named_parameters()) if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_bf16_is_near_fp32_on_a_cpu(pieces: Path, cuda: torch.device, quantised: bool, recompute: bool) -> None:
    expected_loss, expected = loss_and_gradient(adapted(pieces, CPU, quantised=quantised), CPU, "fp32")
    model = adapted(pieces, cuda, quantised=quantised, recompute=recompute)
    loss, found = loss_and_gradient(model, cuda, "bf16")
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert torch.linalg.norm(found - expected) < 0.05 * torch.linalg.norm(expected)


def test_fp32_is_that_of_a_cpu(pieces: Path, cuda: torch.device) -> None:
    expected_loss, expected = loss_and_gradient(adapted(pieces, CPU, quantised=False), CPU, "fp32")
    loss, found = loss_and_gradient(adapted(pieces, cuda, quantised=False), cuda, "fp32")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_attention_runs_in_the_fused_kernel(pieces: Path, cuda: torch.device) -> None:
    """Torch raises where the one kernel allowed cannot take the mask; also where rows are no multiple of 8 long."""
    model = adapted(pieces, cuda, quantised=False).to(cuda)
    odd = [SAMPLES[1], SAMPLES[4]]
    assert batch_of(model, odd).text_length % 8
    for samples in (SAMPLES, odd):
        batch = batch_of(model, samples).to(cuda)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            embedded_BLD = model.embed(batch)  # the tiny encoder's heads are too narrow for that kernel
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                hidden_BLD = model.llm.hidden(embedded_BLD, batch.ids_BL, batch.mask_BL)
                hidden_BLD.sum().backward()


@pytest.mark.parametrize("quantised", [False, True])
def test_answers_are_those_of_a_cpu(pieces: Path, cuda: torch.device, quantised: bool) -> None:
    def answers(device: torch.device) -> list[list[int]]:
        model = adapted(pieces, device, quantised=quantised).to(device).eval()
        return model.generate(batch_of(model).to(device), Decoding(max_new_tokens=12)).tolist()

    expected = answers(CPU)
    assert answers(cuda) == expected and len({tuple(row) for row in expected}) > 1


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("cpu") / "run"
    finetune(run)
    yield run


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_the_command_on_a_gpu(on_cpu: Path, tmp_path: Path, adapter: str, engine: str) -> None:
    said = finetune(
        tmp_path / "run",
        "run.device=cuda",
        f"model/adapter={adapter}",
        "model.adapter.rank=2",
        f"train/engine={engine}",
        "train.precision=bf16",
        f"model.llm.folder={on_cpu / 'llm'}",
    )
    lines = metrics(tmp_path / "run")
    expected = [line["loss"] for line in metrics(on_cpu)]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=0.03 if adapter == "lora" else 0.1)
    assert lines[0]["memory_gib"] > 0 and f"step {STEPS}/{STEPS}" in said
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
