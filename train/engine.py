"""DeepSpeed behind one door: forward, backward, step, and the whole optimizer state by parameter name.

DeepSpeed is imported when an engine is built, never before: it takes seconds, and chat and evaluation do without it.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.optim import ParameterGroup

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq")


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 on a GPU that has it and fp32 on a CPU; impossible wishes are refused here."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision not in PRECISIONS:
        raise ValueError(f"train.precision={precision}: one of auto, {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("train.precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return precision


def store_frozen(stage: nn.Module, precision: str) -> None:
    """Frozen parameters are stored in the precision they are computed in; trainable ones stay fp32 (master weights)."""
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} trains but is {parameter.dtype}; trainable parameters are fp32")
        elif parameter.is_floating_point() and not is_divided(parameter):  # which arrived so (`Divider`)
            parameter.data = parameter.data.to(PRECISIONS[precision])


class Divider:
    """ZeRO-3: of a frozen weight that has just arrived, each rank keeps its part, as the engine would later.

    So no rank ever holds more than one of them whole.  Every rank has to hand in the same weights in the same order.

    Raises ValueError for what `Engine` refuses.
    """

    def __init__(self, device: torch.device, *, offload: bool, deepspeed: Mapping[str, Any]) -> None:
        self._library = _import_deepspeed(device)
        _ensure_process_group(device, zero_stage=3)
        self._config = _deepspeed_config(3, offload, "fp32", 1, 1, 0.0, user=deepspeed)
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is None:
            self._first = parameter
            self._library.zero.Init(
                nn.ParameterList([parameter]), config_dict_or_path=self._config, dtype=parameter.dtype
            )
        else:  # as DeepSpeed's own ZeRO-3 takes in what was not divided yet
            self._first.convert_to_zero_parameters(param_list=[parameter])


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """What a weight is, also where it is divided among ranks; then every rank has to ask."""
    if not is_divided(parameter):
        yield parameter.detach()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
        yield parameter.detach()


def is_divided(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


class Engine:
    """One stage on this rank, wrapped by DeepSpeed.

    Losses come scaled so that their mean over micro-steps and ranks is the loss of the global batch.  DeepSpeed's two
    averages (1 / accumulate in `backward`, mean over ranks in the reduction) are just that mean.
    """

    def __init__(
        self,
        stage: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        device: torch.device,
        precision: str,
        micro_batch_size: int,
        accumulate: int,
        betas: tuple[float, float],
        eps: float,
        clip_grad_norm: float,
        zero_stage: int,
        offload: bool,
        deepspeed: Mapping[str, Any],
    ) -> None:
        if offload and zero_stage == 0:
            raise ValueError("train.engine.offload needs train.engine.zero_stage >= 1: ZeRO-0 has no parts to move")
        if precision == "fp16" and zero_stage > 0:
            # 0.19.8 clips before it unscales and moves the loss scale once per parameter group.
            raise ValueError("train.precision=fp16 works with train.engine.zero_stage=0 only; with ZeRO use bf16")
        self.zero_stage, self.accumulate, self.device = zero_stage, accumulate, device
        self.clip_grad_norm, self.precision = clip_grad_norm, precision
        self.groups = list(groups)
        self._named = [(name, p) for group in groups for name, p in zip(group.names, group.parameters, strict=True)]
        self._micro_steps = 0
        self._grad_norm: Any = None

        library = _import_deepspeed(device)
        _ensure_process_group(device, zero_stage=zero_stage)
        config = _deepspeed_config(
            zero_stage, offload, precision, micro_batch_size, accumulate, clip_grad_norm, user=deepspeed
        )
        stage.to(device)
        # lr 0 until the first step: ZeRO-3 runs the optimizer once on zero gradients while it builds its states.
        optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters), "lr": 0.0, "weight_decay": g.weight_decay, "name": g.name} for g in groups],
            betas=betas,
            eps=eps,
            fused=True,
        )
        self._engine, *_ = library.initialize(model=stage, optimizer=optimizer, config=config)
        self._library, self._utils = library, library.utils
        self._start_partitioned_state(step=0.0)

    def __call__(self, batch: Any) -> Any:
        """The stage's output for one micro-batch."""
        return self._engine(batch)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def backward(self, loss: Tensor) -> None:
        """Once per micro-batch; gradients are reduced after the last of a step."""
        if self._micro_steps % self.accumulate:
            self._engine.step()  # DeepSpeed counts micro-steps here; no update before the boundary
        self._engine.backward(loss)
        self._micro_steps += 1

    def step(self, lr_factor: float) -> None:
        """Clip and update, with every group at `lr_factor` times its peak learning rate."""
        assert self._micro_steps % self.accumulate == 0, "step() comes after the last micro-batch"
        for group, ours in zip(self._engine.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = ours.lr * lr_factor
        if self.zero_stage == 0:
            self._clip_unpartitioned()
        self._engine.step()
        if self.zero_stage > 0:
            self._grad_norm = self._engine.get_global_grad_norm()

    def _clip_unpartitioned(self) -> None:
        # DeepSpeed clips fp32 gradients under ZeRO-0 but forgets the norm, which the log wants.
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._engine.optimizer)
        limit = self.clip_grad_norm if self.clip_grad_norm > 0 else float("inf")
        self._grad_norm = nn.utils.clip_grad_norm_([p for _, p in self._named], limit)

    @property
    def grad_norm(self) -> float:
        """2-norm of the last step's whole gradient before clipping (waits for the device)."""
        return float("nan") if self._grad_norm is None else float(self._grad_norm)

    @property
    def learning_rates(self) -> dict[str, float]:
        return {
            ours.name: float(group["lr"])
            for group, ours in zip(self._engine.optimizer.param_groups, self.groups, strict=True)
        }

    # ---- the state by parameter name, the same for any number of ranks and any ZeRO stage

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 weights on CPU) of each trainable parameter.  Every rank must walk through all of them."""
        for name, parameter in self._named:
            full = parameter.data if self.zero_stage == 0 else self._utils.safe_get_full_fp32_param(parameter)
            yield name, full.detach().to("cpu", torch.float32, copy=True).view(_shape(parameter))

    def full_optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("<parameter>.exp_avg" | ".exp_avg_sq" | ".step", CPU tensor).  Every rank must walk through all of them."""
        for name, parameter in self._named:
            step = self._optimizer_step_of(parameter)
            if not step:  # no update yet
                continue
            for key in OPTIMIZER_KEYS:
                if self.zero_stage == 0:
                    full = self._engine.optimizer.state[parameter][key]
                else:
                    full = self._utils.safe_get_full_optimizer_state(parameter, key)
                yield f"{name}.{key}", full.detach().to("cpu", copy=True).view(_shape(parameter))
            yield f"{name}.step", torch.tensor(step)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `full_optimizer_state`, into whatever partition this engine has."""
        steps = {name: float(state[f"{name}.step"]) for name, _ in self._named if f"{name}.step" in state}
        if not steps:
            return
        if self.zero_stage == 0:
            for name, parameter in self._named:
                if name in steps:
                    self._engine.optimizer.state[parameter] = self._empty_state(parameter, steps[name])
        self._start_partitioned_state(step=max(steps.values()))
        for name, parameter in self._named:
            if name not in steps:
                continue
            for key in OPTIMIZER_KEYS:
                self._set_full(parameter, state[f"{name}.{key}"].to(self.device), key)

    def _set_full(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        if self.zero_stage == 0:
            self._engine.optimizer.state[parameter][key].copy_(value)
        elif self.zero_stage < 3:
            self._utils.safe_set_full_optimizer_state(parameter, value, key)
        else:
            # safe_set_full_optimizer_state forgets that the last rank's part is padded, so hand over the part itself.
            part_size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = value.new_zeros(part_size * dist.get_world_size())
            padded[: value.numel()] = value.flatten()
            part = padded[part_size * dist.get_rank() :][:part_size]
            self._utils.safe_set_local_optimizer_state(parameter, part, key)

    def _start_partitioned_state(self, step: float) -> None:
        """Zeros for every flat partition: ZeRO updates all parameters of a group as one tensor with one step count.

        DeepSpeed would make them in the first update, and under ZeRO-1 and 2 then link only the first group's to the
        parameters (0.19.8, `_lazy_init_hp_params_optimizer_state` runs after each group but only once).
        """
        if self.zero_stage == 0:
            return
        for flat in self._flat_partitions():
            self._inner_optimizer.state[flat] = self._empty_state(flat, step)
        if self.zero_stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer if self.zero_stage == 0 else self._engine.optimizer.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        if self.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _empty_state(self, like: Tensor, step: float) -> dict[str, Tensor]:
        return {
            "step": torch.tensor(step, dtype=torch.float32, device=like.device),  # where the fused AdamW keeps it
            **{key: torch.zeros_like(like, dtype=torch.float32) for key in OPTIMIZER_KEYS},
        }

    def _optimizer_step_of(self, parameter: nn.Parameter) -> float | None:
        states = self._inner_optimizer.state
        if self.zero_stage == 0:
            return float(states[parameter]["step"]) if parameter in states else None
        steps = [float(states[flat]["step"]) for flat in self._flat_partitions() if flat in states]
        return max(steps) if steps else None

    def loss_scale_state(self) -> dict[str, Any]:
        """The fp16 loss scale, empty otherwise."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_loss_scale_state(self, state: Mapping[str, Any]) -> None:
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None and state:
            scaler.load_state_dict(dict(state))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The training's autocast, and every parameter whole on every rank (which costs under ZeRO-3 only)."""
        with ExitStack() as stack:
            if self.precision != "fp32":
                stack.enter_context(torch.autocast(self.device.type, dtype=PRECISIONS[self.precision]))
            if self.zero_stage == 3:
                parameters = list(self.module.parameters())
                stack.enter_context(self._library.zero.GatheredParameters(parameters, modifier_rank=None))
            yield


