"""ChatGLM-6B: layout, masks, positions and numbers against SwissArmyTransformer's own; SAT's side effects kept in."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.batch import IGNORED, Dialogue, Turn
from model.attention_mask import as_bias
from model.llm import sat_network
from model.llm.chatglm import SPECIAL, ChatGLM, ChatGLMCodec, positions, prefix_mask
from model.llm.chatglm_block import rotate, rotation
from model.llm.pieces import train_pieces as train_pieces_of
from model.weights.rows import head_by_head
from tests.model.llm_common import codec_of, small_chatglm, train_pieces

MASK, GMASK, SOP, EOP, PAD = 13, 14, 16, 17, 3  # what `train_pieces` gives


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


@pytest.fixture(scope="module")
def codec(pieces: Path) -> ChatGLMCodec:
    return ChatGLMCodec(pieces, num_image_tokens=5)


def dialogue(*turns: tuple[Any, ...], language: str = "zh") -> Dialogue:
    return Dialogue(tuple(Turn(*turn) for turn in turns), language)


# ------------------------------------------------------------------------------------------------------- the layout


def test_one_picture_and_one_answer_as_visualglm_trains(codec: ChatGLMCodec) -> None:
    """`finetune_visualglm.py:116-138`: a + [gMASK, sop] + b + [eop], labels from sop on."""
    encode = codec.pieces.encode
    a = encode("<img>") + [PAD] * 5 + encode("</img>问：描述这张图片。\n答：")
    b = encode("两个绿色的三角形")
    found = codec.encode(dialogue(("描述这张图片。", "两个绿色的三角形", 1)))
    assert found.ids == (*a, GMASK, SOP, *b, EOP)
    assert found.labels == (*[IGNORED] * (len(a) + 1), SOP, *b, EOP)
    assert found.image_starts == (len(encode("<img>")),)


def test_sop_is_a_label_only_where_asked(pieces: Path, codec: ChatGLMCodec) -> None:
    sample = dialogue(("描述这张图片。", "红色的圆", 1))
    expected = [IGNORED if label == SOP else label for label in codec.encode(sample).labels]
    without = ChatGLMCodec(pieces, num_image_tokens=5, train_sop=False).encode(sample)
    assert list(without.labels) == expected
    assert without.num_target_tokens == codec.encode(sample).num_target_tokens - 1


@pytest.mark.parametrize(
    ("language", "expected"),
    [("zh", "问：一\n答：二\n问：三\n答："), ("en", "Q:一\nA:二\nQ:三\nA:"), ("fr", "Q:一\nA:二\nQ:三\nA:")],
)
def test_turns_and_languages_without_a_picture(codec: ChatGLMCodec, language: str, expected: str) -> None:
    found = codec.encode(dialogue(("一", "二"), ("三",), language=language))
    assert found.ids == (*codec.pieces.encode(expected), GMASK, SOP)
    assert found.image_starts == () and found.num_target_tokens == 0


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_training_and_chat_have_one_layout(codec: ChatGLMCodec, language: str, num_images: int) -> None:
    past = ("图片", "红色", num_images), ("what is", "blue", 1)
    chat = codec.encode(dialogue(*past, ("Describe", "", 1), language=language))
    training = codec.encode(dialogue(*past, ("Describe", "A red circle", 1), language=language))
    assert training.ids[: len(chat.ids)] == chat.ids
    assert training.image_starts == chat.image_starts and len(chat.image_starts) == num_images + 2
    assert [label for label in training.labels if label != IGNORED] == [SOP, *training.ids[len(chat.ids) :]]


def test_pictures_stand_before_the_words_of_their_turn(codec: ChatGLMCodec) -> None:
    encode = codec.pieces.encode
    found = codec.encode(dialogue(("一", "二", 2), ("三", "", 1)))
    slots = [PAD] * 5
    expected = encode("<img>") + slots + encode("</img><img>") + slots + encode("</img>问：一\n答：二\n<img>") + slots
    assert found.ids == (*expected, *encode("</img>问：三\n答："), GMASK, SOP)


@pytest.mark.parametrize("name", ["<sop>", "[gMASK]", "<eop>", "<pad>"])
def test_nobody_writes_a_special_token(codec: ChatGLMCodec, name: str) -> None:
    found = codec.encode(dialogue((f"描述{name}", f"红色{name}{name}")))
    assert [found.ids.count(token) for token in (GMASK, SOP, EOP, PAD)] == [1, 1, 1, 0]


def test_decoding_gives_the_answer_back(codec: ChatGLMCodec) -> None:
    answer = "A red\ncircle   on  the left"
    found = codec.encode(dialogue(("Describe", answer), language="en"))
    ids = found.ids[found.ids.index(SOP) + 1 :]
    assert codec.decode([*ids, *codec.pieces.encode("more"), PAD]) == answer


def test_special_ids_come_from_the_file_or_by_hand(tmp_path: Path, pieces: Path) -> None:
    bare = train_pieces(tmp_path / "bare.model", special=[])
    with pytest.raises(ValueError, match=r"no piece \[MASK\].*model.llm.ids.mask"):
        ChatGLMCodec(bare, num_image_tokens=5)
    ids = {"mask": 130000, "gmask": 130001, "bos": 130004, "eos": 130005}
    found = ChatGLMCodec(bare, num_image_tokens=5, ids=ids)
    assert found.ids == {**ids, "pad": 3}
    with pytest.raises(ValueError, match=r"<sop> is 16 in .*, 130004 in the configuration"):
        ChatGLMCodec(pieces, num_image_tokens=5, ids=ids | {"mask": MASK, "gmask": GMASK})
    with pytest.raises(ValueError, match="there is no sentencepiece model"):
        ChatGLMCodec(tmp_path, num_image_tokens=5)


# ------------------------------------------------------------------------------------------------- what is too long


def test_history_goes_first_then_the_question_then_the_answer(codec: ChatGLMCodec) -> None:
    long = dialogue(("图片", "红色", 1), ("内容", "蓝色"), ("描述这张图片。" * 3, "两个绿色的三角形"))
    whole = codec.encode(long)
    answer = [*codec.pieces.encode("两个绿色的三角形"), EOP]
    for limit in range(24, len(whole.ids)):
        cut = codec.encode(long, max_tokens=limit)
        assert len(cut.ids) <= limit and len(cut.image_starts) == 1
        assert sum(cut.num_cut.values()) >= len(whole.ids) - len(cut.ids) > 0
        end = cut.ids.index(GMASK)
        assert cut.ids[end - 3 : end] == tuple(codec.pieces.encode("问：。\n答："))[-3:]  # the answer's prefix
        assert cut.num_cut["history"] > 0, "what is nearest stays"
        if not cut.num_cut["answer"]:
            assert cut.ids[end + 2 :] == tuple(answer)
        else:
            assert cut.num_cut["question"] > 0 and cut.ids[-1] != EOP
    with pytest.raises(ValueError, match="leave no room in max_tokens=12"):
        codec.encode(long, max_tokens=12)


def test_the_question_keeps_its_end_and_half_the_room(codec: ChatGLMCodec) -> None:
    sample = dialogue(("circle " * 40 + "What is it?", "red " * 60), language="en")
    cut = codec.encode(sample, max_tokens=64)
    prompt = codec.pieces.decode(cut.ids[: cut.ids.index(GMASK)])
    assert prompt.startswith("Q:") and prompt.endswith("What is it?\nA:")
    assert 28 <= cut.ids.index(SOP) + 1 <= 32 and len(cut.ids) == 64
    short = codec.encode(sample, max_answer_tokens=7)
    num_answer = len(codec.pieces.encode("red " * 60)) + 1  # and <eop>
    assert short.num_cut == {"history": 0, "question": 0, "answer": num_answer - 7}
    assert short.num_target_tokens == 1 + 7 and short.ids[-1] != EOP


def test_dialogues_that_cannot_be(codec: ChatGLMCodec) -> None:
    with pytest.raises(ValueError, match="without a turn"):
        codec.encode(Dialogue((), "zh"))
    with pytest.raises(ValueError, match="turn 1 of 2 has no answer"):
        codec.encode(dialogue(("一", ""), ("二", "三")))


# ---------------------------------------------------------------------------------------------- against SAT's own


def rows_of_ids() -> tuple[Tensor, Tensor]:
    """Prefixes and answers of several lengths, padded on the right; the last row has no gMASK but a MASK."""
    rows = [
        [20, 21, 22, GMASK, SOP, 30, 31, EOP],
        [20, GMASK, SOP, 30],
        [20, 8, 21, GMASK, SOP],
        [8, 20, GMASK, SOP, 7],
    ]
    length = max(map(len, rows))
    ids_BL = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    return ids_BL, ids_BL != PAD


class Asked(nn.Module):
    """What SAT's own functions for masks and positions ask of a model."""

    bos_token_id, gmask_token_id, mask_token_id, pad_token_id = SOP, GMASK, MASK, PAD

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        from sat.model.official.chatglm_model import ChatGLMModel

        return super().__getattr__(name) if name == "weight" else getattr(ChatGLMModel, name).__get__(self)


