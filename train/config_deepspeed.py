"""The section train.engine.deepspeed: which keys DeepSpeed reads, and which values it takes.

Where DeepSpeed has a pydantic model it is asked, which imports DeepSpeed, seconds long; so this happens only for a
config that has such a section.  The rest it reads by name and never checks; that is written down here (0.19).
"""

from __future__ import annotations

import importlib
import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# What train.* says already: setting it in the DeepSpeed section would make two masters.
OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "train.optim",
    "scheduler": "train.optim",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "checkpoint": "train.save_every",
}
MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
}

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Communication = Literal["fp32", "fp16", "bf16"]
Number = Literal["fp32", "float32", "fp16", "float16", "bf16", "bfloat16"]


class _ByName(BaseModel):
    """Read by name (runtime/config.py and the files it imports); strict, since DeepSpeed would take "no" for true."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TorchAutocast(_ByName):
    enabled: bool = False
    dtype: Number | None = None
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(_ByName):
    grad_accum_dtype: Communication | None = None
    param_dtype: Communication | None = None
    buffer_dtype: Communication | None = None
    keep_in_fp32_modules: list[str] | Literal["auto"] = "auto"


class ActivationCheckpointing(_ByName):
    partition_activations: bool = False
    number_checkpoints: Positive | None = None
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    cpu_checkpointing: bool = False
    profile: bool = False


class Aio(_ByName):
    block_size: Positive = 1048576
    queue_depth: Positive = 8
    intra_op_parallelism: Positive = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class FlopsProfiler(_ByName):
    enabled: bool = False
    recompute_fwd_factor: Share = 0.0
    profile_step: Positive = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Positive = 1
    detailed: bool = True
    output_file: str | None = None


class ThroughputTimer(_ByName):
    enabled: bool = True
    synchronized: bool = True


class Timers(_ByName):
    throughput: ThroughputTimer = ThroughputTimer()


class Section(_ByName):
    """What DeepSpeed reads at the top level; every other key it ignores silently."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    aio: Aio = Aio()
    communication_data_type: Communication | None = None
    data_types: DataTypes = DataTypes()
    disable_allgather: bool = False
    disable_python_gc: bool = False
    dump_state: bool = False
    flops_profiler: FlopsProfiler = FlopsProfiler()
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "error"
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    seq_parallel_communication_data_type: Communication | None = None
    steps_per_print: Positive | None = None
    timers: Timers = Timers()
    torch_autocast: TorchAutocast = TorchAutocast()
    wall_clock_breakdown: bool = False
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    # held to DeepSpeed's own models below
    comms_logger: dict[str, Any] = {}
    compile: dict[str, Any] = {}
    csv_monitor: dict[str, Any] = {}
    tensorboard: dict[str, Any] = {}
    zero_optimization: dict[str, Any] = {}


def unknown_keys(section: Mapping[str, Any], *, imports: bool) -> Iterator[tuple[tuple[str, ...], list[str] | str]]:
    """(path of a key, the keys that stand there, or the key of ours to set instead), for each that is no key."""
    for name, value in section.items():
        if name in OURS:
            yield (str(name),), OURS[name]
        elif name in MODELS and isinstance(value, Mapping):
            if imports:
                if name == "zero_optimization" and "stage" in value:
                    yield (name, "stage"), "train.engine.zero_stage"
                yield from _unknown(value, _model(name), (name,))
        else:
            yield from _unknown({name: value}, Section, ())


def impossible_values(section: Mapping[str, Any], *, zero_stage: int) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """(path, value, what is wrong with it) of a resolved section whose keys are right."""
    yield from _misfits(Section, section, section)
    for name in MODELS.keys() & section.keys():
        value = section[name]
        if isinstance(value, Mapping):
            stage = {"stage": zero_stage} if name == "zero_optimization" else {}
            for path, found, wrong in _misfits(_model(name), {**stage, **value}, value):
                yield (name, *path), found, wrong


def _unknown(
    section: Mapping[str, Any], model: type[BaseModel], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    known = {alias: item for name, item in model.model_fields.items() for alias in (name, item.alias) if alias}
    for name, value in section.items():
        if name not in known:
            yield (*path, str(name)), sorted(known)
        elif isinstance(value, Mapping):
            inner = [t for t in _arguments(known[name].annotation) if hasattr(t, "model_fields")]
            if inner:
                yield from _unknown(value, inner[0], (*path, str(name)))


def _misfits(
    model: type[BaseModel], given: Mapping[str, Any], section: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    try:
        model(**given)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False):
            path, value = _place(fault["loc"], section)
            yield path, value, re.sub("^(Input|Value error,|Assertion failed,) ", "", fault["msg"])
    except AssertionError as error:  # a deprecated key beside the one that took its place
        yield (), dict(section), str(error)


def _place(loc: tuple[Any, ...], section: Any) -> tuple[tuple[str, ...], Any]:
    """As far as pydantic's place exists in what the user wrote: it names branches of a union too."""
    path: list[str] = []
    for step in loc:
        try:
            section = section[step]
        except (KeyError, IndexError, TypeError):
            break
        path.append(str(step))
    return tuple(path), section


def _model(name: str) -> type[BaseModel]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    module, _, name = MODELS[name].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    return model


def _arguments(annotation: Any) -> list[Any]:
    return [annotation, *typing.get_args(annotation)]
