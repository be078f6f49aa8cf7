"""Answers from the cache against plain loops without one; sampling against transformers' own processors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import Dialogue, Turn
from model.generation import Decoding, Generation, GrowingText, draw, generate, penalise, restrict
from model.llm.base import LanguageModel
from tests.model.glm_common import small_glm, train_byte_pairs, train_sentencepieces
from tests.model.llm_common import small_chatglm, train_pieces

PROMPTS = ["描述这张图片。", "What is in the picture? A red circle on the left.", "Q", "这张图片的背景里有什么内容？圆"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "chatglm": train_pieces(folder / "ice_text.model"),
        "chatglm2": train_sentencepieces(folder / "tokenizer.model"),
        "chatglm3": folder / "tokenizer.model",
        "glm4": train_byte_pairs(folder / "tokenizer.json"),
    }


@pytest.fixture(scope="module")
def models(tokenizers: dict[str, Path]) -> dict[str, LanguageModel]:
    found: dict[str, LanguageModel] = {name: small_glm(name, tokenizers[name]).eval() for name in ("chatglm3", "glm4")}
    return {**found, "chatglm": small_chatglm(tokenizers["chatglm"])}


def prompts(llm: LanguageModel, texts: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """ids_BL, mask_BL of questions, of which the second has a picture (whose embedding stays that of its id)."""
    assert llm.codec is not None
    rows = [llm.codec.encode(Dialogue((Turn(text, num_images=n == 1),), "zh")).ids for n, text in enumerate(texts)]
    length_B = torch.tensor([len(row) for row in rows])
    mask_BL = torch.arange(int(length_B.max())) < length_B[:, None]
    ids_BL = torch.full(mask_BL.shape, llm.codec.pad_id)
    ids_BL[mask_BL] = torch.tensor([token for row in rows for token in row])
    return ids_BL, mask_BL


def say(llm: LanguageModel, ids_BL: Tensor, mask_BL: Tensor, how: Any, **more: Any) -> list[list[int]]:
    """Each row's answer up to its end."""
    assert llm.codec is not None
    said_BN = generate(llm, llm.embed(ids_BL), ids_BL, mask_BL, how, **more)
    limits = [one.max_new_tokens for one in (how if isinstance(how, list) else [how] * len(ids_BL))]
    return [until(row[:limit], llm.codec.stop_ids) for row, limit in zip(said_BN.tolist(), limits, strict=True)]


def until(row: Sequence[int], stop: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop), len(row))
    return list(row[: end + 1])