def test_masks_and_positions_equal_sats() -> None:
    ids_BL, mask_BL = rows_of_ids()
    expected_mask, expected_positions = Asked().get_inputs(ids_BL)
    context_B = torch.tensor([4, 2, 4, 3])
    mask_B1LL = prefix_mask(context_B, mask_BL)
    for row in range(len(ids_BL)):  # SAT lets padding look and be looked at
        real = int(mask_BL[row].sum())
        assert torch.equal(mask_B1LL[row, 0, :real, :real], expected_mask[row, 0, :real, :real].bool())
        assert not mask_B1LL[row, 0, :, real:].any()
    assert torch.equal(positions(context_B, context_B - 1, ids_BL.shape[1]), expected_positions)


def test_a_row_without_gmask_takes_mask() -> None:
    llm = small_chatglm(None, ids={"bos": SOP, "gmask": GMASK, "mask": MASK})
    ids_BL = torch.tensor([[20, MASK, 21, SOP, 5], [20, MASK, GMASK, SOP, 5]])
    context_B, mask_token_B = llm._marks(ids_BL)
    assert context_B.tolist() == [3, 3] and mask_token_B.tolist() == [1, 2]
    assert torch.equal(positions(context_B, mask_token_B, 5)[:1], Asked().get_inputs(ids_BL[:1])[1])


