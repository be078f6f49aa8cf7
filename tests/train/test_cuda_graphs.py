"""Passes that are recorded once a shape: the same loss and gradients as without, with and without a GPU.

On a CPU a "recording" is the function itself, run again on the recording's own inputs: all of the bookkeeping is held
to what it must be.  That CUDA graphs do the same is for a GPU to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.adapter import Lora
from model.visual_chat import VisualChatModel
from tests.tiny_chat import batch_of, rows_of, tiny_chat, train_pieces
from train import cuda_graphs
from train.config import compose
from train.cuda_graphs import RecordedPass
from train.distributed import Ranks
from train.loading import padding_multiple
from train.loss.stage_two import StageTwoLoss
from train.stage import Stage

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS: list[list[Sequence[int]]] = [[(0, 1), (2, 3)], [(2, 3), (0, 1)], [(4, 6), (0, 1)], [(5, 7), (5, 7)]]


def again(run: Callable[[], None], whole: RecordedPass) -> Callable[[], Any]:
    run()
    return run


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def adapted(pieces: Path, device: str, *, sight: bool, recompute: bool = False) -> VisualChatModel:
    llm = {"hidden_size": 64, "inner_size": 128, "initial_std": 0.15, "checkpoint_activations": recompute}
    model = tiny_chat(pieces, llm=llm, train_qformer=sight, train_projection=sight)
    Lora(rank=2).attach(model, device=torch.device("cpu"))
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model.to(device)


def run_steps(model: VisualChatModel, device: str, *, bf16: bool) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses and gradients of each step's two micro-batches together; the weights move a little after each."""
    stage = Stage(model, StageTwoLoss(), Ranks.alone())
    whole = batch_of(model)
    losses, gradients = [], []
    for micro_batches in STEPS:
        for number, rows in enumerate(micro_batches):
            batch = rows_of(whole, rows, len(micro_batches), number).to(torch.device(device))
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                loss = stage(batch).losses["lm"]
            loss.backward()
            losses.append(float(loss.detach()))
        found = {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return losses, gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("sight", "recompute"), [(True, False), (False, False), (False, True)])
def test_the_same_losses_and_gradients(pieces: Path, device: str, sight: bool, recompute: bool, bf16: bool) -> None:
    expected = run_steps(adapted(pieces, device, sight=sight, recompute=recompute), device, bf16=bf16)
    model = adapted(pieces, device, sight=sight, recompute=recompute)
    names = cuda_graphs.use(model, max_rows=2, record=again if device == "cpu" else None)
    assert names == ["VisualChatModel.look", "ChatGLM.hidden"]
    losses, gradients = run_steps(model, device, bf16=bf16)
    assert losses == expected[0], "the same kernels"
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert found.keys() == wanted.keys() and len(found) > (30 if sight else 10)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=0, rtol=0, msg=name)
    # no two of the rows are equally long; they have 1, 4 (which are too many), 1 (in place of none) and 2 pictures
    assert len(model.llm.hidden.recordings) == 4  # type: ignore[attr-defined]
    assert len(model.look.recordings) == 2  # type: ignore[attr-defined]


def test_only_small_batches_and_only_for_training(pieces: Path) -> None:
    model = adapted(pieces, "cpu", sight=False)
    cuda_graphs.use(model, max_rows=2, record=again)
    hidden: Any = model.llm.hidden
    model.predict(batch_of(model))  # 8 rows
    with torch.no_grad():
        model.predict(rows_of(batch_of(model), (0, 1)))
    assert not hidden.recordings
    model.predict(rows_of(batch_of(model), (0, 1)))
    assert len(hidden.recordings) == 1


