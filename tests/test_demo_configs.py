"""The demo's later stages: who sees what, and that nothing which is evaluated was ever trained on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from data.source.synthetic import SceneSource
from train.config import build, compose


def made(experiment: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    config = compose("finetune", [f"experiment={experiment}"])
    sources = {name: build(node) for name, node in config.data.source.items()}
    plan = build(config.data.mixture).plan(sources, seed=config.run.seed)
    evaluated = {name: build(node.source) for name, node in config.train.evaluator.items()}
    return sources, plan, evaluated


@pytest.mark.parametrize(("experiment", "grey"), [("demo_stage_two", 0), ("demo_finetune", 24)])
def test_alignment_sees_no_grey_scene_and_fine_tuning_replays_one_row_in_four(experiment: str, grey: int) -> None:
    _, plan, _ = made(experiment)
    for step in (0, 1, 99):
        rows = plan.rows(step, 32)
        streams = [plan.streams[int(stream)] for stream in rows.stream]
        assert Counter(stream.source == "grey" for stream in streams)[True] == grey
        assert Counter(stream.language for stream in streams) == {"zh": 16, "en": 16}


def test_no_composition_that_is_evaluated_occurs_in_any_training() -> None:
    sources, _, evaluated = made("demo_finetune")
    assert evaluated.keys() == {"captions", "answers", "reports", "findings"}
    trained = {sources["scenes"].scenes.scene(i).name for i in range(sources["scenes"].num_samples("zh"))}
    trained |= {SceneSource(12000).scene(i).name for i in range(12000)}  # stage one
    trained |= {sources["grey"].scene(i).name for i in range(sources["grey"].num_samples("zh"))}
    for name, source in evaluated.items():
        scene = source.scene if name in ("reports", "findings") else source.scenes.scene
        names = {scene(i).name for i in range(source.num_samples("zh"))}
        assert len(names) == 128 and not names & trained, name
