"""Every shipped config names code at its own address, sets only parameters that exist, and composes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.config import CONFIG_DIR, compose, defaults, left_open
from train.config_check import HYDRA_KEYS, find

GROUP_FILES = sorted(p for package in ("data", "model", "train") for p in (CONFIG_DIR / package).rglob("*.yaml"))
EXPERIMENTS = sorted((CONFIG_DIR / "experiment").rglob("*.yaml"))
ENTRIES = sorted(CONFIG_DIR.glob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIG_DIR))


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


@pytest.mark.parametrize("path", GROUP_FILES, ids=relative)
def test_targets_exist_and_take_every_key(path: Path) -> None:
    package, group = path.relative_to(CONFIG_DIR).parts[:2]
    found = list(nodes(yaml.safe_load(path.read_text(encoding="utf-8"))))
    for number, node in enumerate(found):
        target = node["_target_"]
        if number == 0:
            assert f"{target}.".startswith(f"{package}.{group}"), f"{path} builds {target}, which lives elsewhere"
        parameters = inspect.signature(find(target)).parameters
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values()), f"{target} swallows any key"
        assert node.keys() - HYDRA_KEYS <= parameters.keys(), f"{target} has no such parameter"


def entry_of(path: Path) -> str:
    """The entry config that an experiment is written for, as its first lines say."""
    head = path.read_text(encoding="utf-8").split("\ndefaults:")[0]
    return "finetune" if "finetune.py experiment=" in head else "pretrain"


def small_overrides(path: Path) -> list[str]:
    """What an experiment leaves to its user (`???`), so that it can be composed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    name = str(path.relative_to(CONFIG_DIR / "experiment").with_suffix(""))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra_compose(entry_of(path), [f"experiment={name}"])
    return [f"experiment={name}", *(f"{key}={example(key)}" for key in left_open(config))]


def example(key: str) -> str:
    return "blocks" if key.endswith("qkv_order") else "placeholder"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_every_experiment_passes_the_strict_check(path: Path) -> None:
    config = compose(entry_of(path), small_overrides(path))
    assert config.run.name == path.stem or config.run.name != entry_of(path), f"{path} does not name its run"


@pytest.mark.parametrize("path", [*ENTRIES, *EXPERIMENTS], ids=relative)
def test_whole_runs_say_how_to_run_them(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines()[:12] if line.startswith("#")]
    assert any("python " in line or "scripts/" in line for line in head), f"{path} does not say how to run it"


@pytest.mark.parametrize("group", ["optim", "engine"])
def test_groups_with_a_schema_set_its_keys_only(group: str) -> None:
    from train.config import EngineConfig, OptimConfig

    expected = set(defaults({"optim": OptimConfig, "engine": EngineConfig}[group]))
    for path in (CONFIG_DIR / "train" / group).glob("*.yaml"):
        keys = set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"defaults"}
        assert keys <= expected, f"{path}: {keys - expected}"


def test_adamw_yaml_and_schema_agree() -> None:
    from train.config import OptimConfig

    expected = defaults(OptimConfig)
    assert yaml.safe_load((CONFIG_DIR / "train/optim/adamw.yaml").read_text()) == expected
