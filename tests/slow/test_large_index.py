"""Shards with 240,000 samples: every one is found under its number, in little memory, and the mixture holds exactly."""

from __future__ import annotations

import json
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.mixture import Mixture
from data.source.shards import ShardSource
from tests.data.shard_files import jpeg, make_loader
from tests.ranks import run_ranks

PER_SHARD = 10_000
BOTH, TAGGED = (
    range(14),
    range(14, 24),
)  # shards with both languages in the JSON, and with one and a field that names it
BATCH = 1680


def language_of(number: int) -> str:
    return "zh" if number % 5 < 3 else "en"


def header(name: str, size: int) -> bytes:
    """A ustar header; tarfile takes ten times as long for it."""
    fields = [
        name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size, b"%011o\0" % 0, b" " * 8,
        b"0".ljust(101, b"\0"), b"ustar\00000".ljust(248, b"\0"), b"\0" * 7,
    ]  # fmt: skip
    raw = b"".join(fields)[:512].ljust(512, b"\0")
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]


def write_shard(path: Path, numbers: list[int], picture: bytes, *, tagged: bool) -> None:
    """Samples in the order given; of each, image and JSON in either order, as downloads finish."""
    parts = []
    for number in numbers:
        zh, en = f"第{number}张", f"picture {number}"
        record = {"zh": zh, "en": en}
        if tagged:
            language = language_of(number)
            record = {"caption": record[language], "lang": language}
        members = [("jpg", picture), ("json", json.dumps(record, ensure_ascii=False).encode())]
        for extension, content in members if number % 3 else reversed(members):
            parts += [header(f"{number:09d}.{extension}", len(content)), content, b"\0" * (-len(content) % 512)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([*parts, b"\0" * 1024]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folder, and for each source the numbers of its samples in the order of their shards."""
    folder, picture, numbers = tmp_path_factory.mktemp("large"), jpeg(0, (4, 3)), {}
    shuffled = random.Random(0)
    for name, group in (("both", BOTH), ("tagged", TAGGED)):
        numbers[name] = []
        for shard in group:
            own = list(range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
            shuffled.shuffle(own)
            write_shard(folder / name / f"{shard:05d}.tar", own, picture, tagged=name == "tagged")
            numbers[name] += own
    return folder, numbers


def make_sources(folder: Path) -> dict[str, ShardSource]:
    both = ShardSource(str(folder / "both"), caption_fields={"zh": "zh", "en": "en"}, index_workers=1, name="both")
    tagged = ShardSource(str(folder / "tagged"), language_field="lang", index_workers=1, name="tagged")
    return {"both": both, "tagged": tagged}


def expected_numbers(numbers: dict[str, list[int]]) -> dict[tuple[str, str], list[int]]:
    found = {("both", language): numbers["both"] for language in ("zh", "en")}
    return found | {("tagged", own): [n for n in numbers["tagged"] if language_of(n) == own] for own in ("zh", "en")}


def peak_megabytes() -> float:
    """The largest this process has been since it began; `ru_maxrss` would be its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def megabytes_of_reading(folder: Path) -> float:
    """How far reading raises it above where it was before the index was there."""
    before = peak_megabytes()
    sources = make_sources(folder)
    plan = Mixture({"zh": 1, "en": 1}).plan(sources, seed=0)
    for step in range(20):
        rows = plan.rows(step, BATCH)
        for number, index in zip(rows.stream.tolist(), rows.index.tolist(), strict=True):
            sources[plan.streams[number].source].read(plan.streams[number].language, index)
    return peak_megabytes() - before


@pytest.mark.slow
def test_index_is_small_and_quickly_there_again(shards: tuple[Path, dict[str, list[int]]]) -> None:
    folder, _ = shards
    started = time.monotonic()
    first = {name: source.fingerprint() for name, source in make_sources(folder).items()}
    scanned = time.monotonic() - started
    started = time.monotonic()
    sources = make_sources(folder)
    again = time.monotonic() - started
    assert {name: source.fingerprint() for name, source in sources.items()} == first
    assert again < scanned / 5 + 0.5, f"scanned in {scanned:.1f} s, read again in {again:.1f} s"
    for source in sources.values():
        index = source._index
        arrays = [index.first, index.samples, index.keys, index.key_end, *index.rows.values()]
        assert sum(array.nbytes for array in arrays) < 80 * len(source.shards) * PER_SHARD
    (grown,) = run_ranks(1, megabytes_of_reading, folder)
    assert grown < 40, f"{grown:.0f} MB for {len(BOTH) + len(TAGGED)} shards of {PER_SHARD} samples"


@pytest.mark.slow
def test_every_sample_is_found_under_its_number(shards: tuple[Path, dict[str, list[int]]]) -> None:
    folder, numbers = shards
    sources = make_sources(folder)
    for (name, language), expected in expected_numbers(numbers).items():
        source = sources[name]
        assert source.num_samples(language) == len(expected)
        word = "第{}张" if language == "zh" else "picture {}"
        for index, number in enumerate(expected):
            sample = source.read(language, index)
            assert (sample.key, sample.captions) == (f"{number:09d}", (word.format(number),)), (name, language, index)
    assert sample.image == jpeg(0, (4, 3))


@pytest.mark.slow
def test_an_epoch_reads_every_sample_once_and_every_prefix_holds_the_shares(
    shards: tuple[Path, dict[str, list[int]]],
) -> None:
    folder, numbers = shards
    plan = Mixture({"zh": 1, "en": 1}).plan(make_sources(folder), seed=0)
    sizes = [len(expected_numbers(numbers)[stream.source, stream.language]) for stream in plan.streams]
    assert [stream.size for stream in plan.streams] == sizes
    languages = [[s for s, stream in enumerate(plan.streams) if stream.language == own] for own in ("zh", "en")]
    steps = 2 * max(sum(sizes[s] for s in own) for own in languages) // BATCH + 2
    rows = [plan.rows(step, BATCH) for step in range(steps)]
    stream, index, epoch = (np.concatenate([getattr(r, name) for r in rows]) for name in ("stream", "index", "epoch"))
    for number, size in enumerate(sizes):
        first = index[(stream == number) & (epoch == 0)]
        assert len(first) == size and np.array_equal(np.sort(first), np.arange(size)), plan.streams[number]
    per_step = np.stack([np.bincount(r.stream, minlength=len(sizes)) for r in rows])
    for own in languages:
        assert np.array_equal(per_step[:, own].sum(1), np.full(steps, BATCH // 2)), "one to one in every global batch"
    place = np.arange(1, len(stream) + 1)
    for own in languages:
        for number in own:  # a language's half divided by the samples of its sources
            expected = place / 2 * sizes[number] / sum(sizes[s] for s in own)
            assert np.abs(np.cumsum(stream == number) - expected).max() < 2, plan.streams[number]


@pytest.mark.slow
def test_workers_and_ranks_read_the_same_far_into_the_run(shards: tuple[Path, dict[str, list[int]]]) -> None:
    sources = make_sources(shards[0])
    alone = make_loader(sources, global_batch_size=256).steps(1500)
    helped = make_loader(sources, global_batch_size=256, num_workers=2).steps(1500)
    halves = [make_loader(sources, global_batch_size=256, num_ranks=2, rank=rank).steps(1500) for rank in (0, 1)]
    for one, two, first, second in islice(zip(alone, helped, *halves, strict=True), 3):
        expected = one.micro_batches[0].text_key_B.tolist()
        assert two.micro_batches[0].text_key_B.tolist() == expected and len(set(expected)) == 256
        assert first.micro_batches[0].text_key_B.tolist() + second.micro_batches[0].text_key_B.tolist() == expected