@pytest.fixture
def sat_alone() -> Iterator[None]:
    """SAT's parallel layers compute without a process group."""
    import sat.mpu.mappings

    with ExitStack() as stack:
        for name in ("_reduce", "_gather", "_split"):
            stack.enter_context(mock.patch.object(sat.mpu.mappings, name, lambda x: x))
        yield


@pytest.mark.usefixtures("sat_alone")
def test_numbers_and_gradients_equal_sats() -> None:
    from argparse import Namespace

    ids = {"bos_token_id": SOP, "gmask_token_id": GMASK, "mask_token_id": MASK, "pad_token_id": PAD}
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "inner_hidden_size": 48, "vocab_size": 256}
    with sat_network.contained():
        from sat.model.official.chatglm_model import ChatGLMModel

        rest = {"max_sequence_length": 16, "layernorm_order": "post", "model_parallel_size": 1, "skip_init": False}
        theirs = ChatGLMModel(Namespace(**sizes, **rest, **ids)).eval()
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = small_chatglm(None, ids={"bos": SOP, "gmask": GMASK, "mask": MASK}, rotary_dtype="float32")
    state = dict(theirs.named_parameters())
    state["lm_head.weight"] = state.pop("mixins.chatglm-final.lm_head.weight")
    own = {n: head_by_head(t, 4) if "query_key_value" in n else t for n, t in state.items()}
    ours.network.load_state_dict({name: tensor.detach().clone() for name, tensor in own.items()})

    ids_BL, mask_BL = rows_of_ids()
    expected = theirs(ids_BL)[0]
    found = ours.logits(ours.hidden(ours.embed(ids_BL), ids_BL, mask_BL))
    assert (found - expected)[mask_BL].abs().max() < 2e-4 < expected.abs().max()
    found[mask_BL].logsumexp(-1).sum().backward()
    expected[mask_BL].logsumexp(-1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.network.named_parameters()}
    for name, parameter in theirs.named_parameters():
        name = name.removeprefix("mixins.chatglm-final.")
        gradient = head_by_head(parameter.grad, 4) if "query_key_value" in name else parameter.grad
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())


# --------------------------------------------------------------------------------------------- cache, sizes, manners


