"""Configs: composed by Hydra, held to a schema, and refused before anything heavy is imported.

A key is checked against the dataclasses below, or, in a node with `_target_`, against the signature it names, or, in
the DeepSpeed section, against DeepSpeed's own keys (`config_check.py`).  `build` makes objects out of checked nodes.
"""

from __future__ import annotations

import argparse
import difflib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.build import ConfigError
from model.build import build as build
from train.config_check import Places, as_forced, choices_and_bounds, resolved_type, unknown_keys
from train.config_null import broken_reference, without_leftovers
from train.failure import stop

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def key(default: Any, help: str, **rules: Any) -> Any:
    """A field of a schema: its default, what `--help` says, and rules (`choices`, `least`, `free`)."""
    metadata = {"help": help, **rules}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class WandbConfig:
    mode: str = key(
        "offline",
        "offline writes into the run directory, online also uploads",
        choices=("offline", "online", "disabled"),
    )
    project: str = key("queqiao", "wandb project")
    timeout: float = key(20.0, "seconds that wandb may take to start before training goes on without it", least=0)


@dataclass
class RunConfig:
    name: str = key("pretrain", "names the run, its directory and its wandb run")
    dir: str = key("outputs/${run.name}", "where everything of the run is written")
    seed: int = key(0, "decides data order, augmentation, negatives, dropout and new weights")
    resume: str = key(
        "auto",
        "auto goes on from the newest complete checkpoint in run.dir, never starts afresh in a new directory beside it",
        choices=("auto", "never"),
    )
    force_resume: bool = key(False, "resume although the data, the frozen weights or the batch size have changed")
    device: str = key("auto", "auto takes the GPU where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = key(0, "CPU threads of torch in each process; 0 leaves the choice to torch", least=0)
    deterministic: bool = key(False, "only algorithms that give the same bits every time, slower on a GPU")
    wandb: WandbConfig = key(WandbConfig, "tracking with wandb, beside metrics.jsonl")


@dataclass
class OptimConfig:
    lr: float = key(1e-4, "peak learning rate", least=0)
    final_lr: float = key(1e-5, "learning rate at the last step", least=0)
    warmup_steps: int = key(2000, "steps of linear warm-up", least=0)
    warmup_lr: float = key(1e-6, "learning rate at step 0", least=0)
    weight_decay: float = key(0.05, "of matrices and embeddings; biases, norms and vectors have none", least=0)
    beta1: float = key(0.9, "AdamW's decay of the mean gradient", least=0, below=1)
    beta2: float = key(
        0.98, "AdamW's decay of the mean squared gradient: the paper's; LAVIS's code has 0.999", least=0, below=1
    )
    eps: float = key(1e-8, "AdamW's epsilon", least=0)
    temperature_decay: bool = key(False, "weight decay on the temperature too, as LAVIS has it")
    part_lr: dict[str, float] = key(dict, "beginning of a parameter's name -> peak lr of its own", free="any")


@dataclass
class EngineConfig:
    zero_stage: int = key(
        0, "what is divided among ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights", choices=(0, 1, 2, 3)
    )
    offload: bool = key(False, "optimizer state (ZeRO-3: weights too) in host memory")
    deepspeed: dict[str, Any] = key(dict, "more of DeepSpeed's own configuration, merged over ours", free="deepspeed")


@dataclass
class BestMetricConfig:
    name: str = key("", "EVALUATOR/NAME, as retrieval/zh/itm/mean; empty: none is chosen")
    mode: str = key("max", "whether the largest or the smallest is best", choices=("max", "min"))


@dataclass
class TrainConfig:
    steps: int = key(250000, "optimizer steps", least=1)
    global_batch_size: int = key(1680, "samples of one step over all ranks and micro-steps", least=1)
    accumulate: int = key(1, "micro-steps of one step; the contrastive batch is the global one divided by it", least=1)
    log_every: int = key(50, "steps between lines of metrics.jsonl", least=1)
    save_every: int = key(5000, "steps between checkpoints; one is always saved at the end", least=1)
    eval_every: int = key(5000, "steps between evaluations; 0 evaluates never, otherwise at the end too", least=0)
    eval_first: bool = key(False, "evaluate before the first step too: a table of before and after stands at the end")
    best_metric: BestMetricConfig = key(BestMetricConfig, "which checkpoint is the best: checkpoints/best, always kept")
    keep_checkpoints: int = key(3, "newest complete checkpoints that are kept; 0 keeps all", least=0)
    precision: str = key(
        "auto",
        "auto: bf16 on a GPU, fp32 on a CPU; trainable weights are fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    clip_grad_norm: float = key(1.0, "2-norm the whole gradient is clipped to; 0 does not clip", least=0)
    cuda_graphs: int = key(
        16, "GPU: micro-batches of up to so many rows are recorded CUDA graphs; 0: none, and less memory", least=0
    )
    loss: Any = key(None, "the objectives", free="target")
    optim: OptimConfig = key(OptimConfig, "AdamW and its schedule")
    engine: EngineConfig = key(EngineConfig, "DeepSpeed")
    evaluator: dict[str, Any] = key(dict, "name -> evaluator", free="targets")


@dataclass
class DataConfig:
    max_skip_rate: float = key(0.01, "share of bad samples above which the run stops", least=0)
    source: dict[str, Any] = key(dict, "name -> source, or one source", free="targets")
    mixture: Any = key(None, "weights of languages and sources", free="target")
    transform: Any = key(None, "raw sample -> picture and text", free="target")
    loader: Any = key(None, "samples -> batches", free="target")


@dataclass
class Config:
    """What every training entry point reads."""

    run: RunConfig = key(RunConfig, "the run as a whole")
    train: TrainConfig = key(TrainConfig, "batches -> steps")
    data: DataConfig = key(DataConfig, "shards -> batches")
    model: dict[str, Any] = key(dict, "the networks: one node per group in configs/model", free="groups")


def compose(
    name: str,
    overrides: Sequence[str] = (),
    *,
    schema: type = Config,
    config_dir: Path = CONFIG_DIR,
    own_dir: Path | None = None,
    base: Any = None,
) -> DictConfig:
    """`configs/<name>.yaml` with Hydra overrides, every key and value checked.

    Args:
        own_dir: a user's folder with more files for the groups, experiments above all.
        base: values that everything else goes over, such as those of a run that is evaluated.

    Raises:
        ConfigError: names each unknown key, where it stands and the nearest right one; missing and impossible values.
    """
    config, places = _composed(name, overrides, config_dir, own_dir)
    if base is not None:
        over = OmegaConf.merge(base, config)
        assert isinstance(over, DictConfig)
        config = over
    asked_for = left_open(config)  # the schema's defaults would fill these in silently
    _refuse(unknown_keys(OmegaConf.to_container(config), schema, places))
    config = _filled_in(config, schema, places)
    if asked_for:
        missing = sorted(asked_for)
        raise ConfigError(f"not set: {', '.join(missing)}.  Say it on the command line, e.g. {missing[0]}=...")
    _refuse(choices_and_bounds(config, schema, places))
    _refuse(unknown_keys(OmegaConf.to_container(config), schema, places))  # again: interpolations are values now
    return config


def left_open(config: DictConfig) -> set[str]:
    """Keys that are ???, not those which refer to one: at these OmegaConf's own list of them ends."""

    def found(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from found(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                yield from found(inner, f"{path}[{number}]")
        elif value == "???":
            yield path

    return set(found(OmegaConf.to_container(config), ""))


def _composed(name: str, overrides: Sequence[str], config_dir: Path, own_dir: Path | None) -> tuple[DictConfig, Places]:
    """What Hydra makes of the files and overrides, unchecked, and where each of its keys was written."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException

    # Forced, a mistyped key on the command line arrives here and gets the same answer as one in a file.
    folders = [config_dir] if own_dir is None else [_checked_own_dir(own_dir, config_dir), config_dir]
    forced = [as_forced(override, folders) for override in overrides]
    if own_dir is not None:
        quoted = str(folders[0]).replace("\\", r"\\").replace("'", r"\'")
        forced.append(f"hydra.searchpath=['file://{quoted}']")
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            config = hydra_compose(name, forced, return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_no_choice(error.missing_cfg_file or "", folders) or _plain(error)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_plain(error)) from None
    places = Places(folders, name, overrides, dict(config.hydra.runtime.choices))
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    without_leftovers(config, overrides)
    return config, places


def _no_choice(wanted: str, folders: Sequence[Path]) -> str | None:
    """What to choose in the place of `group/choice`, which is no file; None where there is no such group either."""
    parts = wanted.split("/")
    depth = 1 if parts[0] == "experiment" else len(parts) - 1  # experiments lie in folders of their own
    group, choice = "/".join(parts[:depth]), "/".join(parts[depth:])
    trees = [folder / group for folder in folders]
    choices = sorted({str(file.relative_to(t).with_suffix("")) for t in trees for file in t.rglob("*.yaml")})
    if not choices:
        return None
    close = difflib.get_close_matches(choice, choices, n=1)
    advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(choices)}"
    return f"{group} has no {choice}: {advice}"


def _filled_in(config: DictConfig, schema: type, places: Places) -> DictConfig:
    """With the schema's defaults and types, every interpolation resolved."""
    try:
        filled = OmegaConf.merge(OmegaConf.structured(schema), config)
        assert isinstance(filled, DictConfig)
        OmegaConf.resolve(filled)
    except OmegaConfBaseException as error:
        broken = broken_reference(OmegaConf.to_container(config), places)
        if broken:
            raise ConfigError(broken) from None
        where = places.of(tuple(str(error.full_key or "").split(".")))
        raise ConfigError(f"{error.full_key}: {_plain(error).splitlines()[0]} ({where})") from None
    return filled


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _checked_own_dir(own_dir: Path, config_dir: Path) -> Path:
    """Absolute.  Hydra would take our file of two with the same name, and say nothing of the user's."""
    folder = own_dir.expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {folder}")
    for file in sorted(folder.rglob("*.yaml")):
        if (config_dir / file.relative_to(folder)).is_file():
            raise ConfigError(f"--config-dir: {file} is named like one of configs/; give it another name")
    return folder


def from_command_line(
    name: str, *, schema: type = Config, argv: Sequence[str] | None = None, base: Any = None
) -> DictConfig:
    """For an entry point: overrides from the command line; answers --help and --cfg; a bad config ends the process."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path)
    own, arguments = parser.parse_known_args(argv)
    # The deepspeed launcher adds --local_rank where --no_local_rank was forgotten; the environment says it too.
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    overrides = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    try:
        if flags and flags[0] in ("--help", "-h"):
            from train.config_help import help_text

            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `--help | head`
            print(help_text(name, overrides, schema, CONFIG_DIR))
            raise SystemExit(0)
        if flags and flags[0] == "--cfg":
            overrides = [o for o in overrides if o != "job"]
            print(OmegaConf.to_yaml(compose(name, overrides, schema=schema, own_dir=own.config_dir, base=base)))
            raise SystemExit(0)
        if flags:
            raise ConfigError(
                f"unknown option {flags[0]}; options are --help, --cfg job and --config-dir DIR, all else is key=value"
            )
        return compose(name, overrides, schema=schema, own_dir=own.config_dir, base=base)
    except ConfigError as error:
        stop(f"config error: {error}", 2)


def defaults(schema: type) -> dict[str, Any]:
    """Schema -> nested dict of its defaults, for help texts and tests."""
    values: dict[str, Any] = {}
    for item in fields(schema):
        kind = resolved_type(schema, item)
        if is_dataclass(kind):
            values[item.name] = defaults(kind)  # type: ignore[arg-type]
        else:
            values[item.name] = item.default if item.default is not MISSING else {}
    return values


def _plain(error: Exception) -> str:
    """Hydra's and OmegaConf's messages without the lines that are about their insides."""
    lines = [line for line in str(error).splitlines() if line.strip() and "object_type=" not in line]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line for line in str(cause).splitlines() if line.strip() and "object_type=" not in line]
    return "\n".join(lines)
