"""From a config to sources and a loader, the same way for every training entry point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from train.config import build


def check_image_sizes(config: DictConfig) -> None:
    """That the encoder takes what the transforms give, in training and in evaluators; no data, no weights are read."""
    from model.vision.encoder import image_size_of

    nodes = {"data.transform": config.data.transform}
    for name, node in config.train.evaluator.items():
        if node is not None and node.get("transform") is not None:
            nodes[f"train.evaluator.{name}.transform"] = node.transform
    taken = image_size_of(config.model.vision)
    for key, node in nodes.items():
        given = build(node).image_size
        if given != taken:
            raise ValueError(
                f"{key}.image_size is {given} and the image encoder (model.vision.image_size) takes pictures of "
                f"{taken} x {taken} pixels: make the two equal"
            )


def build_evaluators(config: DictConfig, codec: Any) -> list[Any]:
    """By name; one that is set to null is left out."""
    nodes = config.train.evaluator.items()
    return [build(node, codec=codec, name=name) for name, node in nodes if node is not None]


def build_sources(config: DictConfig) -> dict[str, Any]:
    """By name; `data.source` may be one source too, and one that is set to null is left out.

    Raises ValueError where none is left.
    """
    nodes = config.data.source
    named = {"source": nodes} if "_target_" in nodes else nodes
    if all(node is None for node in named.values()):
        raise ValueError("data.source has no source: choose one, data/source=... (--help lists them)")
    return {name: build(node) for name, node in named.items() if node is not None}


def build_loader(config: DictConfig, run: Any, sources: Mapping[str, Any], codec: Any) -> Any:
    """This rank's; see `data.steps.StepLoader`."""
    padding = padding_multiple(config, run.device.type)
    return build(
        config.data.loader,
        **({} if padding is None else {"pad_to_multiple_of": padding}),
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


def padding_multiple(config: DictConfig, device_type: str) -> int | None:
    """`data.loader.pad_to_multiple_of`, where null is what CUDA graphs want if there are any; None: such a loader has
    none."""
    if "pad_to_multiple_of" not in config.data.loader:
        return None
    told = config.data.loader.pad_to_multiple_of
    return (32 if device_type == "cuda" and config.train.cuda_graphs else 1) if told is None else int(told)


def evenly(sources: Mapping[str, Any], about: int) -> Iterator[tuple[Any, str, int]]:
    """(source, language, index) of so many samples of each source and language, or all, spread over the whole of it."""
    for source in sources.values():
        for language in source.languages:
            size = source.num_samples(language)
            for index in range(0, size, max(1, size // about)):
                yield source, language, index
