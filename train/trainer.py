"""The loop.  It knows steps and named losses, and neither the model, nor a loss, nor a kind of batch by name."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from data.batch import Batch, StepBatches
from train.best import BestMetric
from train.checkpoint import Checkpoints, random_state, set_random_state
from train.distributed import Ranks
from train.engine import Engine
from train.evaluator.predictions import Predictions
from train.tracking import Tracker, peak_tflops


class Loader(Protocol):
    skip_monitor: Any

    def steps(self, first_step: int) -> Iterator[StepBatches]: ...

    def fingerprint(self) -> dict[str, Any]: ...


class Trainer:
    """Steps `first_step` to `steps` of a run.

    A step's number counts finished steps: line n of metrics.jsonl, checkpoint n and evaluation n all see the weights
    after n updates, so a run that resumes at n goes on with line n + 1.  `flops_per_sample(batch)` is what training on
    one sample of such a batch costs, for the log.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        ranks: Ranks,
        *,
        tracker: Tracker,
        checkpoints: Checkpoints,
        evaluators: Sequence[Any],
        lr_factor: Callable[[int], float],
        checkpoint_state: Mapping[str, Any],
        config_yaml: str,
        steps: int,
        global_batch_size: int,
        log_every: int,
        save_every: int,
        eval_every: int,
        eval_first: bool = False,
        best: BestMetric | None = None,
        skips_before: int = 0,
        flops_per_sample: Callable[[Any], float] | None = None,
    ) -> None:
        self.engine, self.loader, self.ranks, self.tracker = engine, loader, ranks, tracker
        self.checkpoints, self.evaluators, self.lr_factor = checkpoints, evaluators, lr_factor
        self.checkpoint_state, self.config_yaml = dict(checkpoint_state), config_yaml
        self.steps, self.global_batch_size = steps, global_batch_size
        self.log_every, self.save_every, self.eval_every = log_every, save_every, eval_every
        self.eval_first, self.best = eval_first, best
        self.device, self.flops_per_sample = engine.device, flops_per_sample
        self._finite = torch.ones((), device=self.device, dtype=torch.bool)
        self._skips = skips_before  # of the whole run, which a resume goes on counting
        self._counts: Mapping[str, int] = {}  # the loader's counters of the latest step on this rank

    def fit(self, first_step: int) -> int:
        """Trains until `steps` or a signal; returns how many steps are done."""
        done = first_step
        if self.eval_first and first_step == 0:
            self._evaluate(0)
        self._restart_clock(first_step)
        with StopOnSignal() as stop:
            batches = self._timed(self.loader.steps(first_step))
            while done < self.steps:
                micro_batches, stopping = self._agree(next(batches), stop.requested)

                # ------------------------------------------------------------------------------------ one training step
                losses: dict[str, Tensor] = {}
                reports: dict[str, tuple[Tensor, Tensor]] = {}
                for batch in micro_batches:
                    output = self.engine(batch)
                    self.engine.backward(sum(output.losses.values()))
                    _accumulate(losses, reports, output, share=1 / len(micro_batches))
                self.engine.step(self.lr_factor(done))
                # -----------------------------------------------------------------------------------------------------

                self._watch(losses, done + 1)
                done += 1
                self.tracker.advance()
                last = stopping or done == self.steps
                if done % self.log_every == 0 or last:
                    self._log(done, losses, reports, micro_batches[-1])
                is_best = False
                if self.eval_every and (done % self.eval_every == 0 or done == self.steps):
                    is_best = self._is_best(done, self._evaluate(done))
                if done % self.save_every == 0 or last or is_best:
                    self._save(done)
                if stopping and done < self.steps:
                    self.tracker.event(done, "stopped", signal=stop.name)
                    self.tracker.say(f"stopped by a signal after step {done}; the same command goes on from there")
                    break
        return done

    def _timed(self, steps: Iterator[StepBatches]) -> Iterator[StepBatches]:
        """The same steps; the clock runs while one is waited for."""
        while True:
            started = time.monotonic()
            batches = next(steps)
            self._waited += time.monotonic() - started
            yield batches

    def _agree(self, step: StepBatches, stop: bool) -> tuple[list[Batch], bool]:
        """What ranks must agree on before a step: token count, padding, skips, and whether it is the last one."""
        batches = step.micro_batches
        own = [sum(b.num_target_tokens for b in batches), len(step.skips), step.num_read]
        tokens, skips, read = self.ranks.sum_ints(own)
        *lengths, stopping = self.ranks.max_ints([*(b.text_length for b in batches), int(stop)])
        self._skips += skips
        self._counts = step.counts
        everyones = step.skips
        if skips:
            everyones = [skip for own in self.ranks.gather_objects(list(step.skips)) for skip in own]
            for skip in everyones:
                self.tracker.event(step.step + 1, "skip", **vars(skip))
        self.loader.skip_monitor.update(read, skips, everyones)
        agreed = [
            b.agreed(step_target_tokens=tokens, text_length=length).to(self.device)
            for b, length in zip(batches, lengths, strict=True)
        ]
        return agreed, bool(stopping)

    def _watch(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Remembers on the device whether every loss was finite; asking costs a wait, so on a GPU only `_log` asks."""
        for loss in losses.values():
            self._finite &= torch.isfinite(loss)
        if self.device.type == "cpu":
            self._require_finite(losses, step)

    def _require_finite(self, losses: Mapping[str, Tensor], step: int) -> None:
        if not bool(self._finite):
            values = ", ".join(f"{name} {float(value)}" for name, value in losses.items())
            raise ValueError(
                f"a loss is not finite at step {step} or since the last log line ({values}).  Nothing was saved since. "
                f"Lower train.optim.lr, or try train.precision=fp32; the newest checkpoint is {self.checkpoints.folder}"
            )

    def _log(
        self, step: int, losses: Mapping[str, Tensor], reports: Mapping[str, tuple[Tensor, Tensor]], batch: Batch
    ) -> None:
        """Values of this very step (no running means: a resumed run must write the same), speeds since the last."""
        self._require_finite(losses, step)
        names, kinds = sorted(losses), sorted(reports)
        flat = [losses[n] for n in names] + [reports[k][i] for k in kinds for i in (0, 1)]
        summed = self.ranks.sum(torch.stack([value.float() for value in flat])).tolist()
        values = {n: value / self.ranks.count for n, value in zip(names, summed[: len(names)], strict=True)}
        values = {"loss": math.fsum(values.values()), **{n: values[n] for n in losses}}
        for k, total, count in zip(kinds, summed[len(names) :: 2], summed[len(names) + 1 :: 2], strict=True):
            if k.startswith("num_"):  # a total, see `data.batch.Report`
                values[k] = total
            elif count:  # a language without a row in this step has no mean
                values[k] = total / count
        if not all(map(math.isfinite, (values[n] for n in ("loss", *names)))):
            raise ValueError(f"a loss is not finite at step {step}: { {n: values[n] for n in names} }")
        rates = self.engine.learning_rates
        values["lr"] = next(iter(rates.values()))
        if len(set(rates.values())) > 1:
            values.update({f"lr/{name}": rate for name, rate in rates.items()})
        values["grad_norm"] = self.engine.grad_norm
        values["skips"] = self._skips
        counts = sum((Counter(own) for own in self.ranks.gather_objects(dict(self._counts))), Counter())
        values.update({f"data/{name}": count for name, count in sorted(counts.items())})
        values.update(self._speeds(step, batch))
        self.tracker.train(step, values)

    def _speeds(self, step: int, batch: Batch) -> dict[str, float]:
        seconds = max(time.monotonic() - self._clock, 1e-9)
        rate = (step - self._clock_step) * self.global_batch_size / seconds
        speeds = {"samples_per_second": rate, "data_wait": min(1.0, self._waited / seconds)}
        if self.flops_per_sample is not None:
            speeds["tflops"] = self.flops_per_sample(batch) * rate / self.ranks.count / 1e12
            if self.device.type == "cuda":
                peak = peak_tflops(torch.cuda.get_device_name(self.device))
                if peak is not None:
                    speeds["peak_share"] = speeds["tflops"] / peak
        if self.device.type == "cuda":
            speeds["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._restart_clock(step)
        return speeds

    def _restart_clock(self, step: int) -> None:
        self._clock, self._clock_step, self._waited = time.monotonic(), step, 0.0

    def _is_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """The first rank decides.  A number that nobody measured ends the run, after what was trained is saved."""
        if self.best is None:
            return False
        missing = self.best.why_missing(metrics)
        if missing:
            self._save(step)
            raise ValueError(f"{missing}.  What was trained is saved")
        is_best = self.ranks.broadcast_object(self.best.sees(step, metrics))
        if is_best:
            self.tracker.event(step, "best", **{self.best.name: metrics[self.best.name]})
        return is_best

    def _evaluate(self, step: int) -> dict[str, float]:
        """All ranks together; the random states come out as they went in, so that evaluating changes no training.

        -> EVALUATOR/NAME: value
        """
        before = random_state()
        measured: dict[str, float] = {}
        predictions = Predictions(self.ranks)
        with self.engine.evaluating():
            for evaluator in self.evaluators:
                found = evaluator(
                    self.engine.module.model, device=self.device, ranks=self.ranks, predictions=predictions
                )
                self.tracker.eval(step, evaluator.name, found.metrics, found.pictures, found.lines)
                measured |= {f"{evaluator.name}/{name}": value for name, value in found.metrics.items()}
        self.tracker.predicted(step, predictions, measured)
        set_random_state(*before)
        self.engine.module.train()
        self._restart_clock(step)
        return measured

    def _save(self, step: int) -> None:
        if not bool(self._finite):
            raise ValueError(f"a loss was not finite before step {step}: this checkpoint would be worthless, not saved")
        data = {"next_step": step, "fingerprint": self.loader.fingerprint(), "skips": self._skips}
        state: dict[str, Any] = {**self.checkpoint_state, "data": data}
        state["best"] = None if self.best is None else self.best.state
        folder = self.checkpoints.save(self.engine, step, state, self.config_yaml)
        self.tracker.event(step, "saved", checkpoint=folder.name)
        self._restart_clock(step)


class StopOnSignal:
    """SIGTERM and SIGINT ask for a checkpoint after the running step; Ctrl-C once more ends the process at once.

    Launchers pass on a Ctrl-C that the terminal has sent to every process already, so one that follows within two
    seconds is the same one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested, self.name, self._since = False, "", 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.name, self._since = True, signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _accumulate(
    losses: dict[str, Tensor], reports: dict[str, tuple[Tensor, Tensor]], output: Any, *, share: float
) -> None:
    """Losses average over micro-batches, sums and counts of reports add up; all stays on the device."""
    for name, loss in output.losses.items():
        part = loss.detach().reshape(()) * share
        losses[name] = losses[name] + part if name in losses else part
    for name, (total, count) in output.report.items():
        before = reports.get(name)
        reports[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
