"""Which parameter is decayed, at which learning rate, and how the rate moves: all of it visible before step 0."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


def decays(name: str, parameter: Tensor, *, temperature_decay: bool) -> bool:
    """LAVIS' rule (`blip2.py`, get_optimizer_params at HEAD): vectors and biases do not decay, everything else does.

    LAVIS' temperature is a 0-dim tensor, so its rule decays it, which over 250k steps halves it were no gradient to
    oppose.  Ours has shape (1,), counts as a vector, and decays only when parity with LAVIS is asked for.
    """
    if "temperature" in name.split("."):
        return temperature_decay
    return not (parameter.ndim <= 1 or name.endswith(".bias"))


def parameter_groups(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    temperature_decay: bool = False,
    part_lr: Mapping[str, float] | None = None,
) -> list[ParameterGroup]:
    """Groups of the trainable parameters, in a stable order.

    `part_lr` maps the beginning of a parameter's name ("model.vision") to a peak learning rate of its own; the longest
    beginning wins.  One that fits no trainable parameter is an error, since it would silently do nothing.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    scalars = [name for name, p in trainable if p.ndim == 0]
    assert not scalars, f"0-dim parameters crash deepspeed.initialize, give them shape (1,): {scalars}"

    parts = dict(part_lr or {})
    members: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable:
        part = max((p for p in parts if name == p or name.startswith(p + ".")), key=len, default="")
        members.setdefault((part, decays(name, parameter, temperature_decay=temperature_decay)), []).append(
            (name, parameter)
        )
    unused = [part for part in parts if not any(part == key[0] for key in members)]
    if unused:
        raise ValueError(_why_unused(unused, [name for name, _ in trainable], [name for name, _ in named_parameters]))
    return [
        ParameterGroup(
            name=f"{part or 'everything'}{'' if decay else ', no decay'}",
            names=tuple(name for name, _ in entries),
            parameters=tuple(p for _, p in entries),
            lr=parts.get(part, lr),
            weight_decay=weight_decay if decay else 0.0,
        )
        for (part, decay), entries in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _why_unused(parts: Sequence[str], trainable: Sequence[str], everything: Sequence[str]) -> str:
    def beginnings(names: Sequence[str]) -> dict[str, None]:
        words = [name.split(".") for name in names]
        return {".".join(name[:length]): None for name in words for length in range(1, len(name) + 1)}

    hints = []
    for part in parts:
        if part in beginnings(everything):
            hints.append(f"{part} is frozen" if part not in beginnings(trainable) else f"all of {part} has other rates")
        elif near := difflib.get_close_matches(part, beginnings(trainable), n=1):
            hints.append(f"perhaps {near[0]}")
    told = f" ({', '.join(hints)})" if hints else ""
    tops = sorted({".".join(name.split(".")[:2]) for name in trainable})
    return f"train.optim.part_lr: {list(parts)} begin no trainable parameter{told}; the parts are {tops}"


def groups_table(groups: Sequence[ParameterGroup]) -> str:
    """What `parameter_groups` decided, for people."""
    rows = [("parameter group", "tensors", "parameters", "peak lr", "weight decay")]
    for group in groups:
        numel = sum(_numel(p) for p in group.parameters)
        rows.append((group.name, f"{len(group.names):,}", f"{numel:,}", f"{group.lr:g}", f"{group.weight_decay:g}"))
    return format_table(rows)


def lr_factor(step: int, *, steps: int, warmup_steps: int, warmup_start: float, final: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine per step down to `final`.

    The BLIP-2 paper's schedule (section 3.4).  LAVIS' code moves the cosine per epoch, which is not this.
    The peak is reached at step `warmup_steps`, `final` at the last step, `steps - 1`.
    """
    if step < warmup_steps:
        return warmup_start + (1.0 - warmup_start) * step / warmup_steps
    span = max(1, steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned table: the first row is the head, the first column words, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def _numel(parameter: Tensor) -> int:
    # Under ZeRO-3 a parameter is an empty tensor that remembers its size.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
