"""A batch follows from (seed, step): not from ranks, workers, accumulation or where the run was resumed."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.batch import ImageTextBatch, StepBatches
from data.collate import Example, collate, image_key, truncate
from data.source import RawSample
from data.source.shards import ShardSource
from tests.data.shard_files import (
    LetterCodec,
    MemorySource,
    bilingual_members,
    jpeg,
    make_loader,
    picture,
    replaced,
    texts,
    without,
    write_tar,
)

ROW_TENSORS = ("image_BCHW", "bos_id_B", "image_key_B", "text_key_B", "language_B")


def rows_of(parts: list[ImageTextBatch]) -> list[tuple]:
    """Everything a row holds, apart from padding and its number."""
    rows = []
    for batch in parts:
        for i, text in enumerate(texts(batch)):
            rows.append((text, *(getattr(batch, name)[i].tolist() for name in ROW_TENSORS)))
    return rows


def global_batch(steps: list[StepBatches]) -> list[tuple]:
    """The rows of one step in their order, from the shares of all ranks."""
    accumulate = len(steps[0].micro_batches)
    return rows_of([step.micro_batches[m] for m in range(accumulate) for step in steps])


def memory_sources(**bad) -> dict[str, MemorySource]:
    sizes = {"a": {"zh": 37, "en": 41}, "b": {"en": 11}}
    return {name: MemorySource(size, name=name, bad=bad.get(name, ())) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def expected_steps() -> list[list[tuple]]:
    """One rank, no workers, from the start."""
    steps = islice(make_loader(memory_sources(a=[3, 5], b=[2])).steps(0), 6)
    return [global_batch([step]) for step in steps]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("num_workers", "first_step"), [(0, 0), (0, 4), (2, 0), (2, 3)])
def test_ranks_workers_and_resuming_change_nothing(
    expected_steps, num_ranks: int, accumulate: int, num_workers: int, first_step: int
) -> None:
    options = {"accumulate": accumulate, "num_workers": num_workers, "num_ranks": num_ranks}
    loaders = [make_loader(memory_sources(a=[3, 5], b=[2]), rank=rank, **options) for rank in range(num_ranks)]
    streams = [loader.steps(first_step) for loader in loaders]
    for step in range(first_step, min(first_step + 2, 6)):
        shares = [next(stream) for stream in streams]
        assert [share.step for share in shares] == [step] * num_ranks
        assert global_batch(shares) == expected_steps[step]
        for rank, share in enumerate(shares):
            size = 16 // accumulate // num_ranks
            for m, batch in enumerate(share.micro_batches):
                assert batch.row_B.tolist() == list(range(rank * size, rank * size + size))
                assert (batch.step, batch.micro_step, batch.num_micro_steps) == (step, m, accumulate)
        assert sum(share.num_read for share in shares) == 16 + sum(len(share.skips) for share in shares)
    for stream in streams:
        stream.close()


def test_the_seed_matters(expected_steps) -> None:
    assert global_batch([next(make_loader(memory_sources(), seed=4).steps(0))]) != expected_steps[0]


def test_starting_workers_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    stream = make_loader(memory_sources(), num_workers=1).steps(0)
    next(stream)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_batch_holds() -> None:
    step = next(make_loader(memory_sources()).steps(0))
    (batch,) = step.micro_batches
    assert batch.languages == ("zh", "en") and batch.image_BCHW.dtype == torch.uint8
    assert batch.image_BCHW.shape == (16, 3, 8, 8)
    languages = [text.split()[1] for text in texts(batch)]
    assert [batch.languages[i] for i in batch.language_B.tolist()] == languages
    assert batch.bos_id_B.tolist() == [LetterCodec().bos_id(language) for language in languages]
    assert {n: step.counts[f"pairs/{n}"] for n in ("zh", "en")} == {"zh": 8, "en": 8}
    assert step.counts["tokens/zh"] + step.counts["tokens/en"] == batch.text_mask_BL.sum()
    assert make_loader(memory_sources(), languages={"en": 1, "zh": 1}).languages == ("en", "zh")


def test_the_order_of_earlier_versions_is_kept() -> None:
    """A checkpoint of an earlier commit goes on with the rows it would have had (pixels depend on Pillow's version)."""
    found = sha256()
    for options in ({}, {"accumulate": 2, "num_ranks": 2, "rank": 1}):
        loader = make_loader(memory_sources(a=[3, 5], b=[2]), **options)
        for step in islice(loader.steps(2), 5):
            found.update(repr((step.step, step.skips, step.num_read, sorted(step.counts.items()))).encode())
            for batch in step.micro_batches:
                for name in ("text_ids_BL", "text_mask_BL", "bos_id_B", "text_key_B", "row_B", "language_B"):
                    found.update(getattr(batch, name).numpy().tobytes())
    expected = "c794fd8851965611b79d4140d2d2fd5039c62414802d9ee3d05a5940617075af"
    assert found.hexdigest() == expected


# ------- collation


def test_captions_are_padded_to_the_longest_and_truncated_before_sep() -> None:
    captions = ["ab", "abcdefgh", "c"]
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    examples = [Example(image, caption, "en", 7, row) for row, caption in enumerate(captions)]
    options = {"languages": ("zh", "en"), "step": 2, "micro_step": 1, "num_micro_steps": 3}
    batch, counts = collate(examples, LetterCodec(), max_text_tokens=6, **options)
    a, b, c, d = map(ord, "abcd")
    expected = torch.tensor([[2, a, b, 3, 0, 0], [2, a, b, c, d, 3], [2, c, 3, 0, 0, 0]])
    assert torch.equal(batch.text_ids_BL, expected) and torch.equal(batch.text_mask_BL, expected != 0)
    assert counts == {"pairs/en": 3, "tokens/en": 13, "truncated/en": 1}
    assert truncate([2, 9, 3], 3) == [2, 9, 3] and truncate([2, 9, 8, 7, 3], 3) == [2, 9, 3]
    batch, _ = collate(examples[:1], LetterCodec(), max_text_tokens=6, **options)
    assert batch.text_length == 4


def test_keys_of_equal_images_and_captions() -> None:
    def key(image, image_id: str = "") -> int:
        return image_key(RawSample(image, ("a",), "k", image_id=image_id))

    assert key(jpeg(1)) == key(jpeg(1)) != key(jpeg(2))
    assert key(jpeg(1), "sha256:x") == key(jpeg(2), "sha256:x") != key(jpeg(1), "sha256:y")
    assert key(picture(1)) == key(picture(1)) != key(picture(2))
    assert 0 <= key(jpeg(1)) < 2**63
    assert key(b"", "sha256:x") == 8594591913250494118  # b2sum -l 64, without its lowest bit


def test_text_keys_follow_the_cleaned_caption(tmp_path: Path) -> None:
    members = []
    for n, caption in enumerate(["A dog.", "a dog", "a cat"]):
        members += [(f"{n}.jpg", jpeg(n)), (f"{n}.txt", caption.encode())]
    write_tar(tmp_path / "a.tar", members)
    loader = make_loader({"s": ShardSource(str(tmp_path), language="en")}, languages={"en": 1}, global_batch_size=3)
    batch = next(loader.steps(0)).micro_batches[0]
    keys = {text: key for text, key in zip(texts(batch), batch.text_key_B.tolist(), strict=True)}
    assert sorted(texts(batch)) == ["a cat", "a dog", "a dog"] and len(keys) == len(set(batch.text_key_B.tolist())) == 2


# ------- bad samples


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no image", lambda m: without(m, "00004.jpg")),
        ("no JSON", lambda m: without(m, "00004.json")),
        ("broken JSON", lambda m: replaced(m, "00004.json", b"{")),
        ("broken JSON", lambda m: replaced(m, "00004.json", '{"zh": "中文", "en": "a"}'.encode("gbk"))),
        ("empty text", lambda m: replaced(m, "00004.json", b'{"zh": "\\u200b", "en": "...\\t\\u200b"}')),
        ("truncated image", lambda m: replaced(m, "00004.jpg", jpeg(4, (200, 150))[:1500])),
        ("unreadable image", lambda m: replaced(m, "00004.jpg", b"no picture")),
    ],
)
def test_a_bad_sample_is_replaced_counted_and_shrinks_nothing(tmp_path: Path, reason: str, change) -> None:
    good = write_tar(tmp_path / "good" / "a.tar", bilingual_members(range(12)))
    shard = write_tar(tmp_path / "bad" / "a.tar", change(bilingual_members(range(12))))
    fields = {"zh": "zh", "en": "en"}
    loaders = [make_loader({"s": ShardSource(str(path), caption_fields=fields)}) for path in (shard, good)]
    for step, other in islice(zip(*(loader.steps(0) for loader in loaders), strict=True), 4):
        assert len(step.micro_batches[0]) == 16 and step.num_read == 16 + len(step.skips)
        assert all(s.source == "s" and s.shard == str(shard) and s.key == "00004" for s in step.skips)
        assert {s.reason for s in step.skips} <= {reason}
        (batch,), (expected,) = step.micro_batches, other.micro_batches
        assert torch.equal(batch.language_B, expected.language_B)
        pairs = list(zip(texts(batch), texts(expected), strict=True))
        was_bad = [("4" in old) for _, old in pairs]
        assert sum(was_bad) <= len(step.skips)
        assert all((new != old) if bad else (new == old) for (new, old), bad in zip(pairs, was_bad, strict=True))
    assert sum(len(step.skips) for step in islice(loaders[0].steps(0), 4)) >= 4


