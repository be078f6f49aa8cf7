"""What `evaluate.py` reads: a run, what to measure it on, and where the results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from model.build import ConfigError
from train.config import from_command_line, key
from train.failure import stop


@dataclass
class EvaluateData:
    transform: Any = key(None, "raw sample -> picture and text; default: the run's", free="target")
    loader: dict[str, Any] = key(dict, "max_text_tokens, max_tokens; default: the run's", free="any")


@dataclass
class EvaluateTrain:
    evaluator: dict[str, Any] = key(dict, "name -> evaluator; default: the run's", free="targets")


@dataclass
class EvaluateConfig:
    run: str = key("", "the run's directory; for stage two also a merged model or VisualGLM's folder")
    checkpoint: str = key(
        "newest", "newest, best (by train.best_metric), a name like step_300, or none: the weights the run began with"
    )
    name: str = key(
        "{checkpoint}", "names the results; {checkpoint} is the checkpoint's name; default: that and train/evaluator"
    )
    dir: str = key("", "where the results are written; default: RUN/eval/NAME")
    resume: str = key(
        "auto", "auto keeps the predictions that are there already, never makes them again", choices=("auto", "never")
    )
    device: str = key("auto", "auto takes the GPU where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = key(0, "CPU threads of torch in each process; 0 leaves the choice to torch", least=0)
    precision: str = key("auto", "auto: bf16 on a GPU, fp32 on a CPU", choices=("auto", "fp32", "bf16", "fp16"))
    quantize: int = key(0, "stage two: bits of the language model's weights, 4 or 8; 0: as trained", choices=(0, 4, 8))
    data: EvaluateData = key(EvaluateData, "how samples are read")
    train: EvaluateTrain = key(EvaluateTrain, "what is measured")


# Where a folder has no config of ours: what VisualGLM was made for.
NO_RUN = {
    "data": {
        "transform": {"_target_": "data.transform.EvalTransform", "image_size": 224},
        "loader": {"max_tokens": None, "max_text_tokens": 35},
    }
}


def evaluate_config(argv: Sequence[str]) -> DictConfig:
    """The command line over `configs/evaluate.yaml` over what the run says of its data and its evaluators."""
    try:
        base = _of_run(argv)
    except ConfigError as error:
        stop(f"config error: {error}", 2)
    return from_command_line("evaluate", schema=EvaluateConfig, argv=argv, base=base)


def config_of_run(run: Path) -> DictConfig | None:
    """As it was resolved when the run began; None for a folder that is no run of ours."""
    file = run if run.suffix in (".yaml", ".yml") else run / "config.yaml"
    if not file.is_file():
        return None
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig) or "model" not in config or "run" not in config:
        raise ConfigError(f"{file} is no config of a run (python -m train.pretrain ... --cfg job prints one)")
    return config


def _of_run(argv: Sequence[str]) -> dict[str, Any]:
    """What is inherited.  Evaluators of the run are left out where others are chosen."""
    said = dict(argument.lstrip("+").split("=", 1) for argument in argv if "=" in argument)
    run = Path(said.get("run", "")).expanduser()
    config = config_of_run(run) if said.get("run") else None
    inherited: dict[str, Any] = {"data": dict(NO_RUN["data"])}
    if "train/evaluator" in said:
        inherited["name"] = f"{{checkpoint}}_{said['train/evaluator']}"
    if config is not None:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        own = plain.get("data", {})
        inherited["data"] |= {key: own[key] for key in NO_RUN["data"] if key in own}
        if not {"train/evaluator", "experiment"} & said.keys():
            nodes = plain.get("train", {}).get("evaluator", {})
            inherited["train"] = {"evaluator": {name: node for name, node in nodes.items() if node is not None}}
    return inherited