def test_padding_and_neighbours_change_nothing(pieces: Path) -> None:
    llm = small_chatglm(pieces)
    ids_BL, mask_BL = rows_of_ids()
    together = llm.hidden(llm.embed(ids_BL), ids_BL, mask_BL)
    for row in range(len(ids_BL)):
        alone_1L = ids_BL[row : row + 1, : int(mask_BL[row].sum())]
        expected = llm.hidden(llm.embed(alone_1L), alone_1L, torch.ones_like(alone_1L, dtype=torch.bool))
        assert torch.allclose(together[row : row + 1, : alone_1L.shape[1]], expected, atol=1e-4)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)])
def test_cached_steps_equal_the_whole(pieces: Path, rows: slice) -> None:
    llm = small_chatglm(pieces)
    ids_BL, mask_BL = (tensor[rows] for tensor in rows_of_ids())
    new_BN = torch.tensor([[40, 41, 42]]).repeat(len(ids_BL), 1) + torch.arange(len(ids_BL))[:, None]
    last_BD, cache = llm.prefill(llm.embed(ids_BL), ids_BL, mask_BL, room=3)
    steps = [last_BD] + [llm.extend(new_BN[:, step], cache) for step in range(3)]
    for row in range(len(ids_BL)):
        whole_1L = torch.cat([ids_BL[row][mask_BL[row]], new_BN[row]])[None]
        expected = llm.hidden(llm.embed(whole_1L), whole_1L, torch.ones_like(whole_1L, dtype=torch.bool))[0, -4:]
        assert torch.allclose(torch.stack([step[row] for step in steps]), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_angles_are_positions_times_frequencies_of_the_precision_it_was_trained_in(dtype: torch.dtype) -> None:
    place_block = torch.tensor([[[0, 1, 500, 900], [0, 0, 3, 7]]])
    frequency = (1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)).to(dtype).double()
    expected = torch.stack([place_block[0, kind, :, None] * frequency for kind in (0, 1)], dim=1)
    cos, sin = rotation(place_block, 16, dtype, torch.float32)
    torch.testing.assert_close(cos[0, :, 0], torch.cat([expected] * 2, -1).cos().float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, :, 0], torch.cat([expected] * 2, -1).sin().float(), atol=1e-4, rtol=0)


def test_queries_and_keys_turn_and_the_gradient_turns_back() -> None:
    """As complex numbers: the first half of a half is the real part, the second the imaginary one."""
    x = torch.randn(2, 3, 4, 2, 16, dtype=torch.float64, requires_grad=True)
    cos_sin = rotation(torch.tensor([[[0, 7, 29], [0, 1, 2]], [[3, 3, 3], [1, 5, 11]]]), 16, torch.float16, x.dtype)
    angle = torch.complex(*cos_sin[..., :4].unbind(0))[:, :, :, None]

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        there = torch.complex(*x.unflatten(-1, (2, 2, 4)).unbind(-2)) * angle
        return torch.stack([there.real, there.imag], dim=-2).flatten(-3)

    found, gradient = rotate(x, cos_sin), torch.randn_like(x)
    torch.testing.assert_close(found, turned(x, angle))
    found.backward(gradient)
    torch.testing.assert_close(x.grad, turned(gradient, angle.conj()))


def test_the_mask_as_attention_adds_it() -> None:
    mask = torch.rand(2, 1, 5, 13) < 0.5
    bias = as_bias(mask, torch.bfloat16)
    assert torch.equal(bias == 0, mask) and torch.equal(bias == -float("inf"), ~mask)
    assert bias.shape == mask.shape and all(stride % 8 == 0 for stride in bias.stride()[:-1]), "or it is copied"


def test_activations_recomputed_give_the_same_gradient(pieces: Path) -> None:
    ids_BL, mask_BL = rows_of_ids()
    gradients = []
    for recompute in (False, True):
        llm = small_chatglm(pieces, checkpoint_activations=recompute).train()
        calls: list[int] = []
        llm.layers[1].mlp.dense_h_to_4h.register_forward_hook(lambda *_, c=calls: c.append(1))  # type: ignore[union-attr, operator]
        llm.hidden(llm.embed(ids_BL), ids_BL, mask_BL)[mask_BL].sum().backward()
        gradients.append(llm.network.get_parameter("transformer.layers.0.mlp.dense_h_to_4h.weight").grad)
        assert len(calls) == 1 + recompute
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0  # type: ignore[arg-type]


