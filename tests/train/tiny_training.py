"""A stage and batches small enough to train several times in a test; top-level functions for `run_ranks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import StepBatches
from train.checkpoint import Checkpoints, load_training_state, load_weights
from train.distributed import Ranks
from train.engine import Engine, close_process_group, store_frozen
from train.optim import ParameterGroup, parameter_groups
from train.stage import Stage

BATCH, ACCUMULATE = 8, 2


class TinyModel(nn.Module):
    """Everything that makes ZeRO stumble: a frozen part, a parameter read outside forward, odd sizes, (1,) shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5)).requires_grad_(False)
        self.inner, self.head = nn.Linear(5, 9), nn.Linear(9, 3)
        self.query = nn.Parameter(torch.randn(1, 3, 5))
        self.temperature = nn.Parameter(torch.ones(1))

    def look(self, x_BC: Tensor) -> Tensor:
        return (self.frozen(x_BC)[:, None] + self.query).mean(1)


@dataclass(frozen=True)
class TinyBatch:
    x_BC: Tensor
    y_BD: Tensor
    step: int
    micro_step: int
    num_target_tokens: int = 1
    text_length: int = 1

    def __len__(self) -> int:
        return len(self.x_BC)

    def agreed(self, **_: Any) -> TinyBatch:
        return self

    def pin_memory(self) -> TinyBatch:
        return self

    def to(self, device: torch.device) -> TinyBatch:
        return replace(self, x_BC=self.x_BC.to(device), y_BD=self.y_BD.to(device))


def tiny_objectives(
    model: TinyModel, batch: TinyBatch, ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    output = model.head(torch.tanh(model.inner(model.look(batch.x_BC)))) / model.temperature
    squared_B = ((output - batch.y_BD) ** 2).mean(1)
    none, rows = torch.tensor(0.0), torch.tensor(float(len(batch)))
    report = {"squared": (squared_B.detach().sum(), rows), "squared/xx": (none, none), "num_rows": (rows, none)}
    return {"fit": squared_B.mean(), "size": 0.01 * output.abs().mean()}, report


class TinyLoader:
    """Batches by arithmetic on the step, as the real loader's."""

    class _Monitor:
        def update(self, *_: Any) -> None: ...

    def __init__(self, ranks: Ranks, *, bad_step: int | None = None):
        self.ranks, self.bad_step, self.skip_monitor = ranks, bad_step, self._Monitor()

    def steps(self, first_step: int) -> Iterator[StepBatches]:
        step = first_step
        while True:
            random_ = torch.Generator().manual_seed(step)
            x, y = torch.randn(BATCH, 7, generator=random_), torch.randn(BATCH, 3, generator=random_)
            if step == self.bad_step:
                y = y * float("nan")
            parts = [
                TinyBatch(
                    a.chunk(self.ranks.count)[self.ranks.rank], b.chunk(self.ranks.count)[self.ranks.rank], step, i
                )
                for i, (a, b) in enumerate(zip(x.chunk(ACCUMULATE), y.chunk(ACCUMULATE), strict=True))
            ]
            yield StepBatches(step, parts, num_read=BATCH, counts={"truncated/xx": 3})
            step += 1

    def fingerprint(self) -> dict[str, Any]:
        return {"seed": 0, "global_batch_size": BATCH}


def build_tiny(
    ranks: Ranks, *, zero_stage: int, offload: bool = False, precision: str = "fp32", folder: Path | None = None
) -> tuple[Stage, Engine]:
    stage = Stage(TinyModel(), tiny_objectives, ranks)
    if folder is not None:
        load_weights(stage, folder)
    store_frozen(stage, precision)
    engine = tiny_engine(
        stage,
        parameter_groups(list(stage.named_parameters()), lr=1e-2, weight_decay=0.05),
        zero_stage=zero_stage,
        micro_batch_size=BATCH // ACCUMULATE // ranks.count,
        accumulate=ACCUMULATE,
        offload=offload,
        precision=precision,
    )
    if folder is not None:
        load_training_state(engine, folder, ranks)
    return stage, engine


def tiny_engine(
    stage: Stage,
    groups: list[ParameterGroup],
    *,
    zero_stage: int,
    micro_batch_size: int,
    accumulate: int = 1,
    eps: float = 1e-8,
    offload: bool = False,
    precision: str = "fp32",
) -> Engine:
    """On the CPU; under ZeRO-3 even the smallest weights are divided."""
    return Engine(
        stage,
        groups,
        device=torch.device("cpu"),
        precision=precision,
        micro_batch_size=micro_batch_size,
        accumulate=accumulate,
        betas=(0.9, 0.98),
        eps=eps,
        clip_grad_norm=1.0,
        zero_stage=zero_stage,
        offload=offload,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {},
    )


def run_steps(engine: Engine, ranks: Ranks, first: int, last: int) -> list[tuple[float, float]]:
    """(loss of the global batch, gradient norm) of steps first .. last - 1."""
    curve = []
    for step_batches, _ in zip(TinyLoader(ranks).steps(first), range(first, last), strict=False):
        total = torch.zeros(())
        for batch in step_batches.micro_batches:
            loss = sum(engine(batch).losses.values())
            engine.backward(loss)
            total += loss.detach() / ACCUMULATE
        engine.step(1 - step_batches.step / 20)
        curve.append((float(ranks.sum(total)) / ranks.count, engine.grad_norm))
    return curve


def curves(jobs: list[Mapping[str, Any]], folder: str) -> dict[str, Any]:
    """Runs each job (zero_stage, offload, precision, resume, save, first, last) in one process per rank."""
    ranks = Ranks.connect(torch.device("cpu"))
    results: dict[str, Any] = {}
    for job in jobs:
        stage, engine = build_tiny(
            ranks,
            zero_stage=job["zero_stage"],
            offload=job.get("offload", False),
            precision=job.get("precision", "fp32"),
            folder=Path(folder, job["resume"]) if "resume" in job else None,
        )
        frozen = [p.detach().clone() for p in stage.model.frozen.parameters()] if job["zero_stage"] < 3 else []
        first, last = job.get("first", 0), job["last"]
        result: dict[str, Any] = {"curve": run_steps(engine, ranks, first, last)}
        if job["zero_stage"] == 3:
            result["partitioned"] = [(p.ds_tensor.numel(), p.ds_numel, p.numel()) for _, p in engine._named]
        result["frozen_same"] = all(
            torch.equal(a, b) for a, b in zip(frozen, stage.model.frozen.parameters(), strict=False)
        )
        result["frozen_modes"] = [module.training for module in stage.model.frozen.modules()]
        result["weights"] = {name: tensor.clone() for name, tensor in engine.full_weights()}
        result["optimizer"] = {name: tensor.clone() for name, tensor in engine.full_optimizer_state()}
        if "save" in job:
            checkpoints = Checkpoints(Path(folder, job["save"]), ranks, keep=0)
            checkpoints.save(engine, last, {"data": {}}, "")
        results[job["name"]] = result
    close_process_group()
    return results
