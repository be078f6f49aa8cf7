"""ChatGLM2, ChatGLM3 and GLM-4: the published layouts, transformers' numbers, cache, full sizes, no foreign code."""

from __future__ import annotations

import inspect
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from data.batch import IGNORED, Dialogue, DialogueBatch, Turn
from model.generation import Decoding
from model.llm.chatglm2 import ChatGLM2Codec
from model.llm.chatglm3 import ChatGLM3Codec
from model.llm.glm4 import GLM4Codec
from model.llm.glm_codec import GlmCodec
from tests.model.glm_common import BUILD, GLM4_SPECIAL, small_glm, train_byte_pairs, train_sentencepieces, visual_chat

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model" / "llm"
FAMILIES = ["chatglm2", "chatglm3", "glm4"]
CODECS = {"chatglm2": ChatGLM2Codec, "chatglm3": ChatGLM3Codec, "glm4": GLM4Codec}
ANSWERS = ["红色", "A red circle\non the left  of", "两个"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizers")
    train_sentencepieces(made / "tokenizer.model")
    train_byte_pairs(made / "tokenizer.json")
    return made


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def codec(family: str, folder: Path) -> GlmCodec:
    return CODECS[family](folder, num_image_tokens=5)


def dialogue(*turns: tuple[Any, ...], language: str = "zh") -> Dialogue:
    return Dialogue(tuple(Turn(*turn) for turn in turns), language)


def sentencepiece(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# ------------------------------------------------------------------------------------------------------- the layout


def test_chatglm2_as_its_folder_and_its_fine_tuning_lay_it_out(folder: Path) -> None:
    """`build_prompt`, `build_inputs_with_special_tokens`; `ptuning/main.py`: a + b + [eos], labels on b and eos."""
    model = sentencepiece(folder)
    size = model.vocab_size()
    prompt = "[Round 1]\n\n问：图片\n\n答：红色\n\n[Round 2]\n\n问：描述\n它\n\n答："
    a = [size + 1, size + 3, *model.encode(prompt)]  # [MASK] [gMASK] [sMASK] sop eop follow the pieces
    b = [*model.encode("两个"), model.eos_id()]
    found = codec("chatglm2", folder).encode(dialogue(("图片", "红色"), ("描述\n它", "两个")))
    assert found.ids == (*a, *b)
    assert found.labels == (*[IGNORED] * len(a), *b)


def test_chatglm3_as_its_folder_and_its_fine_tuning_lay_it_out(folder: Path) -> None:
    """`build_chat_input`; `finetune_demo`: labels on what follows <|assistant|>, up to the next <|user|> or </s>."""
    model = sentencepiece(folder)
    size = model.vocab_size()
    user, assistant = size + 6, size + 7
    line_break = model.encode("\n")
    asked = [size + 1, size + 3, user, *line_break, *model.encode("图片"), assistant]
    first, second = [*line_break, *model.encode("红色"), user], [*line_break, *model.encode("两个"), model.eos_id()]
    again = [*line_break, *model.encode("描述"), assistant]
    found = codec("chatglm3", folder).encode(dialogue(("图片", "红色"), ("描述", "两个")))
    assert found.ids == (*asked, *first, *again, *second)
    assert found.labels == (*[IGNORED] * len(asked), *first, *[IGNORED] * len(again), *second)
    assert len(line_break) > 1, "sentencepiece puts its own mark before a line break, as in ChatGLM3's"


def test_glm4_as_its_folder_and_its_fine_tuning_lay_it_out(folder: Path) -> None:
    """`build_single_message`, pictures as glm-4v-9b; `finetune_demo`: as ChatGLM3, the last answer ends in <|user|>."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(*parts: str) -> list[int]:
        return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids]

    asked = ids("[gMASK]", "<sop>", "<|user|>", "\n", "<|begin_of_image|>")
    picture = ids("<|endoftext|>") * 5
    asked_on = ids("<|end_of_image|>", "图片", "<|assistant|>")
    first, again = ids("\n", "红色", "<|user|>"), ids("\n", "描述", "<|assistant|>")
    second = ids("\n", "两个", "<|user|>")
    found = codec("glm4", folder).encode(dialogue(("图片", "红色", 1), ("描述", "两个")))
    assert found.ids == (*asked, *picture, *asked_on, *first, *again, *second)
    silent = [IGNORED] * (len(asked) + 5 + len(asked_on))
    assert found.labels == (*silent, *first, *[IGNORED] * len(again), *second)
    assert found.image_starts == (len(asked),)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_training_and_chat_have_one_layout(family: str, folder: Path, num_images: int) -> None:
    made = codec(family, folder)
    past = ("图片", "红色", num_images), ("what is", "blue", 1)
    chat = made.encode(dialogue(*past, ("Describe", "", 1)))
    training = made.encode(dialogue(*past, ("Describe", "A red circle", 1)))
    answer = training.ids[len(chat.ids) :]
    assert training.ids[: len(chat.ids)] == chat.ids and training.labels[: len(chat.ids)] == chat.labels
    assert training.labels[len(chat.ids) :] == answer and made.decode(answer) == "A red circle"
    assert training.image_starts == chat.image_starts and len(chat.image_starts) == num_images + 2
    assert answer[-1] in made.stop_ids and not set(answer[:-1]) & set(made.stop_ids)
    learnt = [label for label in chat.labels if label != IGNORED]
    assert (len(learnt) > 0) == made.trains_every_turn


def test_pictures_stand_before_the_words_of_their_turn(family: str, folder: Path) -> None:
    made = codec(family, folder)
    without, found = (made.encode(dialogue(("描述", "红色"), ("三", "", count))) for count in (0, 2))
    before, after = made.image_marks
    pictures = [*before, *[made.pad_id] * 5, *after] * 2
    start = found.image_starts[0] - len(before)
    assert found.ids[start : start + len(pictures)] == tuple(pictures)
    assert found.image_starts[1] - found.image_starts[0] == len(pictures) // 2
    assert all(found.ids[i : i + 5] == (made.pad_id,) * 5 for i in found.image_starts)
    assert made.pieces.decode(found.ids[start + len(pictures) :]).strip().startswith("三")
    assert found.ids[:10] == without.ids[:10]


@pytest.mark.parametrize("name", [*GLM4_SPECIAL, "sop", "eop", "</s>", "<unk>", "<s>"])
def test_nobody_writes_a_special_token(family: str, folder: Path, name: str) -> None:
    made = codec(family, folder)
    plain = made.encode(dialogue(("描述", "红色")))
    found = made.encode(dialogue((f"描述{name}", f"红色{name}{name}")))
    special = [*made.special.values(), made.pad_id]
    assert [found.ids.count(token) for token in special] == [plain.ids.count(token) for token in special]


@pytest.mark.parametrize("answer", ANSWERS)
def test_decoding_gives_the_answer_back(family: str, folder: Path, answer: str) -> None:
    made = codec(family, folder)
    chat, whole = (made.encode(dialogue(("图片", text))) for text in ("", answer))
    ids = [*whole.ids[len(chat.ids) :], *made.pieces.encode("more"), made.pad_id]
    assert made.decode(ids) == answer
    copy = pickle.loads(pickle.dumps(made))  # workers of a loader hold one
    assert copy.encode(dialogue(("<|user|>[gMASK]", answer, 1))) == made.encode(
        dialogue(("<|user|>[gMASK]", answer, 1))
    )


def test_what_is_too_long_gives_way_in_order(family: str, folder: Path) -> None:
    made = codec(family, folder)
    long = dialogue(("图片", "红色", 1), ("内容", "蓝色"), ("描述这张图片。" * 4, "两个绿色的三角形"))
    whole = made.encode(long)
    least = made.encode(dialogue(("", "", 1))).ids
    shortest = len(least)
    for limit in (shortest + 2, shortest + 12, len(whole.ids) - 1):
        cut = made.encode(long, max_tokens=limit)
        assert len(cut.ids) <= limit and len(cut.image_starts) == 1 and cut.num_cut["history"] > 0
        num_kept = [label == IGNORED for label in reversed(cut.labels)].index(True)
        assert num_kept > 0 and cut.ids[-num_kept - 1] == least[-1], "the words between question and answer stay"
    with pytest.raises(ValueError, match="leave no room"):
        made.encode(long, max_tokens=shortest)


def test_ids_come_from_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = train_byte_pairs(tmp_path / "tokenizer.json", special=[name for name in GLM4_SPECIAL if "image" not in name])
    made = GLM4Codec(bare, num_image_tokens=5)
    assert made.image_marks == (made.pieces.encode("<img>"), made.pieces.encode("</img>"))
    train_byte_pairs(tmp_path / "other.json", special=["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"no token \[gMASK\]: it is not the tokenizer of GLM-4"):
        GLM4Codec(tmp_path / "other.json", num_image_tokens=5)
    with pytest.raises(ValueError, match="take the tokenizer.json of glm-4-9b-chat-hf"):
        GLM4Codec(tmp_path / "nowhere", num_image_tokens=5)
    with pytest.raises(ValueError, match="there is no sentencepiece model"):
        ChatGLM2Codec(tmp_path, num_image_tokens=5)
    with pytest.raises(ValueError, match="has ids up to .*, model.llm.vocab_size is 32"):
        small_glm("chatglm3", folder, vocab_size=32)


# ------------------------------------------------------------------------------------------------------ the network


def rows_of_ids() -> tuple[Tensor, Tensor]:
    """Three rows of unequal lengths, padded on the right."""
    ids_BL = torch.randint(10, 500, (3, 12), generator=torch.Generator().manual_seed(2))
    return ids_BL, torch.arange(12) < torch.tensor([12, 7, 9])[:, None]


def test_hidden_states_are_those_of_transformers(family: str) -> None:
    llm = small_glm(family)
    ids_BL, mask_BL = rows_of_ids()
    expected = llm.network(input_ids=ids_BL, attention_mask=mask_BL.long()).logits
    found = llm.logits(llm.hidden(llm.embed(ids_BL), ids_BL, mask_BL))
    torch.testing.assert_close(found[mask_BL], expected[mask_BL], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_token_by_token_gives_the_same_as_all_at_once(family: str, padded: bool) -> None:
    llm = small_glm(family, **({"rope_interpolation": 2.0} if family == "chatglm2" else {"rope_ratio": 3.0}))
    ids_BL, mask_BL = rows_of_ids()
    mask_BL = mask_BL if padded else torch.ones_like(mask_BL)
    new_BN = torch.randint(10, 500, (3, 3), generator=torch.Generator().manual_seed(3))
    last_BD, cache = llm.prefill(llm.embed(ids_BL), ids_BL, mask_BL, room=3)
    steps = [last_BD] + [llm.extend(new_BN[:, step], cache) for step in range(3)]
    for row in range(len(ids_BL)):
        whole_1L = torch.cat([ids_BL[row][mask_BL[row]], new_BN[row]])[None]
        expected = llm.hidden(llm.embed(whole_1L), whole_1L, torch.ones_like(whole_1L, dtype=torch.bool))[0, -4:]
        torch.testing.assert_close(torch.stack([step[row] for step in steps]), expected, atol=1e-4, rtol=1e-4)


def test_a_frozen_network_recomputes_its_activations_too() -> None:
    """The gradient of what stands before it, in eval mode, as a frozen part is kept."""
    ids_BL, mask_BL = rows_of_ids()
    gradients, saved = [], []
    for recompute in (False, True):
        llm = small_glm("chatglm3", frozen=True, checkpoint_activations=recompute).eval()
        embedded_BLD = llm.embed(ids_BL).detach().requires_grad_()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            llm.hidden(embedded_BLD, ids_BL, mask_BL)[mask_BL].sum().backward()
        gradients.append(embedded_BLD.grad)
        saved.append(sum(sizes))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0  # type: ignore[arg-type, union-attr]
    assert saved[1] < saved[0] / 2


def test_bfloat16_and_memory_that_comes_later_leave_the_angles_alone() -> None:
    ids_BL, mask_BL = rows_of_ids()
    whole = small_glm("glm4", dtype="float64")
    expected = whole.hidden(whole.embed(ids_BL), ids_BL, mask_BL)
    there = small_glm("glm4", device="meta", dtype="float64", initial_std=None)
    there.to_empty(device="cpu")
    there.load_state_dict(whole.state_dict())
    assert torch.equal(there.hidden(there.embed(ids_BL), ids_BL, mask_BL), expected)
    rounded = whole.bfloat16().double()
    long_BL = torch.randint(10, 500, (1, 300), generator=torch.Generator().manual_seed(4))
    again = small_glm("glm4", dtype="float64")
    again.load_state_dict(rounded.state_dict())
    ones_BL = torch.ones_like(long_BL, dtype=torch.bool)
    found, expected = (llm.hidden(llm.embed(long_BL), long_BL, ones_BL) for llm in (rounded, again))
    assert torch.equal(found, expected)


def test_autocast_as_stage_two_trains() -> None:
    llm = small_glm("chatglm3", frozen=True, dtype="bfloat16")
    ids_BL, mask_BL = rows_of_ids()
    embedded_BLD = llm.embed(ids_BL).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BLD = llm.hidden(embedded_BLD, ids_BL, mask_BL)
        with torch.no_grad():
            last_BD, cache = llm.prefill(embedded_BLD, ids_BL, mask_BL, room=2)
            more_BD = llm.extend(ids_BL[:, 0], cache)
    hidden_BLD.sum().backward()
    assert embedded_BLD.grad is not None and embedded_BLD.grad.isfinite().all()
    torch.testing.assert_close(last_BD[0], hidden_BLD[0, -1].detach(), atol=0.05, rtol=0.05)
    assert more_BD.isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("chatglm2_6b", 6_243_584_000), ("chatglm3_6b", 6_243_584_000), ("glm4_9b", 9_399_951_360)],
)
def test_full_size_on_the_meta_device(name: str, expected: int) -> None:
    """Words and head 2VD + blocks (D + joint) etc.: the sums over the published configs, visualglm.md 2.11."""
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))
    llm = instantiate(node, tokenizer=None, device="meta")
    width, inner, joint = 4096, 13696, 4096 + 2 * 2 * 128
    block = (width + 1) * joint + width * width + 3 * width * inner + 2 * width
    by_hand = 2 * node["vocab_size"] * width + node["num_layers"] * block + width
    assert sum(parameter.numel() for parameter in llm.parameters()) == by_hand == expected
    assert {parameter.device.type for parameter in llm.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert not any(buffer.is_meta for buffer in llm.buffers())


def test_random_weights_follow_torchs_seed() -> None:
    first, same, other = (small_glm("chatglm2", seed=seed).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert abs(float(first["lm_head.weight"].std()) - 0.3) < 0.01


def test_every_word_can_learn(family: str) -> None:
    """Also the one that pads: its embedding is a word's in ChatGLM2 and ChatGLM3 (<unk>)."""
    llm = small_glm(family)
    llm.embed(torch.tensor([[0, 7]])).sum().backward()
    gradient = llm.network.get_parameter("model.embed_tokens.weight").grad
    assert gradient is not None and gradient.sum(dim=1).nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize(("family", "rope"), [("chatglm2", "interpolation"), ("chatglm3", "ratio"), ("glm4", "ratio")])
def test_a_family_takes_its_own_word_for_the_rope_and_no_other(family: str, rope: str) -> None:
    """Configs are held to this signature; a rope_ratio taken for a base by ChatGLM2 would be wrong in silence."""
    parameters = inspect.signature(BUILD[family]).parameters
    assert {name for name in parameters if "rope" in name} == {f"rope_{rope}"}
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    assert typing.get_type_hints(BUILD[family])["initial_std"] == float | None
    for wrong in {"rope_interpolation", "rope_ratio", "rope_base", "widht"} - {f"rope_{rope}"}:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            small_glm(family, **{wrong: 2.0})


def test_adapters_find_every_linear_map_of_a_block() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    llm = small_glm("glm4", frozen=True)
    linear = [name for name, module in llm.network.named_modules() if type(module) is nn.Linear]
    wanted = [name for name in linear if name.startswith("model.layers.1.")]
    assert {name.split(".")[-1] for name in wanted} == set(llm.lora_targets) and len(linear) == 3 * 6 + 1
    config = LoraConfig(r=2, target_modules=list(llm.lora_targets), layers_to_transform=[1], layers_pattern="layers")
    inject_adapter_in_model(config, llm.network)
    found = {name.split(".lora_")[0] for name, p in llm.named_parameters() if p.requires_grad}
    assert found == {f"network.{name}" for name in wanted}


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="num_kv_heads=3 has to divide num_heads=4"):
        small_glm("chatglm2", num_kv_heads=3)
    with pytest.raises(ValueError, match="head_size=6 has to be a multiple of 4"):
        small_glm("chatglm2", head_size=6)


# -------------------------------------------------------------------------------------------------------- stage two


def collate(made: GlmCodec, dialogues: list[Dialogue]) -> DialogueBatch:
    generator = torch.Generator().manual_seed(5)
    images = [[torch.rand(3, 28, 28, generator=generator) for _ in range(d.num_images)] for d in dialogues]
    batch = DialogueBatch.collate(
        [made.encode(d) for d in dialogues],
        images,
        pad_id=made.pad_id,
        image_size=28,
        language_of=["zh"] * len(dialogues),
        languages=("zh",),
    )
    return batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=batch.text_length)