def next_logits(llm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Without a cache.  -> (1, V)"""
    ids_1L = torch.tensor([ids])
    with torch.no_grad():
        hidden_1LD = llm.hidden(llm.embed(ids_1L), ids_1L, torch.ones_like(ids_1L, dtype=torch.bool))
        return llm.logits(hidden_1LD[:, -1])


def processors(how: Decoding) -> list[Any]:
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found: list[Any] = []
    if how.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    if how.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        found.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        found.append(TopPLogitsWarper(how.top_p))
    return found


def alone(llm: LanguageModel, prompt: Sequence[int], how: Decoding) -> list[int]:
    """One row, no cache, transformers' processors, the draw spelt out."""
    assert llm.codec is not None
    left_out = {llm.codec.pad_id, *llm.codec.stop_ids}
    words = [token for token in prompt if token not in left_out]
    uniform = torch.rand(
        how.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(how.seed or 0)
    )
    said: list[int] = []
    while len(said) < how.max_new_tokens and not set(said) & set(llm.codec.stop_ids):
        logits_1V = next_logits(llm, [*prompt, *said])
        for processor in processors(how):
            logits_1V = processor(torch.tensor([[*words, *said]]), logits_1V)
        probabilities = logits_1V[0].double().softmax(dim=0).tolist()
        target = float(uniform[len(said)]) * sum(probabilities)
        drawn = next(n for n, total in enumerate(itertools.accumulate(probabilities)) if total > target)
        said.append(drawn if how.temperature > 0 else int(logits_1V.argmax()))
    return said


EVERY_WAY = [
    Decoding(12),
    Decoding(12, temperature=1.0, seed=1),
    Decoding(12, temperature=0.7, seed=2),
    Decoding(9, temperature=1.0, top_k=3, seed=3),
    Decoding(12, temperature=1.0, top_p=0.6, seed=4),
    Decoding(12, temperature=1.3, top_k=20, top_p=0.8, repetition_penalty=1.2, seed=5),
    Decoding(12, repetition_penalty=1.5),
    Decoding(5, temperature=2.0, top_p=0.0, seed=6),
]


@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_every_row_of_a_batch_says_what_it_says_alone_without_a_cache(
    models: dict[str, LanguageModel], family: str
) -> None:
    llm = models[family]
    ids_BL, mask_BL = (tensor.repeat(2, 1) for tensor in prompts(llm))
    assert len({int(n) for n in mask_BL.sum(dim=1)}) > 2
    found = say(llm, ids_BL, mask_BL, EVERY_WAY)
    expected = [alone(llm, ids_BL[row][mask_BL[row]].tolist(), how) for row, how in enumerate(EVERY_WAY)]
    assert found == expected
    assert len({tuple(row) for row in found}) == len(found), "the answers ought to differ"


def test_a_cache_that_grows_on_the_way(models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = models["chatglm"]
    ids_BL, mask_BL = prompts(llm)
    expected = say(llm, ids_BL, mask_BL, Decoding(12)), say(llm, ids_BL, mask_BL, Decoding(12, num_beams=2))
    monkeypatch.setattr("model.llm.chatglm.CHUNK", 3)
    assert (say(llm, ids_BL, mask_BL, Decoding(12)), say(llm, ids_BL, mask_BL, Decoding(12, num_beams=2))) == expected


@pytest.mark.parametrize(
    "how",
    [
        Decoding(temperature=1, top_k=5),
        Decoding(temperature=1, top_p=0.5),
        Decoding(temperature=1, top_p=0.97),
        Decoding(temperature=1, top_k=7, top_p=0.9),
        Decoding(temperature=1, top_k=1000),
    ],
)
def test_what_may_be_drawn_is_what_transformers_leaves(how: Decoding) -> None:
    """SAT looks at top_p only where top_k is set, and changes its logits in place (`base_strategy.py:22-48`)."""
    torch.manual_seed(0)
    logits_BV = 3 * torch.randn(6, 400)
    before = logits_BV.clone()
    expected = logits_BV
    for processor in processors(how):
        expected = processor(torch.zeros(6, 0, dtype=torch.int64), expected.clone())
    found = restrict(logits_BV, torch.full((6,), how.top_k), torch.full((6,), how.top_p))
    assert torch.equal(found, expected) and torch.equal(logits_BV, before)


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    logits_V = torch.tensor([0.0, 2.0, float("-inf"), 1.0])
    uniform_B = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    drawn_B = draw(logits_V.expand(10000, -1), uniform_B)
    expected = 10000 * logits_V.softmax(dim=0)
    assert (torch.bincount(drawn_B, minlength=4) - expected).abs().max() <= 1
    assert draw(logits_V[None], torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-7])
def test_next_to_no_temperature_is_none(models: dict[str, LanguageModel], temperature: float) -> None:
    """Logits over 1e-38 alone would be infinite, and their softmax no number."""
    llm = next(iter(models.values()))
    ids_BL, mask_BL = prompts(llm)
    drawn = say(llm, ids_BL, mask_BL, Decoding(12, temperature=temperature, seed=1))
    assert drawn == say(llm, ids_BL, mask_BL, Decoding(12))


def test_repeating_is_never_rewarded() -> None:
    """SAT divides negative logits too, which makes them larger (`base_strategy.py:82-87`)."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_BV = torch.tensor([[-2.0, -1.0, 1.0, 3.0], [4.0, -4.0, 0.0, 1.0]])
    seen_BV = torch.tensor([[True, False, True, False], [True, True, False, False]])
    found = penalise(logits_BV, seen_BV, torch.tensor([1.5, 1.5]))
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 2], [0, 1]]), logits_BV.clone())
    torch.testing.assert_close(found, expected)
    assert (found[seen_BV] < logits_BV[seen_BV]).all() and torch.equal(found[~seen_BV], logits_BV[~seen_BV])


# ----------------------------------------------------------------------------------------- where an answer ends


class Scripted(LanguageModel):
    """Says what it is told to: `table[token]` are the logits after a token; a prompt's last token counts."""

    def __init__(self, table_VV: Tensor, *, stop: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.table_VV, self.vocab_size, self.width = table_VV, len(table_VV), 1
        self.codec = type("Codec", (), {"pad_id": 0, "stop_ids": tuple(stop)})()
        self.num_extends = 0

    def embed(self, ids_BL: Tensor) -> Tensor:
        return ids_BL[..., None].float()

    def hidden(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return embedded_BLD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return self.table_VV[hidden_TD[:, 0].long()]

    def prefill(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor, *, room: int) -> tuple[Tensor, Any]:
        return embedded_BLD[torch.arange(len(ids_BL)), mask_BL.sum(dim=1) - 1], None

    def extend(self, ids_B: Tensor, cache: Any) -> Tensor:
        self.num_extends += 1
        return self.embed(ids_B)

    def select(self, cache: Any, row_S: Tensor) -> None: ...


def chain(*steps: tuple[int, int], size: int = 12) -> Tensor:
    """Logits by which one token follows another."""
    table = torch.zeros(size, size)
    for here, there in steps:
        table[here, there] = 5.0
    return table


def test_an_answer_ends_at_its_stop_id_or_its_own_limit_and_padding_follows() -> None:
    llm = Scripted(chain((5, 6), (6, 1), (7, 1), (8, 9), (9, 8)))
    ids_BL = torch.tensor([[5], [7], [8], [8]])
    how = [Decoding(9), Decoding(9), Decoding(4), Decoding(2)]
    found = generate(llm, llm.embed(ids_BL), ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), how)
    expected = [[6, 1, 0, 0], [1, 0, 0, 0], [9, 8, 9, 8], [9, 8, 0, 0]]
    assert found.tolist() == expected and llm.num_extends == 3
    everywhere = generate(
        llm, llm.embed(ids_BL), ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), how, never_early=True
    )
    assert everywhere.tolist() == expected and llm.num_extends == 3 + 8, "ranks that share weights take every step"


def test_limits_are_of_the_answer_whatever_the_prompts_length() -> None:
    """VisualGLM's `max_length` and `min_length` count prompt and image tokens: a long prompt ends in an IndexError
    (`chat.py:135`), and how long an answer is forced depends on the prompt (Hugging Face `chat`, min_length=100)."""
    llm = Scripted(chain((5, 1), (0, 1)))  # wants to end at once, and says 0 where it may not
    ids_BL = torch.tensor([[5, 5, 5, 5, 5, 5, 5], [5, 0, 0, 0, 0, 0, 0]])
    mask_BL = torch.tensor([[True] * 7, [True] + [False] * 6])
    how = [Decoding(4, min_new_tokens=2), Decoding(4, min_new_tokens=3)]
    found = generate(llm, llm.embed(ids_BL), ids_BL, mask_BL, how)
    assert found.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    found = generate(llm, llm.embed(ids_BL), ids_BL, mask_BL, Decoding(3, min_new_tokens=2, num_beams=2))
    assert 1 not in found[:, :2]


def test_words_of_the_prompt_count_as_said_pictures_and_ends_do_not() -> None:
    llm = Scripted(torch.tensor([[1.0, 1.1, 1.2, 1.25, 0.0, 0.0]]).repeat(6, 1))
    ids_BL = torch.tensor([[3, 0, 0, 1, 5]])
    found = generate(llm, llm.embed(ids_BL), ids_BL, torch.ones_like(ids_BL, dtype=torch.bool),
                     Decoding(4, repetition_penalty=1.15))  # fmt: skip
    # 3 was in the question; then 2 is said and weighs less than the stop id 1, which stands in the prompt unpunished
    assert found.tolist() == [[2, 1, 0, 0][: found.shape[1]]]


def test_a_row_that_nobody_waits_for_leaves_the_others_alone() -> None:
    llm = Scripted(chain((5, 6), (6, 5)))
    ids_BL = torch.tensor([[5], [6]])
    running = Generation(llm, llm.embed(ids_BL), ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), Decoding(4))
    steps = []
    for step in running:
        steps.append(step)
        running.stop(0)
    assert steps == [[6, 5], [None, 6], [None, 5], [None, 6]]


