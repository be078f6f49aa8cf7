"""Objects from the `_target_` nodes of a config, for training and for talking.  Light: nothing is imported before it is
built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

PACKAGES = ("data", "model", "train", "serve")


class ConfigError(ValueError):
    """A config that cannot be meant; the message is for the person who wrote it."""


def build(node: Any, **arguments: Any) -> Any:
    """The object a checked `_target_` node describes; `arguments` are what code knows and YAML does not.

    Nothing outside our own packages is called, whatever a config says: Hydra's own list of forbidden functions has been
    got around (GHSA-37p2-j732-x8pj).  Arguments are handed over as they are, never copied into a config.

    Raises:
        ConfigError; what the object and its parts raise themselves.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(plain, Mapping) or "_target_" not in plain:
        raise ConfigError(f"expected a node with _target_, got {plain!r}")
    for target in targets(plain):
        if target.partition(".")[0] not in PACKAGES:
            raise ConfigError(f"_target_ {target}: only things in {', '.join(PACKAGES)} are built from a config")
    wants_partial = bool(plain.get("_partial_", False))
    try:
        factory = instantiate({**plain, "_partial_": True, "_convert_": "all"})
    except InstantiationException as error:
        # of a part, an evaluator's source for instance: its sentence is for the user, and Hydra's frames are not
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__  # noqa: B904 - its own cause stays
        raise
    return partial(factory, **arguments) if wants_partial else factory(**arguments)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in a node, however deep."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)
