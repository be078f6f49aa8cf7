"""What has to hold for a hundred million pairs, at a size that a test can afford; larger ones are in tests/slow/."""

from __future__ import annotations

import json
import multiprocessing
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data.index
from data.mixture import Mixture
from data.source.shards import ShardSource
from tests.data.shard_files import MemorySource, bilingual_members, write_tar

BOTH = {"zh": "zh", "en": "en"}


def test_the_order_of_a_billion_samples_needs_no_memory() -> None:
    sizes = {"zh": 30_000_000, "en": 1_000_000_000}
    plan = Mixture({"zh": 1, "en": 1}).plan({"a": MemorySource(sizes)}, seed=0)
    tracemalloc.start()
    rows = [plan.rows(step, 1680) for step in (0, 250_000, 50_000_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    for batch in rows:
        assert np.bincount(batch.stream).tolist() == [840, 840]
        assert len(set(batch.index[batch.stream == 1].tolist())) == 840
    assert rows[2].epoch.tolist() == [e for _ in range(840) for e in (50_000_000 * 840 // 30_000_000, 42)]


def _fingerprint(folder: str) -> str:
    return json.dumps(ShardSource(folder, caption_fields=BOTH, index_workers=1).fingerprint())


@pytest.mark.parametrize("shared_from", [2_000_000, 10])
def test_ranks_that_start_together_agree(tmp_path: Path, monkeypatch, shared_from: int) -> None:
    """Every rank wants the same index at the same moment, and none sees another's half-written file."""
    monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data.index, "SHARED_FROM", shared_from)
    for n in range(8):
        write_tar(tmp_path / "shards" / f"{n}.tar", bilingual_members(range(n * 10, n * 10 + 10)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_fingerprint, [str(tmp_path / "shards")] * 8, chunksize=1)
    expected = _fingerprint(str(tmp_path / "shards"))
    assert found == [expected] * 8
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert left == []
