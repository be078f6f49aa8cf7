"""Filling a model from a checkpoint, tensor by tensor, and telling what became of every one of them.

A format is a list of `Part`s: which tensor of the checkpoint goes where in the model.  A large frozen part is built
without memory, on the meta device; each of its tensors goes straight to its `Home` when it is read, so that the host
holds one of them at a time and never the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.weights.checkpoint import Checkpoint, examining, is_finite, too_large

Rows = tuple[int, int]


@dataclass(frozen=True)
class Home:
    """Where weights that were built without memory live once they are read.

    dtype: of those that do not train; None is what they were built in.
    keep: called with each weight that does not train as soon as it is there, keeps this rank's part of it (ZeRO-3).
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None
    keep: Callable[[nn.Parameter], None] | None = None


def send_home(model: nn.Module, home: Home) -> None:
    """Says where what is still without memory shall live; without this, on the CPU.  Quantised maps know it already
    (`model/quantise.py`)."""
    for parameter in model.parameters():
        if parameter.is_meta:
            setattr(parameter, _HOME, home)


_HOME, _OUTLINE = "home", "outline"  # on a parameter without memory; on one that is divided: what it was built as


def _outline(parameter: nn.Parameter) -> nn.Parameter | None:
    """What the parameter was built as, where its tensor has to arrive; None where there is memory to copy it to."""
    return parameter if parameter.is_meta else getattr(parameter, _OUTLINE, None)


@dataclass(frozen=True)
class Part:
    """`target` (of the model) <- the first of `sources` that the checkpoint has.

    block: parts of one block come together or not at all: a checkpoint with half a block is broken.
    target_rows: the source fills these rows only (LAVIS keeps the biases of q and v apart).
    source_rows: these rows of the source are taken (XLM-R's positions begin at 2).
    grow: the model may have more rows than the source; those stay new (tokens added to the vocabulary).
    """

    target: str
    sources: tuple[str, ...]
    block: str
    target_rows: Rows | None = None
    source_rows: Rows | None = None
    grow: bool = False


