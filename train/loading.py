"""From a config to sources and a loader, the same way for every training entry point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from train.config import build


def build_sources(config: DictConfig) -> dict[str, Any]:
    """By name; `data.source` may be one source too, and one that is set to null is left out."""
    nodes = config.data.source
    named = {"source": nodes} if "_target_" in nodes else nodes
    return {name: build(node) for name, node in named.items() if node is not None}


def build_loader(config: DictConfig, run: Any, sources: Mapping[str, Any], codec: Any) -> Any:
    """This rank's; see `data.steps.StepLoader`."""
    return build(
        config.data.loader,
        sources=sources,
        mixture=build(config.data.mixture),
        transform=build(config.data.transform),
        codec=codec,
        global_batch_size=config.train.global_batch_size,
        accumulate=config.train.accumulate,
        seed=config.run.seed,
        rank=run.ranks.rank,
        num_ranks=run.ranks.count,
    )


def evenly(sources: Mapping[str, Any], about: int) -> Iterator[tuple[Any, str, int]]:
    """(source, language, index) of so many samples of each source and language, or all, spread over the whole of it."""
    for source in sources.values():
        for language in source.languages:
            size = source.num_samples(language)
            for index in range(0, size, max(1, size // about)):
                yield source, language, index
