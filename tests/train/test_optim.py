"""Parameter groups follow LAVIS' rule; the learning rate is a pure function of the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.optim import groups_table, lr_factor, parameter_groups
from train.run import flat_rates


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.word = nn.Embedding(6, 4)
        self.query_tokens = nn.Parameter(torch.zeros(1, 2, 4))
        self.temperature = nn.ParameterDict({"value": torch.ones(1)})
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def by_decay(groups: list) -> dict[float, set[str]]:
    return {decay: {n for g in groups if g.weight_decay == decay for n in g.names} for decay in (0.0, 0.05)}


@pytest.mark.parametrize("temperature_decay", [False, True])
def test_lavis_rule(temperature_decay: bool) -> None:
    named = list(Model().named_parameters())
    # LAVIS, blip2.py get_optimizer_params, on its own shapes: the temperature is 0-dim there, all others are as here.
    expected: dict[float, set[str]] = {0.0: set(), 0.05: set()}
    for name, parameter in named:
        if parameter.requires_grad:
            shape = () if name == "temperature.value" and temperature_decay else parameter.shape
            expected[0.0 if len(shape) == 1 or name.endswith(".bias") else 0.05].add(name)
    groups = parameter_groups(named, lr=1e-4, weight_decay=0.05, temperature_decay=temperature_decay)
    assert by_decay(groups) == expected


def test_parts_have_their_own_peak_and_the_longest_name_wins() -> None:
    model = nn.ModuleDict({"model": Model()})
    groups = parameter_groups(
        list(model.named_parameters()),
        lr=1e-4,
        weight_decay=0.05,
        part_lr={"model": 2e-4, "model.vision": 3e-5},
    )
    peaks = {name: group.lr for group in groups for name in group.names}
    assert peaks == {name: 3e-5 if ".vision." in name else 2e-4 for name in peaks}
    with pytest.raises(ValueError, match=r"\['model\.visio'\] begin no trainable parameter.*model\.vision"):
        parameter_groups(list(model.named_parameters()), lr=1e-4, weight_decay=0.05, part_lr={"model.visio": 1e-5})


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("model.visoin", r"no trainable parameter \(perhaps model.vision\)"),
        ("model.vision.wieght", r"\(perhaps model.vision.weight\)"),
        ("vision", r"\(perhaps model.vision\)"),
        ("model.frozen", r"\(model.frozen is frozen\)"),
        ("zzz", r"no trainable parameter; the parts are \['model.norm'"),
    ],
)
def test_a_part_that_is_none_is_told_with_the_nearest(part: str, expected: str) -> None:
    model = nn.ModuleDict({"model": Model()})
    with pytest.raises(ValueError, match=expected):
        parameter_groups(list(model.named_parameters()), lr=1e-4, weight_decay=0.05, part_lr={part: 1e-5})


@pytest.mark.parametrize("rate", ["fast", True, None, -1e-4, [1e-4]])
def test_a_rate_that_is_none_is_told_with_its_key(rate: object) -> None:
    with pytest.raises(ValueError, match=r"train.optim.part_lr.model.vision is .*; expected a learning rate"):
        flat_rates({"model": {"vision": rate}})
    assert flat_rates({"model": {"vision": 1e-4}, "model.qformer": 0}) == {"model.vision": 1e-4, "model.qformer": 0.0}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(list(Model().requires_grad_(False).named_parameters()), lr=1e-4, weight_decay=0.05)


def test_table_counts_every_trainable_parameter() -> None:
    model = Model()
    table = groups_table(parameter_groups(list(model.named_parameters()), lr=1e-4, weight_decay=0.05))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = sum(int(line.split()[-3].replace(",", "")) for line in table.splitlines()[2:])
    assert counted == expected


def test_schedule_is_warm_up_and_torchs_cosine() -> None:
    steps, warmup = 50, 10
    shape = {"steps": steps, "warmup_steps": warmup, "warmup_start": 0.01, "final": 0.1}
    for step in range(warmup):
        assert lr_factor(step, **shape) == pytest.approx(0.01 + 0.99 * step / warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1 - warmup, eta_min=0.1)
    for step in range(warmup, steps):
        expected = cosine.get_last_lr()[0]
        assert lr_factor(step, **shape) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        cosine.step()
    assert math.isclose(lr_factor(steps - 1, **shape), 0.1)


def test_schedule_of_very_short_runs() -> None:
    for steps in (1, 2, 3):
        factors = [lr_factor(s, steps=steps, warmup_steps=2, warmup_start=0.0, final=0.1) for s in range(steps)]
        assert factors == [0.0, 0.5, 1.0][:steps]


def test_rates_of_parts_from_the_command_line_and_from_a_file() -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.create({"model.projection": 1e-3, "model": {"projection": 2e-3, "llm": {"network": 1}}})
    assert flat_rates(node) == {"model.projection": 2e-3, "model.llm.network": 1.0}  # type: ignore[arg-type]
    assert flat_rates({}) == {}