def test_seeds_decide_and_without_one_torchs_own_does(models: dict[str, LanguageModel]) -> None:
    llm = models["chatglm"]
    ids_BL, mask_BL = (tensor[:1].repeat(3, 1) for tensor in prompts(llm))
    how = [Decoding(8, temperature=1.5, seed=seed) for seed in (7, 8, 7)]
    a, b, c = say(llm, ids_BL, mask_BL, how)
    assert a == c != b
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(say(llm, ids_BL, mask_BL, Decoding(8, temperature=1.5)))
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_that_overflowed_are_an_error_and_no_token(num_beams: int) -> None:
    llm = Scripted(chain((5, 6)).index_fill(0, torch.tensor([6]), float("nan")))
    ids_BL = torch.tensor([[5]])
    with pytest.raises(ValueError, match="not numbers.*bfloat16"):
        generate(
            llm, llm.embed(ids_BL), ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), Decoding(4, num_beams=num_beams)
        )


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search draws nothing"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number of 64 bits"),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Decoding(**wrong)


# ------------------------------------------------------------------------------------------------------- beam search


def plain_beams(llm: LanguageModel, prompt: Sequence[int], how: Decoding) -> list[int]:
    """Beam search as it is told in a sentence: no cache, no batch, lists; stops as transformers does."""
    assert llm.codec is not None
    stop, num_beams = llm.codec.stop_ids, how.num_beams
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for step in range(1, how.max_new_tokens + 1):
        candidates = []
        for score, said in beams:
            log_p = next_logits(llm, [*prompt, *said])[0].log_softmax(dim=0).tolist()
            candidates += [(score + log_p[token], [*said, token]) for token in range(len(log_p))]
        candidates.sort(key=lambda candidate: -candidate[0])
        for score, said in candidates[:num_beams]:
            if said[-1] in stop or step == how.max_new_tokens:
                finished.append((score / step**how.length_penalty, said))
        finished = sorted(finished, key=lambda answer: -answer[0])[:num_beams]
        beams = [c for c in candidates if c[1][-1] not in stop][:num_beams]
        if len(finished) == num_beams and beams[0][0] / step**how.length_penalty <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 3.0])
