"""Thousands of bad samples among good ones: each replaced by arithmetic, counted once, by two ranks in step."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data.mixture import Mixture, Plan
from data.source.shards import ShardSource
from data.steps import MAX_ATTEMPTS
from tests.data.shard_files import jpeg, make_loader, texts, write_tar
from tests.ranks import run_ranks
from train.distributed import Ranks

NUM_SAMPLES, PER_SHARD, BATCH, STEPS = 12_000, 2_000, 120, 200  # STEPS * BATCH: each language once, to the end
BOTH = {"zh": "zh", "en": "en"}
PICTURE = jpeg(0, (12, 9))
FAULTS = {  # number % 40 -> what is wrong with the sample, and the members it is left with
    3: ("no image", None, None),
    11: ("broken JSON", PICTURE, b'{"zh": "'),
    17: ("empty text", PICTURE, b'{"zh": "\\u200b", "en": " ... "}'),
    23: ("truncated image", jpeg(1, (60, 45))[:700], None),
    29: ("unreadable image", b"<html>", None),
    37: ("no JSON", PICTURE, b""),
}


def fault(number: int) -> str | None:
    return FAULTS[number % 40][0] if number % 40 in FAULTS else None


def members(number: int) -> list[tuple[str, bytes]]:
    _, image, record = FAULTS.get(number % 40, ("", PICTURE, None))
    if record is None:
        record = json.dumps({"zh": f"第{number}张", "en": f"picture {number}"}).encode()
    parts = [("jpg", image), ("json", record)]
    return [(f"{number:06d}.{extension}", content) for extension, content in parts if content]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for start in range(0, NUM_SAMPLES, PER_SHARD):
        numbers = range(start, start + PER_SHARD)
        write_tar(
            folder / f"{start // PER_SHARD:05d}.tar", [member for number in numbers for member in members(number)]
        )
    return folder


def expected_step(plan: Plan, step: int) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Captions of the global batch, and how often each (key, reason) was met: the design's rule, written down again.

    The numbers of the samples are their numbers in both languages' streams, since every one has both languages.
    """
    rows, captions, met = plan.rows(step, BATCH), [], Counter()
    for row in range(BATCH):
        stream, number, attempt = int(rows.stream[row]), int(rows.index[row]), 0
        while (reason := fault(number)) is not None:
            met[f"{number:06d}", reason] += 1
            attempt += 1
            assert attempt <= MAX_ATTEMPTS, "the loader would have given up"
            number = plan.replacement(stream, epoch=int(rows.epoch[row]), step=step, row=row, attempt=attempt)
        word = "第{}张" if plan.streams[stream].language == "zh" else "picture {}"
        captions.append(word.format(number))
    return captions, met


def train_without_a_model(folder: str, max_skip_rate: float) -> dict[str, Any]:
    """What the trainer does with a loader's steps, on one rank of several."""
    ranks = Ranks.connect(torch.device("cpu"))
    source = ShardSource(folder, caption_fields=BOTH, index_workers=1)
    loader = make_loader(
        {"s": source}, global_batch_size=BATCH, rank=ranks.rank, num_ranks=ranks.count, max_skip_rate=max_skip_rate
    )
    captions, skips, agreed = [], [], []
    try:
        for step in islice(loader.steps(0), STEPS):
            (batch,) = step.micro_batches
            captions.append(texts(batch))
            skips.append([(skip.key, skip.reason) for skip in step.skips])
            read, num_skips = ranks.sum_ints([step.num_read, len(step.skips)])
            agreed.append((read, num_skips))
            everyones = [skip for own in ranks.gather_objects(list(step.skips)) for skip in own]
            loader.skip_monitor.update(read, num_skips, everyones)
    except ValueError as error:
        return {"stopped": str(error), "steps": len(captions)}
    return {"captions": captions, "skips": skips, "agreed": agreed, "total": loader.skip_monitor.total}


@pytest.mark.slow
def test_every_bad_sample_is_replaced_by_arithmetic_and_counted_once(shards: Path) -> None:
    plan = Mixture({"zh": 1, "en": 1}).plan({"s": ShardSource(str(shards), caption_fields=BOTH)}, seed=3)
    found = run_ranks(2, train_without_a_model, str(shards), 1.0, timeout=280)
    total: Counter[tuple[str, str]] = Counter()
    for step in range(STEPS):
        captions, met = expected_step(plan, step)
        assert [caption for rank in found for caption in rank["captions"][step]] == captions, step
        assert Counter(skip for rank in found for skip in rank["skips"][step]) == met, step
        for rank in found:
            assert len(rank["captions"][step]) == BATCH // 2, "no batch shrinks"
            assert rank["agreed"][step] == (BATCH + met.total(), met.total())
        for (_, reason), number in met.items():
            total["s", reason] += number
    bad = sum(fault(number) is not None for number in range(NUM_SAMPLES))
    assert bad == NUM_SAMPLES * len(FAULTS) // 40 and total.total() > 2 * bad, "each language meets all of them"
    assert found[0]["total"] == found[1]["total"] == total and len(total) == len(FAULTS)


@pytest.mark.slow
def test_one_rank_reads_what_two_read(shards: Path) -> None:
    plan = Mixture({"zh": 1, "en": 1}).plan({"s": ShardSource(str(shards), caption_fields=BOTH)}, seed=3)
    source = ShardSource(str(shards), caption_fields=BOTH)
    for step in islice(make_loader({"s": source}, global_batch_size=BATCH, num_workers=1).steps(150), 20):
        captions, met = expected_step(plan, step.step)
        assert texts(step.micro_batches[0]) == captions
        assert Counter((skip.key, skip.reason) for skip in step.skips) == met


@pytest.mark.slow
def test_both_ranks_stop_at_the_same_step_with_the_same_words(shards: Path) -> None:
    first, second = run_ranks(2, train_without_a_model, str(shards), 0.01, timeout=280)
    assert first == second and 0 < first["steps"] < STEPS
    assert "data.max_skip_rate allows 1.0%" in first["stopped"]
