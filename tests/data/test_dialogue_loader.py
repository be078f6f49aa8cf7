"""A step of dialogues follows from (seed, step) and the texts: not from ranks, workers, accumulation or resuming."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import lengths
from data.batch import IGNORED, Dialogue, DialogueBatch, StepBatches, Turn
from data.length_groups import dealt
from data.source import RawDialogue
from data.source.dialogue_shards import DialogueShards
from data.source.visualglm_json import VisualGLMJson
from tests.data.dialogue_files import EveryTurn, LetterDialogueCodec, MemoryDialogues, dialogue_loader, write_json
from tests.data.shard_files import MemorySource


def rows_of(steps: list[StepBatches]) -> dict[int, tuple]:
    """Row in the global batch -> all that it holds, apart from padding, from the shares of all ranks."""
    rows = {}
    for batch in (batch for step in steps for batch in step.micro_batches):
        for b, row in enumerate(batch.row_B.tolist()):
            mask_L = batch.mask_BL[b]
            pictures = batch.image_GCHW[batch.image_row_G == b].tolist()
            starts = batch.image_start_G[batch.image_row_G == b].tolist()
            held = (batch.ids_BL[b][mask_L].tolist(), batch.labels_BL[b][mask_L].tolist())
            rows[row] = (*held, pictures, starts, int(batch.language_B[b]))
    return rows


def texts_of(steps: list[StepBatches]) -> list[str]:
    return [LetterDialogueCodec().decode(row[0]) for _, row in sorted(rows_of(steps).items())]


def sources(**bad: Any) -> dict[str, MemoryDialogues]:
    sizes = {"a": {"zh": 37, "en": 41}, "b": {"en": 11}}
    return {name: MemoryDialogues(size, name=name, bad=bad.get(name, ())) for name, size in sizes.items()}


BAD = {"a": [3, 5], "b": [2]}


@pytest.fixture(scope="module")
def expected_steps() -> list[dict[int, tuple]]:
    """One rank, no workers, from the start."""
    return [rows_of([step]) for step in islice(dialogue_loader(sources(**BAD)).steps(0), 11)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("num_workers", "first_step"), [(0, 0), (0, 6), (2, 7)])
def test_ranks_workers_and_resuming_change_nothing(
    expected_steps, num_ranks: int, accumulate: int, num_workers: int, first_step: int
) -> None:
    options = {"accumulate": accumulate, "num_workers": num_workers, "num_ranks": num_ranks}
    streams = [dialogue_loader(sources(**BAD), rank=rank, **options).steps(first_step) for rank in range(num_ranks)]
    for step in range(first_step, first_step + 3):
        shares = [next(stream) for stream in streams]
        assert [share.step for share in shares] == [step] * num_ranks
        assert rows_of(shares) == expected_steps[step] and len(expected_steps[step]) == 16
        for share in shares:
            assert [len(batch) for batch in share.micro_batches] == [16 // accumulate // num_ranks] * accumulate
            assert {(b.step, b.num_micro_steps) for b in share.micro_batches} == {(step, accumulate)}
        assert sum(share.num_read for share in shares) == 16 + sum(len(share.skips) for share in shares)
    for stream in streams:
        stream.close()


def test_bad_samples_are_replaced_and_counted() -> None:
    good = dialogue_loader(sources()).steps(0)
    skips = num_changed = 0
    for step, other in zip(islice(dialogue_loader(sources(**BAD)).steps(0), 8), good, strict=False):
        was_bad = ["a zh 3 ", "a zh 5 ", "a en 3 ", "a en 5 ", "b en 2 "]
        for new, old in zip(texts_of([step]), texts_of([other]), strict=True):
            changed = any(text in old for text in was_bad)
            num_changed += changed
            assert (new != old) if changed else (new == old)
        assert {(skip.source, skip.reason) for skip in step.skips} <= {("a", "no image"), ("b", "no image")}
        skips += len(step.skips)
    assert skips >= num_changed >= 4


# ------- grouped by length


def test_a_group_of_steps_holds_the_rows_of_the_plan() -> None:
    loader = dialogue_loader(sources(), group_steps=4)
    for group in range(3):
        found = Counter(text[5:] for step in range(4) for text in texts_of([next(loader.steps(4 * group + step))]))
        expected: Counter[str] = Counter()
        for step in range(4):
            rows = loader.plan.rows(4 * group + step, 16)
            for stream, index in zip(rows.stream.tolist(), rows.index.tolist(), strict=True):
                of = loader.plan.streams[stream]
                expected[loader.sources[of.source].dialogues(of.language, index)[0].turns[0].answer] += 1
        assert found == expected


def padding(**options: Any) -> tuple[float, float]:
    """Share of positions that are padding; the rank with the most tokens compared with the mean, at its worst."""
    source = {"s": MemoryDialogues({"en": 500}, longest=400)}
    loaders = [dialogue_loader(source, global_batch_size=32, num_ranks=2, rank=rank, **options) for rank in range(2)]
    positions = tokens = 0
    worst = 1.0
    for shares in islice(zip(*(loader.steps(0) for loader in loaders), strict=True), 16):
        for m in range(len(shares[0].micro_batches)):
            batches = [share.micro_batches[m] for share in shares]
            sizes = [batch.ids_BL.numel() for batch in batches]
            positions += sum(sizes)
            tokens += sum(int(batch.mask_BL.sum()) for batch in batches)
            worst = max(worst, max(sizes) / (sum(sizes) / 2))
    return 1 - tokens / positions, worst


def test_grouping_saves_padding_and_ranks_have_equal_work() -> None:
    grouped, worst = padding(accumulate=2, group_steps=8)
    alone, _ = padding(accumulate=1, group_steps=1)
    assert grouped < 0.15 < 0.3 < alone
    assert worst < 1.1


def test_steps_come_in_an_order_of_the_seed() -> None:
    """Not shortest first in every group."""
    source = {"s": MemoryDialogues({"en": 500}, longest=400)}
    orders = []
    for seed in (3, 4):
        steps = islice(dialogue_loader(source, seed=seed, group_steps=8).steps(0), 16)
        longest = [step.micro_batches[0].text_length for step in steps]
        orders += [np.argsort(longest[:8]).tolist(), np.argsort(longest[8:]).tolist()]
    assert len({tuple(order) for order in orders}) == 4


def test_rows_are_dealt_back_and_forth() -> None:
    hands = [dealt(12, micro_step=1, num_micro_steps=2, rank=rank, num_ranks=2).tolist() for rank in range(2)]
    assert hands == [[6, 9, 10], [7, 8, 11]]


# ------- mixture


def test_replay_by_weight() -> None:
    mine, general = MemoryDialogues({"zh": 5, "en": 15}, name="mine"), MemoryDialogues({"en": 400}, name="general")
    loader = dialogue_loader({"mine": mine, "general": general}, weights={"mine": 3, "general": 1}, group_steps=4)
    assert loader.languages == ("en", "zh")
    found: Counter[str] = Counter()
    for step in islice(loader.steps(0), 4):
        found.update(" ".join(text[5:].split()[:2]) for text in texts_of([step]))
    assert found == {"general en": 16, "mine en": 36, "mine zh": 12}
    plain = dialogue_loader({"mine": mine, "general": general}, group_steps=1)
    assert plain.plan.fingerprint()["shares"] == ["1/21", "1/4"]
    with pytest.raises(ValueError, match=r"a weight to \['mine'\] but none to \['general'\]"):
        dialogue_loader({"mine": mine, "general": general}, weights={"mine": 3})


def test_what_no_step_will_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "q", "label": "a"}] * 5 + [{"prompt": "问", "label": "答"}] * 3 + [{"prompt": "q"}] * 2
    mine = VisualGLMJson(path=str(write_json(tmp_path / "mine.json", rows)), malformed="skip")
    loader = dialogue_loader({"mine": mine, **sources()}, languages={"zh": 1}, weights={"mine": 1, "a": 0})
    expected = [
        "left out: 5 dialogues in 'en' of mine, without weight in data.mixture",
        "left out: 2 malformed rows of mine",
        "left out: 37 dialogues in 'zh' of a, without weight in data.mixture",
        "left out: 41 dialogues in 'en' of a, without weight in data.mixture",
        "left out: 11 dialogues in 'en' of b, without weight in data.mixture",
    ]
    assert loader.table().splitlines()[-5:] == expected
    assert [line for line in caplog.messages if line.startswith("left out: ")] == expected
    assert "left out" not in dialogue_loader(sources()).table()


# ------- what a batch holds


def test_a_batch_of_words_alone_and_one_of_pictures() -> None:
    class Words(MemoryDialogues):
        def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
            return (Dialogue((Turn("q", "a"),), language),)

        def read(self, language: str, index: int) -> RawDialogue:
            return RawDialogue(self.dialogues(language, index), (), str(index))

    (batch,) = next(dialogue_loader({"s": Words({"en": 20})}).steps(0)).micro_batches
    assert isinstance(batch, DialogueBatch) and batch.image_GCHW.shape == (0, 3, 8, 8)
    assert torch.equal(batch.ids_BL, torch.tensor([[ord("q"), 2, ord("a"), 3]]).expand(16, 4))
    assert torch.equal(batch.labels_BL, torch.tensor([[IGNORED, IGNORED, ord("a"), 3]]).expand(16, 4))
    (batch,) = next(dialogue_loader(sources()).steps(0)).micro_batches
    assert batch.image_GCHW.dtype == torch.uint8 and batch.image_GCHW.shape[1:] == (3, 8, 8)
    for row, start in zip(batch.image_row_G.tolist(), batch.image_start_G.tolist(), strict=True):
        assert batch.ids_BL[row, start : start + 4].tolist() == [4] * 4
    assert batch.image_row_G.unique().numel() == (batch.ids_BL == 4).any(dim=1).sum()


def test_candidates_are_drawn_by_step_and_row() -> None:
    shards = DialogueShards(MemorySource({"en": 50}), {"en": ["A?", "B?", "C?"]})
    loader = dialogue_loader({"s": shards})
    texts = [text for step in islice(loader.steps(0), 4) for text in texts_of([step])]
    counts = Counter(text[0] for text in texts)
    assert set(counts) == {"A", "B", "C"} and min(counts.values()) >= 10
    again = [text for step in range(4) for text in texts_of([next(loader.steps(step))])]
    assert again == texts
    assert "not scanned" in loader.table()


class Talk(MemoryDialogues):
    """Three turns, a picture with the first and the last."""

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        return (Dialogue((Turn("1", "a", 1), Turn("2", "b"), Turn("3", "c", 1)), language),)

    def read(self, language: str, index: int) -> RawDialogue:
        pictures = tuple(super(Talk, self).read(language, n).images[0] for n in (0, 3))
        return RawDialogue(self.dialogues(language, index), pictures, str(index))


@pytest.mark.parametrize(
    ("codec", "options", "expected"),
    [
        (LetterDialogueCodec(), {}, {"1a", "1a2b", "1a2b3c"}),
        (LetterDialogueCodec(), {"draw_answer": False}, {"1a2b3c"}),
        (EveryTurn(), {}, {"1a2b3c"}),
    ],
)
def test_which_answer_of_a_dialogue_is_learnt(codec: Any, options: dict, expected: set[str]) -> None:
    step = next(dialogue_loader({"s": Talk({"en": 20})}, codec=codec, **options).steps(0))
    texts = texts_of([step])
    assert set(texts) == expected
    assert len(step.micro_batches[0].image_row_G) == sum(2 if "3" in text else 1 for text in texts)


# ------- too long, and nothing to learn


class Long(MemoryDialogues):
    """A history, a question and an answer; the answer of `index` is index + 1 letters long."""

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        return (Dialogue((Turn("h" * 30, "i" * 10, 1), Turn("q" * 20, "a" * (index + 1))), language),)

    def read(self, language: str, index: int) -> RawDialogue:
        return RawDialogue(self.dialogues(language, index), super().read(language, 0).images, str(index))


def test_history_goes_first_then_the_question_and_it_is_counted() -> None:
    loader = dialogue_loader({"s": Long({"en": 24})}, max_tokens=30, draw_answer=False, group_steps=1)
    totals: Counter[str] = Counter()
    for step in islice(loader.steps(0), 3):
        totals.update(step.counts)
        (batch,) = step.micro_batches
        assert batch.text_length <= 30
        for ids in batch.ids_BL.tolist():
            text = LetterDialogueCodec().decode(ids)
            num_answer, num_asked = text.count("a"), text.count("q")
            assert not text.count("h") and ids.count(2) == 1  # what stands before the answer is never cut
            whole = num_answer + 1 + 1 + 4  # with its end, the words before it, the picture
            assert num_asked == min(20, max(30 - whole, 10)) or ids[ids.index(2) + 1 :].count(3) == 0
    assert totals["cut/en"] == 48 and totals["cut_history_tokens/en"] == 48 * 42
    assert totals["cut_question_tokens/en"] > 0
    scanned = loader.lengths[0]
    assert scanned.num_cut == 24 and scanned.cut["history"] == 24 * 42 and scanned.tokens.max() == 30
    # 48 rows are each of the 24 twice
    assert {part: totals[f"cut_{part}_tokens/en"] for part in scanned.cut} == {p: 2 * n for p, n in scanned.cut.items()}
    assert "history 1008" in loader.table()


def test_what_trains_on_nothing_is_named_at_the_start() -> None:
    class Empty(MemoryDialogues):
        def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
            turn = Turn("q", "" if index == 7 else "a", 3 if index == 4 else 0)
            return (Dialogue((turn,), language),)

    with pytest.raises(ValueError, match="(?s)1 dialogues.*memory.json, row 7: no token of its answer"):
        dialogue_loader({"s": Empty({"en": 12})})
    with pytest.raises(ValueError, match="(?s)2 dialogues.*row 4: .*leave no room in max_tokens=10.*row 7: no token"):
        dialogue_loader({"s": Empty({"en": 12})}, max_tokens=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
        ({"group_steps": 0}, "group_steps is 0"),
        ({"global_batch_size": 18, "accumulate": 4}, "nearest that can: 16 or 20"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dialogue_loader(sources(), **options)


# ------- lengths are kept, and compared on resuming


class Counting(LetterDialogueCodec):
    calls = 0

    def encode(self, dialogue: Dialogue, **limits: Any) -> Any:
        type(self).calls += 1
        return super().encode(dialogue, **limits)


class Doubling(LetterDialogueCodec):
    """Another vocabulary: x is two tokens."""

    def encode(self, dialogue: Dialogue, **limits: Any) -> Any:
        turns = tuple(Turn(t.question, t.answer.replace("x", "xx"), t.num_images) for t in dialogue.turns)
        return super().encode(Dialogue(turns, dialogue.language), **limits)


def test_lengths_are_kept_for_the_same_texts_and_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path))
    monkeypatch.setattr(lengths, "CACHED_FROM_S", 0.0)
    source = {"s": MemoryDialogues({"en": 2000})}
    first = dialogue_loader(source, codec=Counting())
    calls, Counting.calls = Counting.calls, 0
    second = dialogue_loader(source, codec=Counting())
    assert calls > 2000 and Counting.calls < 200
    assert second.table() == first.table() and second.fingerprint() == first.fingerprint()
    for changed in (
        {"codec": Doubling()},
        {"max_tokens": 30},
        {"max_answer_tokens": 20},
    ):
        other = dialogue_loader(source, **{"codec": Counting(), **changed})
        monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path / "none"))
        expected = dialogue_loader(source, **{"codec": Counting(), **changed})
        monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path))
        assert np.array_equal(other.lengths[0].tokens, expected.lengths[0].tokens)
        assert not np.array_equal(other.lengths[0].tokens, first.lengths[0].tokens)
        assert other.fingerprint() != first.fingerprint()
    for file in (tmp_path / "lengths").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert dialogue_loader(source, codec=Counting()).fingerprint() == first.fingerprint()


def test_lengths_are_the_same_from_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEQIAO_CACHE", "/dev/null/none")
    expected = dialogue_loader(sources())
    monkeypatch.setattr(lengths, "PARALLEL_FROM", 10)
    monkeypatch.setattr(lengths, "PART", 7)
    found = dialogue_loader(sources(), num_workers=2)
    assert found.table() == expected.table() and found.fingerprint() == expected.fingerprint()


def test_the_fingerprint_holds_what_the_order_depends_on() -> None:
    expected = dialogue_loader(sources()).fingerprint()
    assert json.loads(json.dumps(expected)) == expected
    assert dialogue_loader(sources(), rank=1, num_ranks=2, accumulate=4, num_workers=3).fingerprint() == expected
    others = [
        dialogue_loader(sources(), seed=4),
        dialogue_loader(sources(), group_steps=4),
        dialogue_loader(sources(), max_tokens=400),
        dialogue_loader(sources(), draw_answer=False),
        dialogue_loader(sources(), codec=Doubling()),
        dialogue_loader({**sources(), "b": MemoryDialogues({"en": 12}, name="b")}),
        dialogue_loader({**sources(), "b": MemoryDialogues({"en": 11}, name="b", longest=5)}),
    ]
    assert all(other.fingerprint() != expected for other in others)