@pytest.mark.parametrize("family", ["chatglm", "glm4"])
def test_beams_equal_a_plain_search_row_by_row(
    models: dict[str, LanguageModel], family: str, length_penalty: float
) -> None:
    llm = models[family]
    ids_BL, mask_BL = prompts(llm)
    how = Decoding(5, num_beams=3, length_penalty=length_penalty)
    expected = [plain_beams(llm, ids_BL[row][mask_BL[row]].tolist(), how) for row in range(len(ids_BL))]
    assert say(llm, ids_BL, mask_BL, how) == expected
    assert expected != say(llm, ids_BL, mask_BL, Decoding(5)), "greedy ought to find other answers"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_stop_when_nothing_better_can_come(length_penalty: float) -> None:
    """Answers of many lengths, some rows done long before others."""
    ids_BL = torch.tensor([[2], [3], [4], [5]])
    lengths = set()
    for seed in range(12):
        torch.manual_seed(seed)
        llm = Scripted(1.5 * torch.randn(6, 6))
        how = Decoding(6, num_beams=2 + seed % 2, length_penalty=length_penalty)
        expected = [plain_beams(llm, row, how) for row in ids_BL.tolist()]
        assert say(llm, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), how) == expected
        lengths |= {len(answer) for answer in expected}
    assert len(lengths) > 3