def test_what_is_trained_is_what_answers(family: str, folder: Path) -> None:
    """Several pictures in a conversation: the logits of training, one token at a time in chat."""
    llm = small_glm(family, folder, frozen=True)
    model, made = visual_chat(llm), codec(family, folder)
    asked = [("图片", "红色", 2), ("描述", "", 1)], [("图片", "")], [("What", "", 1)]
    trained = [
        dialogue(*turns[:-1], (*turns[-1][:1], text, *turns[-1][2:]))
        for turns, text in zip(asked, ANSWERS, strict=True)
    ]
    batch = collate(made, trained)
    prediction = model.predict(batch)
    chat = collate(made, [dialogue(*turns) for turns in asked])
    last_BD, cache = llm.prefill(model.embed(chat), chat.ids_BL, chat.mask_BL, room=30)
    answers = [batch.ids_BL[row, int(chat.mask_BL[row].sum()) : int(batch.mask_BL[row].sum())] for row in range(3)]
    found = [llm.logits(last_BD)]
    for step in range(max(map(len, answers)) - 1):
        found.append(llm.logits(llm.extend(torch.stack([a[min(step, len(a) - 1)] for a in answers]), cache)))
    for row, answer in enumerate(answers):
        expected = prediction.logits_TV[prediction.row_T == row][-len(answer) :]
        torch.testing.assert_close(torch.stack(found)[: len(answer), row], expected, atol=1e-4, rtol=1e-4)
    said_BN = model.generate(chat, Decoding(max_new_tokens=4))
    assert torch.equal(said_BN[:, 0], found[0].argmax(dim=-1))
