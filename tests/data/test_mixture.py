"""The order of a run: quotas held exactly, every sample once an epoch, nothing but (seed, step, row)."""

from __future__ import annotations

import numpy as np
import pytest

from data.keyed import hash_64, permute
from data.mixture import Mixture, Plan, Quotas
from tests.data.shard_files import MemorySource


def plan_of(languages: dict[str, float] | None, sizes: dict[str, dict[str, int]], *, seed: int = 0, **options) -> Plan:
    sources = {name: MemorySource(size, name=name) for name, size in sizes.items()}
    return Mixture(languages, **options).plan(sources, seed=seed)


@pytest.mark.parametrize("weights", [[1, 1], [1, 2], [1, 1, 1], [5, 3, 1, 1, 7], [0.1, 0.7, 0.2]])
def test_every_prefix_holds_the_shares(weights: list[float]) -> None:
    n = 5000
    stream, position = Quotas(weights).assign(np.arange(n))
    counts = np.cumsum(np.eye(len(weights))[stream], axis=0)
    expected = np.arange(1, n + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - expected).max() < 1
    np.testing.assert_array_equal(position, counts[np.arange(n), stream] - 1)


@pytest.mark.parametrize("languages", [{"zh": 1, "en": 1}, {"zh": 3, "en": 1}, {"zh": 1, "en": 2}])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_languages_are_exact_in_every_batch_and_slice(languages: dict[str, float], batch: int) -> None:
    plan = plan_of(languages, {"a": {"zh": 50, "en": 40}, "b": {"en": 30}})
    share = languages["zh"] / sum(languages.values())
    for step in range(20):
        rows = plan.rows(step, batch)
        chinese = np.array([plan.streams[s].language == "zh" for s in rows.stream])
        excess = np.concatenate([[0.0], np.cumsum(chinese - share)])  # of a slice: the difference of two of these
        assert excess.max() - excess.min() <= 1 + 1e-9


def test_sources_weigh_their_samples_unless_told() -> None:
    sizes = {"small": {"en": 100}, "large": {"en": 300}}

    def shares(**options) -> list[int]:
        plan = plan_of({"en": 1}, sizes, **options)
        stream = np.concatenate([plan.rows(step, 40).stream for step in range(10)])
        return np.bincount(stream, minlength=2).tolist()

    assert shares() == [100, 300]
    assert shares(sources={"small": 1, "large": 1}) == [200, 200]
    assert shares(sources={"small": 3, "large": 1}) == [300, 100]
    with pytest.raises(ValueError, match=r"weight to \['small'\] but none to \['large'\]"):
        shares(sources={"small": 3})
    assert plan_of({"en": 1}, sizes, sources={"small": 0}).streams[0].source == "large"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permute_is_a_permutation_and_keys_differ(size: int) -> None:
    orders = [permute(np.arange(size), size, hash_64(key)) for key in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size >= 64:
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_permutation_puts_every_element_everywhere() -> None:
    """Over many keys each element comes first equally often: chi-square below its 99.99% quantile (19 degrees)."""
    n, size = 20000, 20
    first = permute(np.zeros(n, np.int64), size, hash_64(np.arange(n)))
    chi_square = ((np.bincount(first, minlength=size) - n / size) ** 2 / (n / size)).sum()
    assert chi_square < 52.4


def test_each_epoch_reads_every_sample_once_in_a_new_order() -> None:
    sizes = {"zh": 33, "en": 20}
    plan = plan_of({"zh": 1, "en": 1}, {"a": sizes})
    rows = [plan.rows(step, 14) for step in range(40)]
    stream, index, epoch = (np.concatenate([getattr(r, name) for r in rows]) for name in ("stream", "index", "epoch"))
    for number, size in enumerate(sizes.values()):
        orders = [index[(stream == number) & (epoch == e)] for e in range(6)]
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.arange(size))
        assert len({tuple(order) for order in orders}) == len(orders)


def test_seed_changes_the_order_and_nothing_else_does() -> None:
    def index(seed: int, step: int) -> list[int]:
        return plan_of({"zh": 1, "en": 1}, {"a": {"zh": 500, "en": 500}}, seed=seed).rows(step, 16).index.tolist()

    expected = index(0, 5)
    assert index(0, 5) == expected
    assert index(1, 5) != expected and index(0, 6) != expected


def test_replacements_are_arithmetic_and_differ_by_attempt() -> None:
    plan = plan_of({"en": 1}, {"a": {"en": 10_000}})
    where = {"epoch": 0, "step": 3, "row": 5}
    drawn = [plan.replacement(0, **where, attempt=attempt) for attempt in range(1, 6)]
    assert drawn == [plan.replacement(0, **where, attempt=attempt) for attempt in range(1, 6)]
    assert len(set(drawn)) == 5 and all(0 <= index < 10_000 for index in drawn)
    assert plan.replacement(0, **where | {"row": 6}, attempt=1) != drawn[0]


@pytest.mark.parametrize(
    ("languages", "options", "message"),
    [
        ({"zh": 1, "fr": 1}, {}, "'fr'.*no source"),
        ({"zh": -1}, {}, "'zh' has weight -1"),
        ({"zh": 0}, {}, "at least one language"),
        ({"zh": 1}, {"sources": {"b": 1}}, r"\['b'\].*\['a'\]"),
        ({"zh": 1}, {"sources": {"a": 0}}, "'zh', but data.mixture.sources gives weight 0 to a"),
        (None, {"sources": {"a": 0}}, r"no source with a weight.*a with zh 5; weights: \{'a': 0.0\}"),
    ],
)
def test_impossible_mixtures_are_refused(languages: dict[str, float] | None, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(languages, {"a": {"zh": 5}}, **options)


def test_a_language_nobody_has_is_answered_with_what_there_is() -> None:
    expected = "there are: photos with zh 5, en 7; drawings with zh 0, ja 2; empty with no language"
    with pytest.raises(
        ValueError, match=f"'fr', but no source has a sample of it; {expected}.*data.mixture.languages.fr=0"
    ):
        plan_of({"zh": 1, "fr": 1}, {"photos": {"zh": 5, "en": 7}, "drawings": {"zh": 0, "ja": 2}, "empty": {}})