def test_blocks_that_are_recomputed_with_their_random_numbers_are_not_recorded(pieces: Path) -> None:
    """Only the host can remember those; what is kept, or draws nothing, is recorded."""
    llm = {"hidden_size": 64, "inner_size": 128, "checkpoint_activations": True, "checkpoint_above": 100}
    model = tiny_chat(pieces, llm=llm, train_qformer=False)
    Lora(rank=2, dropout=0.5).attach(model, device=torch.device("cpu"))
    model.train()
    cuda_graphs.use(model, max_rows=2, record=again)
    hidden: Any = model.llm.hidden
    small, large = rows_of(batch_of(model), (1, 4)), rows_of(batch_of(model), (0, 5))
    assert small.ids_BL.numel() <= 100 < large.ids_BL.numel()
    model.predict(large)
    assert not hidden.recordings
    model.predict(small)
    assert len(hidden.recordings) == 1


def test_a_second_pass_before_the_backward_one_is_refused(pieces: Path) -> None:
    model = adapted(pieces, "cpu", sight=False)
    cuda_graphs.use(model, max_rows=2, record=again)
    first, second = (model.predict(rows_of(batch_of(model), rows)).logits_TV.sum() for rows in ((0, 1), (2, 3)))
    second.backward()
    with pytest.raises(RuntimeError, match="train.cuda_graphs=0"):
        first.backward()


def test_weights_that_moved_are_recorded_anew() -> None:
    linear = torch.nn.Linear(1, 1, bias=False)
    double = RecordedPass(linear.forward, [linear], max_rows=3, record=again)
    for value in (2.0, 5.0):
        linear.weight.data = torch.tensor([[value]])
        assert double(torch.ones(2, 1)).tolist() == [[value], [value]]
        (recording,) = double.recordings.values()
        assert recording.parameters[0].data_ptr() == linear.weight.data_ptr()


def test_shapes_beyond_the_last_recording_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 2)
    double = RecordedPass(lambda x: x * 2, [], max_rows=9, record=again)
    for rows in (1, 2, 3, 2, 4):
        assert double(torch.ones(rows)).tolist() == [2.0] * rows
    assert len(double.recordings) == 2 and double.passes == 3
    assert [record.message for record in caplog.records if "pad_to_multiple_of=32" in record.message] == [
        caplog.records[0].message
    ]


def test_another_precision_is_another_recording() -> None:
    linear = torch.nn.Linear(4, 4)
    double = RecordedPass(linear.forward, [linear, linear], max_rows=3, record=again)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double(x).dtype == torch.bfloat16
    assert double(x).dtype == torch.float32
    assert len(double.recordings) == 2 and len(double.parameters) == 2, "what two modules share counts once"


@pytest.mark.parametrize(
    ("device", "overrides", "expected"),
    [
        ("cuda", [], 32),
        ("cuda", ["train.cuda_graphs=0"], 1),
        ("cpu", [], 1),
        ("cpu", ["data.loader.pad_to_multiple_of=8"], 8),
    ],
)
def test_lengths_are_few_where_there_are_graphs(device: str, overrides: list[str], expected: int) -> None:
    config = compose("finetune", ["experiment=smoke_stage_two", *overrides])
    assert padding_multiple(config, device) == expected
    assert padding_multiple(compose("pretrain", ["experiment=smoke"]), device) is None


@pytest.mark.gpu
def test_random_numbers_are_new_each_time_and_follow_the_seed() -> None:
    """And a recording draws none: a run that resumes records its shapes again."""
    x = torch.ones(1000, device="cuda")
    expected = []
    for _ in range(2):
        double = RecordedPass(torch.nn.functional.dropout, [], max_rows=1000)
        torch.manual_seed(3)
        found = [double(x) for _ in range(3)]
        torch.manual_seed(3)
        again = [double(x) for _ in range(3)]
        assert len({tuple(mask.tolist()) for mask in found}) == 3
        assert all(map(torch.equal, found, again))
        expected.append(found)
    assert all(map(torch.equal, *expected))


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_named() -> None:
    double = RecordedPass(lambda x: x * float(x.sum()), [], max_rows=3)  # asks the device
    with pytest.raises(RuntimeError, match="train.cuda_graphs=0"):
        double(torch.ones(2, device="cuda"))