def test_a_source_of_nothing_but_bad_samples_says_so() -> None:
    loader = make_loader({"broken": MemorySource({"en": 20}, name="broken", bad=range(20))}, languages={"en": 1})
    with pytest.raises(ValueError, match="(?s)'broken'.*'en'.*broken.tar.*truncated image"):
        next(loader.steps(0))


class Dying(MemorySource):
    def read(self, language: str, index: int) -> RawSample:
        os._exit(3)


class Failing(MemorySource):
    def read(self, language: str, index: int) -> RawSample:
        raise ZeroDivisionError("a bug in the source")


def test_a_dead_worker_is_an_error_with_a_way_out() -> None:
    loader = make_loader({"s": Dying({"en": 20})}, languages={"en": 1}, num_workers=1)
    with pytest.raises(RuntimeError, match="data worker died.*shm-size.*num_workers=1"):
        next(loader.steps(0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bugs_are_not_taken_for_bad_samples(num_workers: int) -> None:
    loader = make_loader({"s": Failing({"en": 20})}, languages={"en": 1}, num_workers=num_workers)
    with pytest.raises(ZeroDivisionError, match="a bug in the source"):
        next(loader.steps(0))


# ------- construction


def test_the_fingerprint_holds_what_the_order_depends_on() -> None:
    expected = make_loader(memory_sources()).fingerprint()
    assert json.loads(json.dumps(expected)) == expected
    assert make_loader(memory_sources(), rank=1, num_ranks=2, accumulate=4, num_workers=3).fingerprint() == expected
    others = [
        make_loader(memory_sources(), seed=4),
        make_loader(memory_sources(), global_batch_size=32),
        make_loader(memory_sources(), languages={"zh": 1, "en": 2}),
        make_loader({**memory_sources(), "b": MemorySource({"en": 12})}),
        make_loader({"a": memory_sources()["a"]}),
    ]
    assert all(other.fingerprint() != expected for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 18, "accumulate": 2, "num_ranks": 2}, "global_batch_size=18.*accumulate=2.*16 or 20"),
        ({"global_batch_size": 2, "num_ranks": 4}, "nearest that can: 4"),
        ({"max_text_tokens": 2}, "max_text_tokens is 2"),
        ({"max_skip_rate": 1.5}, "max_skip_rate is 1.5"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(memory_sources(), **options)
    with pytest.raises(ValueError, match="data.source is empty"):
        make_loader({})
