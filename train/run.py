"""What every training entry point does around its model: where it runs, what trains, and from which step."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from model.weights.filling import Home
from train import cuda_graphs
from train.best import BestMetric
from train.checkpoint import (
    Checkpoints,
    check_same,
    frozen_fingerprint,
    load_training_state,
    load_weights,
    read_state,
)
from train.distributed import Ranks
from train.engine import (
    PRECISIONS,
    Divider,
    Engine,
    close_process_group,
    is_divided,
    resolve_precision,
    store_frozen,
    whole,
)
from train.optim import ParameterGroup, format_table, groups_table, lr_factor, parameter_groups
from train.run_dir import open_run_dir
from train.tracking import Tracker, WandbWriter
from train.trainer import Loader, Trainer


@dataclass(frozen=True)
class Run:
    """This process' place in a run."""

    device: torch.device
    ranks: Ranks
    dir: Path

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)


def start(config: DictConfig) -> Run:
    """Device, ranks, seeds, and a directory that one rank chooses and the others are told."""
    device = own_device(config.run.device)
    if device.type == "cpu":  # DeepSpeed chooses when it is first imported, which SwissArmyTransformer may do before us
        os.environ["DS_ACCELERATOR"] = "cpu"
    resolve_precision(config.train.precision, device)  # an impossible wish ends here, before any weights are read
    ranks = Ranks.connect(device)
    if not ranks.is_first:  # what data warns of, all ranks see alike
        logging.getLogger("data").setLevel(logging.ERROR)
    _check_batch(config, ranks)
    run_dir = Path(ranks.broadcast_object(str(_run_dir(Path(config.run.dir), config.run.resume))))
    Checkpoints(run_dir, ranks, keep=0).refuse_if_none_is_whole()
    if ranks.is_first:
        open_run_dir(run_dir, OmegaConf.to_yaml(config))
    ranks.barrier()
    if config.run.deterministic and device.type == "cuda":  # on a CPU everything used here is
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    seed_everything(config.run.seed)  # the same on every rank, so that all make the same weights
    return Run(device, ranks, run_dir)


def train(
    config: DictConfig,
    run: Run,
    stage: nn.Module,
    loader: Loader,
    evaluators: Sequence[Any],
    *,
    flops_per_sample: Callable[[Any], float] | None = None,
) -> int:
    """Resumes or begins, trains, and leaves everything on disk.  Returns the number of steps done."""
    ranks = run.ranks
    precision = resolve_precision(config.train.precision, run.device)
    checkpoints = Checkpoints(run.dir, ranks, keep=config.train.keep_checkpoints)
    newest, damaged = checkpoints.newest()
    asks = ranks.is_first or any(is_divided(parameter) for parameter in stage.parameters())
    frozen = frozen_fingerprint(stage, whole=whole) if asks else {}
    state: Mapping[str, Any] = {} if newest is None else read_state(newest)
    if newest is not None:
        _check_resume(config, run, newest, state, loader, ranks.broadcast_object(frozen))
        load_weights(stage, newest)
    store_frozen(stage, precision)
    engine = make_engine(config, run, stage, precision)
    first_step = int(state.get("step", 0))
    # From here on ranks differ: each its own dropout.
    seed_everything(config.run.seed + 7919 * (ranks.rank + 1) + first_step)
    if newest is not None:
        load_training_state(engine, newest, ranks)
    tracker = _tracker(config, run, first_step)
    _tell_resume(config, run, tracker, first_step, newest, damaged)
    trainer = Trainer(
        engine,
        loader,
        ranks,
        tracker=tracker,
        checkpoints=checkpoints,
        evaluators=evaluators,
        lr_factor=_schedule(config),
        checkpoint_state={
            "frozen": frozen,
            "train": {"global_batch_size": config.train.global_batch_size, "accumulate": config.train.accumulate},
            "written_by": {"ranks": ranks.count, "zero_stage": engine.zero_stage, "precision": precision},
        },
        config_yaml=OmegaConf.to_yaml(config),
        steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        log_every=config.train.log_every,
        save_every=config.train.save_every,
        eval_every=config.train.eval_every if evaluators else 0,
        eval_first=config.train.eval_first,
        best=_best(config, evaluators, checkpoints.best_of(state)),
        skips_before=int(state.get("data", {}).get("skips", 0)),
        flops_per_sample=flops_per_sample,
    )
    try:
        done = trainer.fit(first_step)
    finally:
        tracker.close()
    run.say(f"{done} of {config.train.steps} steps are done; everything is in {run.dir}")
    return done