def test_beams_equal_transformers(models: dict[str, LanguageModel]) -> None:
    llm: Any = models["chatglm3"]
    for text in PROMPTS:
        ids_BL, mask_BL = prompts(llm, [text])
        with torch.no_grad():
            expected = llm.network.generate(
                ids_BL,
                attention_mask=mask_BL.long(),
                num_beams=4,
                do_sample=False,
                max_new_tokens=7,
                eos_token_id=list(llm.codec.stop_ids),
                pad_token_id=llm.codec.pad_id,
                use_cache=True,
            )[0, ids_BL.shape[1] :].tolist()
        found = say(llm, ids_BL, mask_BL, Decoding(7, num_beams=4))[0]
        assert found == until(expected, llm.codec.stop_ids)


def all_answers(size: int, stop: int, longest: int) -> Iterator[tuple[int, ...]]:
    for length in range(1, longest + 1):
        for answer in itertools.product(range(size), repeat=length):
            if stop not in answer[:-1] and (answer[-1] == stop or length == longest):
                yield answer


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_enough_for_everything_find_the_best_of_all_answers(length_penalty: float) -> None:
    torch.manual_seed(3)
    table = 2 * torch.randn(5, 5)
    llm, longest = Scripted(table), 4
    log_p = table.log_softmax(dim=1)

    def score(first: int, answer: tuple[int, ...]) -> float:
        steps = zip((first, *answer), answer, strict=False)
        return float(sum(log_p[here, there] for here, there in steps)) / len(answer) ** length_penalty

    ids_BL = torch.tensor([[2], [3], [4]])
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    how = Decoding(longest, num_beams=200, length_penalty=length_penalty)
    found = [tuple(row) for row in say(llm, ids_BL, mask_BL, how)]
    expected = [
        max(all_answers(5, 1, longest), key=lambda answer, first=first: score(first, answer)) for first in (2, 3, 4)
    ]
    assert found == expected


def test_beams_differ_from_row_to_row_in_nothing_but_the_prompt() -> None:
    llm = Scripted(chain((5, 6)))
    ids_BL = torch.tensor([[5], [5]])
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    for how, words in (
        ([Decoding(num_beams=2), Decoding()], "in one batch"),
        ([Decoding(3, num_beams=2), Decoding(4, num_beams=2)], "the same for all rows"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(llm, llm.embed(ids_BL), ids_BL, mask_BL, how)


# --------------------------------------------------------------------------------------------------- text that grows

SAID = {
    "chatglm": "两个绿色的三角形，还有一个红色的圆。\nA red  circle\n\n on    the left\tof <n",
    "chatglm2": "蒙蒙细雨 🐦‍⬛ café 鹊桥，这张图片\nA <b>red</b> circle",
    "glm4": "蒙蒙细雨 🐦‍⬛ café 鹊桥，这张图片\nA <b>red</b> circle < 3",
}


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm4"])
def test_text_grows_by_what_stays(tokenizers: dict[str, Path], family: str) -> None:
    build = small_chatglm if family == "chatglm" else lambda path: small_glm(family, path)
    codec: Any = build(tokenizers[family]).codec
    ids = codec.pieces.encode(SAID[family])
    expected = codec.decode(ids)
    if family != "chatglm":
        assert expected == SAID[family]
        assert any("\ufffd" in codec.decode(ids[:n]) for n in range(len(ids))), "no character is cut by a token"
    growing = GrowingText(codec)
    texts = [growing.push(token) for token in [*ids, codec.stop_ids[0]]]
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)
    assert expected.startswith(texts[-1]) and not any("\ufffd" in text for text in texts)
    assert growing.finish() == expected
    assert len(set(texts)) > len(ids) // 3, "words ought to come as they are said"


def test_a_break_spelt_in_letters_is_shown_once_it_is_one(tokenizers: dict[str, Path]) -> None:
    codec: Any = small_chatglm(tokenizers["chatglm"]).codec
    spelt = [codec.pieces.id_of(piece) for piece in ("<", "n", ">")]
    if None in spelt:  # the pieces were trained without them
        spelt = [codec.pieces.id_of("<n>")]
    growing = GrowingText(codec)
    words = codec.pieces.encode("圆")
    texts = [growing.push(token) for token in [*words, *spelt, *words]]
    assert growing.finish().split() == ["圆", "圆"] and "\n" in texts[-1]
    assert all("<" not in text for text in texts)