@dataclass
class LoadReport:
    """What became of the tensors; `str()` of it is the table that is printed at start.

    Keys of `loaded` and `new` are the model's names (with rows, where only some were meant), of `ignored` the
    checkpoint's; values are numbers of elements.
    """

    source: str
    loaded: dict[str, int] = field(default_factory=dict)
    new: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def then(self, later: LoadReport) -> LoadReport:
        """Of two loads one after the other: what the second brings is not new any more."""
        touched = {_whole(name) for name in later.loaded}
        earlier_new = {name: n for name, n in self.new.items() if _whole(name) not in touched}
        later_new = {name: n for name, n in later.new.items() if _whole(name) in touched}  # rows that were added
        earlier_loaded = {name: n for name, n in self.loaded.items() if _whole(name) not in touched}
        return LoadReport(
            f"{self.source}, then {later.source}",
            {**earlier_loaded, **later.loaded},
            {**earlier_new, **later_new},
            {**self.ignored, **later.ignored},
            self.notes + later.notes,
        )

    def __str__(self) -> str:
        rows = [("weights", "group", "tensors", "elements")]
        for status, names in (("loaded", self.loaded), ("new", self.new), ("ignored", self.ignored)):
            for group, (count, elements) in _grouped(names).items():
                rows.append((status, group, str(count), f"{elements:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"weights from {self.source}"]
        for a, b, c, d in rows:
            lines.append(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@torch.no_grad()
def fill(model: nn.Module, checkpoint: Checkpoint, parts: Iterable[Part], *, must: Iterable[str] = ()) -> LoadReport:
    """Copy what `parts` name; parts whose target the model lacks are left out.

    Args:
        must: blocks that the checkpoint has to have.
    Raises:
        ValueError: a shape that does not fit, a block that is there by half, one of `must` that is not there, or a
            tensor with NaN or infinity in it.
    """
    targets = dict(model.named_parameters())
    wanted = [part for part in parts if part.target in targets]
    present = _present_blocks(checkpoint, wanted, must)
    report = LoadReport(checkpoint.path)
    used: set[str] = set()
    for part in wanted:
        if part.block not in present:
            continue
        source = checkpoint.first_of(part.sources)
        assert source is not None
        used.update(name for name in part.sources if name in checkpoint.shapes)  # a tied copy is no leftover
        target = model.get_parameter(part.target)  # not of `targets`: an earlier part may have given it memory
        outline = _outline(target)
        if outline is None:
            _copy(target, part, checkpoint, source, report)
        else:
            _arrive(model, part, outline, checkpoint, source, report)
    touched = {_whole(name) for name in report.loaded}
    report.new.update({name: p.numel() for name, p in targets.items() if name not in touched})
    report.ignored = {name: _size(shape) for name, shape in checkpoint.shapes.items() if name not in used}
    return report


def _present_blocks(checkpoint: Checkpoint, parts: list[Part], must: Iterable[str]) -> set[str]:
    found: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for part in parts:
        side = missing if checkpoint.first_of(part.sources) is None else found
        side.setdefault(part.block, []).append(" or ".join(part.sources))
    for block, names in missing.items():
        if block in found:
            raise ValueError(
                f"{checkpoint.path}: the {block} does not fit the model's, {len(names)} of its tensors are missing "
                f"(first: {names[0]}). Is it another size (number of layers), or a file cut short?"
            )
    absent = [block for block in must if block not in found]
    if absent:
        raise ValueError(
            f"{checkpoint.path} has no {' and no '.join(absent)} under the names expected (such as "
            f"{missing[absent[0]][0] if absent[0] in missing else 'none that this model has'}); it has "
            f"{', '.join(sorted(checkpoint.shapes)[:3])}, ..."
        )
    return set(found)


def _copy(target: nn.Parameter, part: Part, checkpoint: Checkpoint, source: str, report: LoadReport) -> None:
    destination = target if part.target_rows is None else target[part.target_rows[0] : part.target_rows[1]]
    shape = checkpoint.shapes[source]
    if part.source_rows is not None:
        shape = (min(shape[0], part.source_rows[1]) - part.source_rows[0], *shape[1:])
    name = part.target
    rows = destination.shape[0]
    if part.grow and len(shape) == destination.dim() and 0 < shape[0] < rows:
        destination = destination[: shape[0]]
        report.new[f"{name} rows {shape[0]} to {rows - 1}"] = (target.numel() // rows) * (rows - shape[0])
        name = f"{name} rows 0 to {shape[0] - 1}"
    if _size(shape) != destination.numel() or (shape and tuple(destination.shape) != shape):
        taken = f"{list(shape)} of " if part.source_rows is not None else ""
        raise _misfit(part, target, checkpoint, source, taken)
    tensor = checkpoint.read(source)
    if part.source_rows is not None:
        tensor = tensor[part.source_rows[0] : part.source_rows[1]]
    destination.copy_(tensor.reshape(destination.shape))
    _require_finite(destination, part, checkpoint, source)
    if part.target_rows is not None:
        name = f"{name} rows {part.target_rows[0]} to {part.target_rows[1] - 1}"
    report.loaded[name] = destination.numel()


def _arrive(
    model: nn.Module, part: Part, outline: nn.Parameter, checkpoint: Checkpoint, source: str, report: LoadReport
) -> None:
    """A parameter that was built without memory gets it where it will live; a quantised map (model/quantise.py) takes
    the tensor in few bits, so that the whole of it is never there at once."""
    assert part.source_rows is None and not part.grow, part
    owner, _, name = part.target.rpartition(".")
    module = model.get_submodule(owner)
    receive = getattr(module, "receive", None)
    if receive is not None:
        if tuple(outline.shape) != checkpoint.shapes[source]:
            raise _misfit(part, outline, checkpoint, source)
        tensor = checkpoint.read(source)
        _require_finite(tensor, part, checkpoint, source)  # in few bits NaN is a number like any other
        receive(name, tensor)
        report.loaded[part.target] = outline.numel()
        return
    home: Home = getattr(outline, _HOME, Home())
    whole, frozen = part.target_rows is None, not outline.requires_grad
    make = torch.empty if whole else torch.zeros  # rows that no file has, as LAVIS's key bias, are 0
    arrived = nn.Parameter(make(outline.shape, dtype=outline.dtype, device=home.device), outline.requires_grad)
    _copy(arrived, part, checkpoint, source, report)
    if home.dtype not in (None, arrived.dtype) and frozen:
        arrived.data = arrived.data.to(home.dtype)
        _require_finite(arrived, part, checkpoint, source)
    setattr(module, name, arrived)
    if home.keep is not None and frozen and whole:
        home.keep(arrived)
        setattr(arrived, _OUTLINE, outline)


def _require_finite(arrived: Tensor, part: Part, checkpoint: Checkpoint, source: str) -> None:
    """Where it has arrived, so on a GPU in no time; only what is not finite is read again, to tell why."""
    if is_finite(arrived):
        return
    with examining():
        sound = checkpoint.read(source)
    raise too_large(sound, arrived.dtype, f"{source} of {checkpoint.path}", part.target)


def _misfit(part: Part, target: Tensor, checkpoint: Checkpoint, source: str, taken: str = "") -> ValueError:
    return ValueError(
        f"{part.target} is {list(target.shape)} in the model, {source} is {taken}{list(checkpoint.shapes[source])} in "
        f"{checkpoint.path}: they do not fit"
    )


def _whole(name: str) -> str:
    """The tensor's name, without which rows of it."""
    return name.partition(" rows ")[0]


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _grouped(names: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Layers under one star, a module's weight and bias together: a table that fits a screen."""
    groups: dict[str, tuple[int, int]] = {}
    for name, elements in names.items():
        group, _, rows = name.partition(" rows ")
        layered = re.match(r"(.*?\.)(\d+)\.([^.]+)", group)
        if layered:
            group = f"{layered[1]}*.{layered[3]}"
        else:
            group = re.sub(r"\.(weight|bias|gamma|beta)$", "", group)
            group = f"{group} rows {rows}" if rows else group
        count, total = groups.get(group, (0, 0))
        groups[group] = (count + 1, total + elements)
    return groups
