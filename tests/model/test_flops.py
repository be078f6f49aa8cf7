"""The count of a training step's operations beside torch's own counter, which watches the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.adapter import Lora, NoAdapter
from tests.tiny_chat import batch_of, tiny_chat, train_pieces
from train.distributed import Ranks
from train.loss.stage_two import StageTwoLoss
from train.stage import Stage

CPU = torch.device("cpu")
KINDS: dict[str, tuple[Any, dict[str, bool], dict[str, Any]]] = {  # adapter, what trains, changes of the language model
    "alignment": (NoAdapter(), {}, {}),
    "alignment, recomputed": (NoAdapter(), {}, {"checkpoint_activations": True}),
    "lora alone": (Lora(rank=2), {"train_qformer": False, "train_projection": False}, {}),
    "lora beside the projection": (Lora(rank=2), {"train_qformer": False}, {"checkpoint_activations": True}),
    "attention of the last blocks": (
        Lora(rank=2, layer_range=(1, 3), target_modules=("query_key_value", "dense")),
        {"train_qformer": False, "train_projection": False},
        {"checkpoint_activations": True},
    ),
    "lora on the Q-Former too": (Lora(rank=2, parts=("llm", "qformer", "projection")), {}, {}),
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(pieces: Path, kind: str) -> None:
    adapter, parts, llm = KINDS[kind]
    model = tiny_chat(pieces, llm=llm, **parts)
    adapter.attach(model, device=CPU)
    stage, batch = Stage(model, StageTwoLoss(), Ranks.alone()), batch_of(model)
    # the plain kernel, whose products are counted one by one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage(batch).losses["lm"].backward()
    expected = counter.get_total_flops()
    assert model.train_flops_per_sample(batch) * len(batch) == pytest.approx(expected, rel=0.01)