def finish() -> None:
    """After the last use of ranks."""
    close_process_group()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def own_device(wish: str) -> torch.device:
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch sees no GPU: python scripts/doctor.py says why")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # batches of unequal lengths leave holes in memory that is taken in fixed pieces
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _run_dir(wish: Path, resume: str) -> Path:
    """`wish`, or with resume=never the first of wish, wish-2, wish-3, ... that holds no run yet."""
    if resume == "auto":
        return wish
    candidate, number = wish, 1
    while (candidate / "metrics.jsonl").exists() or (candidate / "checkpoints").exists():
        number += 1
        candidate = wish.with_name(f"{wish.name}-{number}")
    return candidate


def _check_batch(config: DictConfig, ranks: Ranks) -> None:
    size, unit = config.train.global_batch_size, config.train.accumulate * ranks.count
    if size % unit:
        raise ValueError(
            f"train.global_batch_size={size} cannot be divided by train.accumulate={config.train.accumulate} times "
            f"{ranks.count} ranks; the next that can: {(size // unit + 1) * unit}"
        )


def _check_resume(
    config: DictConfig, run: Run, newest: Path, state: Mapping[str, Any], loader: Loader, frozen: Mapping[str, Any]
) -> None:
    force = config.run.force_resume
    if state["step"] >= config.train.steps:
        run.say(f"{newest} has all train.steps={config.train.steps} steps already")
    contrastive = {"global_batch_size": config.train.global_batch_size, "accumulate": config.train.accumulate}
    changes = check_same(state["train"], contrastive, "train", force=force)
    changes += check_same(state["data"]["fingerprint"], loader.fingerprint(), "the data", force=force)
    changes += check_same(state["frozen"], frozen, "frozen weights", force=force)
    if changes:
        run.say(f"warning: resuming by force although these changed: {'; '.join(changes)}")


def _tell_resume(
    config: DictConfig, run: Run, tracker: Tracker, step: int, newest: Path | None, damaged: Sequence[str]
) -> None:
    for sentence in damaged:
        run.say(f"warning: {sentence}")
        tracker.event(step, "checkpoint ignored", why=sentence)
    if newest is not None:
        run.say(f"resuming after step {step} from {newest}")
        changes = changed_keys(OmegaConf.load(newest / "config.yaml"), config)
        if changes:
            run.say(f"the config is not the checkpoint's any more: {'; '.join(changes)}")
        tracker.event(step, "resumed", checkpoint=newest.name, ranks=run.ranks.count, changes=changes)


def changed_keys(before: Any, after: Any) -> list[str]:
    """`key: old -> new` of every value that differs between two resolved configs."""

    def flat(node: Any, path: str) -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {path: node}
        return {key: value for name in node for key, value in flat(node[name], f"{path}.{name}".lstrip(".")).items()}

    old, new = (flat(OmegaConf.to_container(config), "") for config in (before, after))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def make_engine(config: DictConfig, run: Run, stage: nn.Module, precision: str) -> Engine:
    """Decides what is decayed and how fast it learns, prints it, and wraps the stage."""
    optim, engine, device, ranks = config.train.optim, config.train.engine, run.device, run.ranks
    groups = groups_of(config, stage)
    run.say("\n" + _trained_table(stage, precision) + "\n\n" + groups_table(groups))
    run.say(_batch_line(config, ranks, device, precision, contrastive=hasattr(stage.objectives, "itc")))
    made = Engine(
        stage,
        groups,
        device=device,
        precision=precision,
        micro_batch_size=config.train.global_batch_size // (config.train.accumulate * ranks.count),
        accumulate=config.train.accumulate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        clip_grad_norm=config.train.clip_grad_norm,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        deepspeed=OmegaConf.to_container(engine.deepspeed, resolve=True),  # type: ignore[arg-type]
    )
    # ZeRO-3 gathers weights in hooks of their modules, into memory that is another's at the next step
    if device.type == "cuda" and engine.zero_stage < 3 and config.train.cuda_graphs:
        recorded = cuda_graphs.use(stage.model, max_rows=config.train.cuda_graphs)
        run.say(f"as CUDA graphs, up to {config.train.cuda_graphs} rows: {', '.join(recorded) or 'nothing'}")
    return made


def home_of_frozen(config: DictConfig, run: Run) -> Home:
    """Where large frozen weights live: straight on this rank's device; under ZeRO-3 this rank's part of each alone."""
    engine = config.train.engine
    if engine.zero_stage < 3:
        return Home(run.device)
    plain: Any = OmegaConf.to_container(engine.deepspeed, resolve=True)
    dtype = PRECISIONS[resolve_precision(config.train.precision, run.device)]
    return Home(run.device, dtype, Divider(run.device, offload=engine.offload, deepspeed=plain))