def close_process_group() -> None:
    """At the very end: a process that leaves while gloo's threads live now and then aborts."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()


def _shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed picks its accelerator when imported, and talks at length unless told not to."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # gloo is enough on a CPU; the shared-memory operator would be compiled for half a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed.* is deprecated", FutureWarning)
    found = get_accelerator().device_name().partition(":")[0]
    if found != device.type:
        raise ValueError(f"DeepSpeed was imported for {found} and cannot run on {device.type} in the same process")
    return deepspeed


def _ensure_process_group(device: torch.device, *, zero_stage: int) -> None:
    """DeepSpeed wants a process group even when this process was started alone; one in memory needs no port.

    NCCL takes 0.5 GB of an H100 for itself, and one rank that divides nothing has nobody to send anything to.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; a launcher has set it
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" and zero_stage > 0 else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _deepspeed_config(
    zero_stage: int,
    offload: bool,
    precision: str,
    micro_batch_size: int,
    accumulate: int,
    clip_grad_norm: float,
    *,
    user: Mapping[str, Any],
) -> dict[str, Any]:
    # DeepSpeed's own bucket of 5e8 numbers would be 2 GB of buffer for a Q-Former of 0.2e9 parameters.
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": 50_000_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_grad_norm if zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "log_level": "error",
    }
    if precision != "fp32":
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision],
            # Named modules would have their gradients reduced in low precision, and the sum would depend on the ranks.
            "lower_precision_safe_modules": [],
        }
    return _merge(config, user)


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(ours))
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
