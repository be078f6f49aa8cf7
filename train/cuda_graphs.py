"""CUDA graphs: a pass whose kernels are the same every time is recorded once a shape and replayed as one launch.

On a small micro-batch a step lasts as long as the host needs to launch its kernels (2,000 to 20,000 of them), not as
long as the GPU needs to run them.  A recording holds forward and backward; a replay costs a handful of launches.  It is
applied from outside, like parallelism: a model names such passes (`recordable`) and knows nothing of recordings.

`torch.cuda.make_graphed_callables` is the same idea, but the gradients that it hands out are the recording's own
memory, which the next micro-batch overwrites; parameters count as inputs, frozen ones too; and other threads (the
loader's, NCCL's) may not touch CUDA while it records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

MAX_TRAINED = 500_000_000  # parameters: their gradients are there twice
MAX_SHAPES = 24  # each keeps its inputs and output, and some MB of the driver's; further shapes run as they are

Recorder = Callable[[Callable[[], None], "RecordedPass"], Callable[[], Any]]


def use(model: Any, *, max_rows: int, record: Recorder | None = None) -> list[str]:
    """From now on the passes that `model.recordable()` names (none without that method) are recorded and replayed.

    For inputs of 1 to `max_rows` rows, and only where gradients are on: evaluation and generation run as they are.
    -> the names of these passes
    """
    found = []
    for one in getattr(model, "recordable", list)():
        call = getattr(one.owner, one.method)
        recorded = RecordedPass(call, one.modules, max_rows=max_rows, unless=one.unless, record=record)
        if sum(parameter.numel() for parameter in recorded.parameters) <= MAX_TRAINED:
            setattr(one.owner, one.method, recorded)
            found.append(f"{type(one.owner).__name__}.{one.method}")
    return found


class RecordedPass:
    """`call`, a function of tensors to one tensor, replayed for each shape that it has seen.

    What it does may depend on its inputs' values by arithmetic on the device only, and on nothing that changes during a
    training: not on modules' train() and eval(), say.  Activations stay in memory that recordings share with one
    another, and with nobody else, so a backward pass has to come before the next forward pass.

    Args:
        modules: all whose parameters `call` reads; those that train are fp32.
        unless: says of which inputs there is to be no recording.
        record: runs a function once, -> one that does the same again; a CUDA graph (for tests: a plain call).
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        modules: Sequence[nn.Module],
        *,
        max_rows: int,
        unless: Callable[..., bool] | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.call, self.modules, self.max_rows, self.unless = call, list(modules), max_rows, unless
        every = {id(p): p for module in modules for p in module.parameters()}  # once, though modules share it
        self.every = list(every.values())
        self.parameters = [parameter for parameter in self.every if parameter.requires_grad]
        self.record = record or record_cuda_graph
        self.pool: Any = None
        self.recordings: dict[Any, _Recording] = {}
        self.pointers: list[int] = []
        self.flat: Tensor | None = None  # the gradients of all parameters, so that one launch copies them
        self.passes = 0
        self.told = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not 0 < len(inputs[0]) <= self.max_rows:
            return self.call(*inputs)
        if self.unless is not None and self.unless(*inputs):
            return self.call(*inputs)
        pointers = [parameter.data_ptr() for parameter in self.every]
        if pointers != self.pointers:  # a recording reads and writes addresses
            self.recordings, self.pointers = {}, pointers
        on = inputs[0].device.type
        autocast = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else None
        key = (autocast, *((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs))
        if key not in self.recordings:
            if len(self.recordings) == MAX_SHAPES:
                self._tell_once()
                return self.call(*inputs)
            self.recordings[key] = _Recording(self, inputs)
        self.passes += 1
        recording = self.recordings[key]
        if recording.wanted:
            return _Replay.apply(recording, *inputs, *self.parameters)
        return recording.replay_forward(inputs)

    def _tell_once(self) -> None:
        if not self.told:
            name = getattr(self.call, "__qualname__", self.call)
            log.warning(
                f"{name} came in {MAX_SHAPES} shapes, each a CUDA graph now; further ones run without, slower: "
                f"data.loader.pad_to_multiple_of=32 makes lengths few"
            )
        self.told = True

    @contextmanager
    def trains(self, stand_ins: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the modules have these in place of their trained parameters.

        autograd notes on which stream a parameter was first used, for as long as anybody remembers that (DeepSpeed for
        ever), and would wait for that stream in the middle of a recording.
        """
        instead = {id(p): stand_in for p, stand_in in zip(self.parameters, stand_ins, strict=True)}
        owners = {id(module): module for root in self.modules for module in root.modules()}.values()
        places = [(m._parameters, name, p) for m in owners for name, p in m._parameters.items() if id(p) in instead]
        for parameters, name, parameter in places:
            parameters[name] = instead[id(parameter)]
        try:
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter

    def stand_ins(self) -> list[nn.Parameter]:
        """Other parameters in the same memory."""
        return [nn.Parameter(parameter.detach()) for parameter in self.parameters]

    def flat_gradients(self) -> Tensor:
        if self.flat is None:
            self.flat = self.parameters[0].new_zeros(sum(parameter.numel() for parameter in self.parameters))
        return self.flat

    def parts(self, flat: Tensor) -> list[Tensor]:
        """-> views of `flat`, one for each parameter"""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]


class _Recording:
    """Forward and backward for one shape."""

    def __init__(self, whole: RecordedPass, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        self.whole = whole
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.autocast = partial(
            torch.autocast,
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,  # a weight that was cast before the recording would be gone at the replay
        )
        self._graph: Tensor | None = None  # autograd's, between the two recordings
        self.parameters = whole.stand_ins()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._try_out(device)
            self.forward = whole.record(self._run_forward, whole)
            self.backward = whole.record(self._run_backward, whole) if self.wanted else None
        self._graph = None

    def _try_out(self, device: torch.device) -> None:
        """Runs both passes once: libraries start up, and it comes to light what has a gradient."""
        stand_ins = self.whole.stand_ins()
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in self.inputs]
        with _beside(device), self.whole.trains(stand_ins):
            with self.autocast():
                output = self.whole.call(*inputs)
            self.output = torch.empty_like(output)
            self.wanted: list[Tensor] = []
            if not output.requires_grad:
                return
            leaves = [*(x for x in inputs if x.requires_grad), *stand_ins]
            gradients = torch.autograd.grad(output, leaves, torch.zeros_like(output), allow_unused=True)
        has = [gradient is not None for gradient in gradients]
        candidates = [*(x for x in self.inputs if x.requires_grad), *self.parameters]
        of_inputs = [torch.empty_like(x) for x in self.inputs if x.requires_grad]
        of_parameters = self.whole.parts(self.whole.flat_gradients()) if self.whole.parameters else []
        self.wanted = [x for x, it_has in zip(candidates, has, strict=True) if it_has]
        self.gradients = [g for g, it_has in zip([*of_inputs, *of_parameters], has, strict=True) if it_has]
        self.grad_output = torch.empty_like(output)

    def _run_forward(self) -> None:
        with torch.enable_grad(), self.autocast(), self.whole.trains(self.parameters):
            self._graph = self.whole.call(*self.inputs)
        self.output.copy_(self._graph.detach())

    def _run_backward(self) -> None:
        assert self._graph is not None
        with self.whole.trains(self.parameters):  # for blocks that are recomputed
            found = torch.autograd.grad(self._graph, self.wanted, self.grad_output)
        for mine, new in zip(self.gradients, found, strict=True):
            mine.copy_(new)

    def replay_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """-> a copy: the next replay overwrites what is here"""
        with torch.no_grad():
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
        self.forward()
        return self.output.clone()

    def replay_backward(self, grad_output: Tensor) -> list[Tensor | None]:
        """-> copies of the gradients of inputs and parameters, None where there is none"""
        assert self.backward is not None
        self.grad_output.copy_(grad_output)
        self.backward()
        wanted = {id(x) for x in self.wanted}
        of_inputs = iter(self.gradients)
        found = [next(of_inputs).clone() if id(x) in wanted else None for x in self.inputs]
        of_parameters = self.whole.parts(self.whole.flat_gradients().clone()) if self.whole.parameters else []
        return [
            *found,
            *(g if id(x) in wanted else None for x, g in zip(self.parameters, of_parameters, strict=True)),
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: _Recording, *tensors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.recording, ctx.number = recording, recording.whole.passes
        return recording.replay_forward(tensors[: len(recording.inputs)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        if ctx.number != ctx.recording.whole.passes:
            raise RuntimeError(
                "a pass that is replayed as a CUDA graph ran again before its backward pass, and its activations are "
                "overwritten: set train.cuda_graphs=0"
            )
        return None, *ctx.recording.replay_backward(grad_output)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On another stream: what a library does at its first call must not be recorded with the default one."""
    if device.type != "cuda":
        yield
        return
    stream, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(own)
    with torch.cuda.stream(stream):
        yield
    own.wait_stream(stream)


def record_cuda_graph(run: Callable[[], None], whole: RecordedPass) -> Callable[[], Any]:
    """All of a `RecordedPass` share one pool of memory: what a recording needed is free for the next."""
    whole.pool = whole.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=whole.pool, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        raise RuntimeError(f"recording a CUDA graph failed; train.cuda_graphs=0 does without: {error}") from error
    return graph.replay