def groups_of(config: DictConfig, stage: nn.Module) -> list[ParameterGroup]:
    """Only names and sizes are looked at, so weights may still be missing.

    Raises:
        ValueError: see `parameter_groups`; a rate in `part_lr` that is none.
    """
    optim = config.train.optim
    return parameter_groups(
        list(stage.named_parameters()),
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        temperature_decay=optim.temperature_decay,
        part_lr=flat_rates(optim.part_lr),
    )


def check_groups(config: DictConfig, model: nn.Module) -> None:
    """The same of a model that is no stage yet, or not filled yet, for mistakes that need no weights to be found."""
    groups_of(config, nn.ModuleDict({"model": model}))


def flat_rates(node: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """`train.optim.part_lr.model.projection=...` on the command line comes as sections, in a file with dots."""
    found: dict[str, float] = {}
    for name, value in node.items():
        if isinstance(value, Mapping | DictConfig):
            found |= flat_rates(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            found[before + name] = float(value)
        else:
            raise ValueError(f"train.optim.part_lr.{before}{name} is {value!r}; expected a learning rate, 0 or more")
    return found


def _best(config: DictConfig, evaluators: Sequence[Any], before: Mapping[str, Any] | None) -> BestMetric | None:
    wish = config.train.best_metric
    return BestMetric(wish.name, wish.mode, [it.name for it in evaluators], before) if wish.name else None


def _schedule(config: DictConfig) -> Any:
    optim = config.train.optim
    if optim.lr <= 0:
        return lambda step: 0.0
    return partial(
        lr_factor,
        steps=config.train.steps,
        warmup_steps=optim.warmup_steps,
        warmup_start=optim.warmup_lr / optim.lr,
        final=optim.final_lr / optim.lr,
    )


def _tracker(config: DictConfig, run: Run, first_step: int) -> Tracker:
    writer = None
    wandb = config.run.wandb
    if run.ranks.is_first and wandb.mode != "disabled":
        plain: Any = OmegaConf.to_container(config, resolve=True)
        writer = WandbWriter(
            run.dir, name=config.run.name, project=wandb.project, mode=wandb.mode, timeout=wandb.timeout, config=plain
        )
    return Tracker(run.dir, first_step=first_step, steps=config.train.steps, is_first=run.ranks.is_first, writer=writer)


def _trained_table(stage: nn.Module, precision: str) -> str:
    """Which parts train, how large they are, and how they are stored."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in stage.named_parameters():
        part = name.removeprefix("model.").split(".")[0] + (", adapter" if ".lora_" in name else "")
        parts.setdefault(part, []).append(parameter)
    rows = [("part", "trained", "frozen", "stored as", "computed in")]
    for part, parameters in parts.items():
        trained = sum(_numel(p) for p in parameters if p.requires_grad)
        frozen = sum(_numel(p) for p in parameters if not p.requires_grad)
        stored = sorted({_stored_as(p) for p in parameters})
        rows.append((part, f"{trained:,}", f"{frozen:,}", " and ".join(stored), precision))
    everything = [p for parameters in parts.values() for p in parameters]
    trained = sum(_numel(p) for p in everything if p.requires_grad)
    rows.append(("all", f"{trained:,}", f"{sum(map(_numel, everything)) - trained:,}", "", ""))
    return format_table(rows)


def _numel(parameter: nn.Parameter) -> int:
    """Weights, also where two of them share a byte, and of all ranks together where they are divided."""
    quantised = getattr(parameter, "quant_state", None)
    if quantised is not None:
        return torch.Size(quantised.shape).numel()
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _stored_as(parameter: nn.Parameter) -> str:
    quantised = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if quantised is None else str(quantised.quant_type)


def _batch_line(config: DictConfig, ranks: Ranks, device: torch.device, precision: str, *, contrastive: bool) -> str:
    size, accumulate = config.train.global_batch_size, config.train.accumulate
    told = f"; contrastive batch {size // accumulate} (global batch / train.accumulate)" if contrastive else ""
    return (
        f"\nglobal batch {size} = {ranks.count} rank(s) x {accumulate} micro-step(s) x "
        f"{size // accumulate // ranks.count}{told}\n"
        f"{device.type}, {precision}, ZeRO-{config.train.engine.zero_stage}"
        f"{' with offload' if config.train.engine.offload else ''}; steps {config.train.steps}"
    )
