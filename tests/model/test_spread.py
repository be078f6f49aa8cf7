"""Blocks over several devices: the plan at full size, and that nothing is left behind on another device.

There is one CPU, so the second device of these tests is "meta": torch refuses to compute with tensors of both, and the
way from the CPU to meta is open.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.generation import Decoding
from model.llm.sat_network import build
from model.spread import plan, size_of, spread
from model.visual_chat import VisualChatModel
from tests.model.glm_common import small_glm, train_sentencepieces, visual_chat
from tests.tiny_chat import batch_of, tiny_chat, train_pieces

CPU, META = torch.device("cpu"), torch.device("meta")
ROOMY = float(2**40)


def small_model(family: str, folder: Path) -> VisualChatModel:
    if family == "chatglm":
        return tiny_chat(train_pieces(folder / "ice_text.model"))
    return visual_chat(small_glm("chatglm3", train_sentencepieces(folder / "tokenizer.model")))


def test_chatglm_at_full_size_over_unequal_gpus() -> None:
    network = build(hidden_size=4096, num_layers=28, num_heads=32, inner_size=16384, vocab_size=130528, device="meta",
                    dtype=torch.bfloat16)  # fmt: skip
    layers = network.get_submodule("transformer.layers")
    assert isinstance(layers, nn.ModuleList)
    sizes = [size_of(layer) for layer in layers]
    outside = size_of(network) - sum(sizes)
    assert (sum(sizes) + outside) // 2 == 6_707_929_088
    small, large = torch.device("cuda", 0), torch.device("cuda", 1)
    places = plan(sizes, [(small, 7.2e9), (large, 14.4e9)], first=outside)
    assert places == sorted(places, key=str) and len(places) == 28
    filled = [outside + sizes[0] * places.count(small), sizes[0] * places.count(large)]
    assert filled[0] / 7.2e9 == pytest.approx(filled[1] / 14.4e9, abs=0.6 * sizes[0] / 7.2e9)
    assert filled[0] < 7.2e9 and filled[1] < 14.4e9


def test_everything_on_the_first_where_that_is_all_and_an_error_where_it_is_too_little() -> None:
    assert plan([5, 5], [(CPU, 10.0)]) == [CPU, CPU]
    assert plan([4] * 4, [(CPU, 100.0), (META, 100.0)], first=100) == [META] * 4
    with pytest.raises(ValueError, match="sees no GPU"):
        plan([5], [])
    with pytest.raises(ValueError, match=r"needs 0.0 GB, 2 device\(s\) have 0.0 GB free: quantize"):
        plan([5] * 4, [(CPU, 9.0), (META, 9.0)])


@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_no_tensor_is_left_behind(tmp_path: Path, family: str) -> None:
    """The last blocks on meta: whatever they were given from the CPU would stop them."""
    model = small_model(family, tmp_path)
    llm, batch = model.llm, batch_of(model)
    expected = model.embed(batch)
    elsewhere = sum(size_of(layer) for layer in list(llm.layers)[1:])
    spread(model, [(CPU, float(size_of(model) - elsewhere)), (META, float(elsewhere))])
    assert llm.layer_devices == [CPU, META, META]
    assert {p.device.type for p in llm.layers[-1].parameters()} == {"meta"}
    assert {p.device.type for n, p in llm.named_parameters() if "layers" not in n} == {"cpu"}
    torch.testing.assert_close(model.embed(batch), expected)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # home again, where it would be on a GPU
        llm.hidden(expected, batch.ids_BL, batch.mask_BL)
    ended: list[str] = []

    def at_home(tensor: Tensor) -> Tensor:
        ended.append(tensor.device.type)
        return torch.zeros(tensor.shape)

    llm.at_home = at_home  # type: ignore[method-assign]
    last_BD, cache = llm.prefill(expected, batch.ids_BL, batch.mask_BL, room=3)
    llm.select(cache, torch.arange(len(batch)).repeat_interleave(2))
    after_BD = llm.extend(torch.full((2 * len(batch),), 40), cache)
    assert last_BD.shape == (len(batch), llm.width) and after_BD.shape == (2 * len(batch), llm.width)
    assert ended == ["meta", "meta"]


@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_pieces_of_one_device_answer_as_the_whole(family: str, tmp_path: Path) -> None:
    model = small_model(family, tmp_path)
    expected = {beams: model.generate(batch_of(model), Decoding(6, num_beams=beams)) for beams in (1, 2)}
    spread(model, [(CPU, ROOMY), (CPU, ROOMY)])
    assert model.llm.layer_devices == [CPU] * 3 and model.llm.home_device == CPU
    for beams, answer in expected.items():
        assert torch.equal(model.generate(batch_of(model), Decoding(6, num_beams=beams)), answer)


def test_blocks_may_all_be_elsewhere(tmp_path: Path) -> None:
    """Then what comes home still goes to the output head, not to the first block."""
    model = small_model("glm", tmp_path)
    spread(model, [(CPU, float(size_of(model))), (META, 100 * ROOMY)])
    assert model.llm.layer_devices == [META] * 3
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        model.generate(batch_of(model), Decoding(2))