def test_full_size_on_the_meta_device() -> None:
    network = sat_network.build(
        hidden_size=4096, num_layers=28, num_heads=32, inner_size=16384, vocab_size=130528, device="meta"
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == 6_707_929_088
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_a_small_vocabulary_is_on_the_device_too() -> None:
    """SAT makes its embedding in another way below 1000 words, on the CPU and filled."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_size": 16, "vocab_size": 99}
    network = sat_network.build(**sizes, device="meta", dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.bfloat16)}


def test_building_leaves_no_trace() -> None:
    def states() -> list[Any]:
        switches = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), switches]

    before = states()
    sat_network.build(
        hidden_size=16, num_layers=1, num_heads=2, inner_size=16, vocab_size=1000, device="meta", initial_std=None
    )
    assert states() == before and not torch.distributed.is_initialized()


def test_random_weights_follow_torchs_seed() -> None:
    first, same, other = (small_chatglm(None, seed=seed).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_every_linear_map_is_an_ordinary_one() -> None:
    llm: ChatGLM = small_chatglm(None)
    for name, module in llm.network.named_modules():
        if hasattr(module, "weight") and not isinstance(module, nn.LayerNorm):
            assert type(module) in (nn.Linear, nn.Embedding), name
    targets = {name.split(".")[-1] for name, module in llm.layers.named_modules() if isinstance(module, nn.Linear)}
    assert set(llm.lora_targets) == targets


def test_sat_is_not_imported_before_it_is_needed() -> None:
    code = "import model.llm.chatglm, model.llm.base, sys; print('sat' in sys.modules, 'deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_sizes_that_cannot_be(pieces: Path) -> None:
    with pytest.raises(ValueError, match="has ids up to .*, model.llm.vocab_size is 32"):
        small_chatglm(pieces, vocab_size=32)
    with pytest.raises(ValueError, match="needs a tokenizer, or ids"):
        small_chatglm(None, ids={"bos": 1})
    with pytest.raises(ValueError, match="multiple of 4 x num_heads"):
        small_chatglm(None, hidden_size=36)
    assert codec_of(small_chatglm(pieces)).num_image_tokens == 5


def test_a_tokenizer_of_ones_own(tmp_path: Path, codec: ChatGLMCodec) -> None:
    texts = ["问：描述\t这张图片。\n答：红色的圆", "Q:Describe  the image.\nA:A red circle"]
    files = [pieces_of_text(texts, tmp_path / name / "ice_text.model") for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    made = ChatGLMCodec(files[0].parent, num_image_tokens=5)
    assert {role: made.ids[role] for role in ("pad", "bos", "gmask")} == {"pad": 3, "bos": SOP - 1, "gmask": GMASK}
    for text in (*texts, "答：Describe\n\n红色 的    圆"):
        assert made.decode([*made.pieces.encode(text), *made.stop_ids]) == text
    blank = codec.pieces.id_of("<|blank_2|>")
    assert blank in codec.pieces.encode("a  b") and blank not in codec.pieces.encode("a b")
    assert codec.pieces.encode("\n") == codec.pieces.encode("<n>") and len(codec.pieces.encode("a\tb")) < 6


def pieces_of_text(texts: list[str], path: Path) -> Path:
    return train_pieces_of(texts, path, vocab_size=80, special=SPECIAL.values())


def test_peft_wraps_it_in_place_and_reads_what_it_saved(pieces: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    ids_BL, mask_BL = rows_of_ids()

    def logits(llm: ChatGLM) -> Tensor:
        return llm.logits(llm.hidden(llm.embed(ids_BL), ids_BL, mask_BL))[mask_BL]

    llm = small_chatglm(pieces)
    before = logits(llm)
    config = LoraConfig(r=2, target_modules=list(llm.lora_targets), layers_to_transform=[0, 2], layers_pattern="layers")
    wrapped = get_peft_model(llm.network, config)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(llm), before)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    expected = logits(llm)
    assert (expected - before).abs().max() > 0.1
    wrapped.save_pretrained(str(tmp_path))

    stored = load_file(tmp_path / "adapter_model.safetensors")
    place = "base_model.model.transformer.layers.{}.attention.query_key_value.lora_B.weight"
    assert {place.format(0), place.format(2)} <= stored.keys() and place.format(1) not in stored
    again = small_chatglm(pieces)
    PeftModel.from_pretrained(again.network, str(tmp_path))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(again), expected)
    wrapped.merge_and_unload()
    torch.testing.assert_close(logits(llm), expected, atol=1e-3, rtol=1e-3)
