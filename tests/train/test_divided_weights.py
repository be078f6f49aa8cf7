"""ZeRO-3 divides frozen weights while they are read: the same numbers, and no rank holds more than one tensor whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.assemble import assemble, language_model
from model.visual_chat import VisualChatModel
from model.weights.filling import Home
from model.weights.ours import frozen_fingerprint
from tests.model.glm_common import small_glm, train_sentencepieces
from tests.ranks import run_ranks
from tests.tiny_chat import train_pieces
from tests.tiny_run import GLM_SIZES, chatglm_nodes, glm_nodes
from tests.train.tiny_stage_two import two_steps
from train.distributed import Ranks
from train.engine import Divider, close_process_group, is_divided, store_frozen, whole
from train.loss.stage_two import StageTwoLoss
from train.optim import parameter_groups
from train.stage import Stage

CPU = torch.device("cpu")
EVEN_SMALL_ONES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Watched:
    """A divider that looks how much of the language model is whole, each time that a weight has arrived."""

    def __init__(self, divide: Divider, llm: nn.Module) -> None:
        self.divide, self.llm = divide, llm
        self.whole: list[int] = []  # elements beside the one that arrived, and of it

    def __call__(self, parameter: nn.Parameter) -> None:
        self.whole.append(sum(p.numel() for p in self.llm.parameters() if not p.is_meta) - parameter.numel())
        self.divide(parameter)


def built(nodes: dict[str, Any], home: Home | None = None) -> VisualChatModel:
    torch.manual_seed(3)
    model, report = assemble(nodes, nodes["built"], device=CPU, home=home)
    assert not [name for name in report.new if name.startswith("llm.")]
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def after_two_steps(model: VisualChatModel, ranks: Ranks) -> dict[str, Any]:
    stage = Stage(model, StageTwoLoss(), ranks)
    groups = parameter_groups(list(stage.named_parameters()), lr=1e-3, weight_decay=0.0)
    engine, losses = two_steps(stage, groups, ranks, zero_stage=3)
    return {"losses": losses, "weights": {name: tensor.clone() for name, tensor in engine.full_weights()}}


def all_both_ways(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranks = Ranks.connect(CPU)
    found = [both_ways(nodes, ranks) for nodes in models]
    close_process_group()
    return found


def both_ways(nodes: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    expected_model = built({**nodes, "built": language_model(nodes, dtype="float32")})
    expected = {"fingerprint": frozen_fingerprint(expected_model)["sha256"], **after_two_steps(expected_model, ranks)}
    llm: Any = language_model(nodes, dtype="float32")
    watched = Watched(Divider(CPU, offload=False, deepspeed=EVEN_SMALL_ONES), llm)
    model = built({**nodes, "built": llm}, Home(CPU, torch.float32, watched))
    frozen = [p for name, p in model.llm.named_parameters() if not p.requires_grad]
    facts = {
        "divided": [is_divided(p) and p.numel() == 0 for p in frozen],
        "held": sum(p.ds_tensor.numel() for p in frozen),  # type: ignore[attr-defined]
        "all": sum(p.ds_numel for p in frozen),  # type: ignore[attr-defined]
        "whole": watched.whole,
    }
    store_frozen(model, "fp32")
    found = {"fingerprint": frozen_fingerprint(model, whole=whole)["sha256"], **after_two_steps(model, ranks)}
    return {"expected": expected, "found": found, **facts}


def joint(folder: Path) -> dict[str, Any]:
    """ChatGLM-6B's kind, with an adapter."""
    return chatglm_nodes(train_pieces(folder / "ice_text.model"), folder / "chatglm")


def tied(folder: Path) -> dict[str, Any]:
    """ChatGLM3's kind, whose output head is the words' embedding; no adapter."""
    tokenizer = train_sentencepieces(folder / "tokenizer.model")
    made = glm_nodes(tokenizer, folder / "glm")
    llm: Any = small_glm("chatglm3", tokenizer, **GLM_SIZES, tied_head=True)
    llm.network.save_pretrained(folder / "glm")
    none = {"_target_": "model.adapter.NoAdapter"}
    return {**made, "llm": {**made["llm"], "tied_head": True}, "adapter": none}


def test_divided_while_they_are_read(tmp_path: Path) -> None:
    for found in run_ranks(2, all_both_ways, [joint(tmp_path), tied(tmp_path)], timeout=120):
        for told in found:
            assert len(told["divided"]) > 18 and all(told["divided"])
            assert told["all"] / 2 <= told["held"] <= told["all"] / 2 + len(told["divided"])
            assert told["whole"] == [0] * len(told["divided"]), "one at a time"
            assert told["found"].pop("fingerprint") == told["expected"].pop("fingerprint")
            torch.testing.assert_close(told["found"], told["expected"], atol=0, rtol=0)
