"""The X-ray recipes: nothing of held-out patients and pictures is in any stage, and the chain runs from end to end.

Which pictures are held out is worked out here from the data itself, not by the code that the recipes use.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from data.source.visualglm_json import VisualGLMJson
from model.weights import initialise
from tests.conftest import ROOT
from train.config import build, compose

CHAIN = {
    "stage_one/xray": "pretrain",
    "stage_two/xray": "finetune",
    "finetune/xray_vqa": "finetune",
    "finetune/xray_report": "finetune",
}
WARNING = "not for clinical use"


@dataclass(frozen=True)
class Part:
    """Of both folders: what belongs together, the pictures' bytes, what is asked and answered."""

    groups: frozenset[str]
    pictures: frozenset[str]
    texts: frozenset[str]


@pytest.fixture(scope="module")
def shared(shared_dir: Path) -> Path:
    if not (shared_dir / "data/xray/records.jsonl").is_file() or not (shared_dir / "data/xray_vqa/qa.jsonl").is_file():
        pytest.skip(f"no X-rays in {shared_dir / 'data'} (set QUEQIAO_SHARED)")
    return shared_dir


@pytest.fixture(scope="module")
def parts(shared: Path) -> dict[str, Part]:
    """A fifth is held out, by the first eight bytes of SHA-256 of the patient or the picture's name."""
    found: dict[str, tuple[set[str], set[str], set[str]]] = {
        "train": (set(), set(), set()),
        "test": (set(), set(), set()),
    }
    for folder, file, group_field in (
        ("xray", "records.jsonl", "patient_id"),
        ("xray_vqa", "qa.jsonl", "image_id"),
    ):
        for line in (shared / "data" / folder / file).read_text("utf-8").splitlines():
            row = json.loads(line)
            place = int.from_bytes(sha256(row[group_field].encode()).digest()[:8], "big")
            groups, pictures, texts = found["test" if place < 2**64 // 5 else "train"]
            groups.add(row[group_field])
            pictures.add(sha256((shared / "data" / folder / row["image"]).read_bytes()).hexdigest())
            texts.update(row[name].strip() for name in ("report_en", "finding", "view") if row.get(name))
            if "question_en" in row:
                texts.add(f"{row['question_en'].strip()} {row['answer_en'].strip()}")
    return {name: Part(*map(frozenset, sets)) for name, sets in found.items()}


def composed(experiment: str) -> DictConfig:
    return compose(CHAIN[experiment], [f"experiment={experiment}"])


@pytest.fixture(scope="module")
def configs(shared: Path) -> Iterator[dict[str, DictConfig]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUEQIAO_SHARED", str(shared))
        yield {experiment: composed(experiment) for experiment in CHAIN}


def read(source: Any) -> Iterator[tuple[str, str, list[str]]]:
    """(group, hash of the picture, texts) of every sample."""
    asked = getattr(source, "dialogues", None) if not callable(getattr(source, "dialogues", None)) else source
    assert asked is not None
    for language in source.languages:
        for index in range(source.num_samples(language)):
            sample = source.read(language, index)
            images = getattr(sample, "images", None) or (sample.image,)
            turns = [turn for dialogue in asked.dialogues(language, index) for turn in dialogue.turns]
            texts = [text for turn in turns for text in (turn.answer, f"{turn.question} {turn.answer}")]
            for image in images:
                yield asked.group_of(language, index), sha256(image).hexdigest(), texts


def test_the_data_has_no_picture_on_both_sides(parts: dict[str, Part]) -> None:
    train, test = parts["train"], parts["test"]
    assert len(train.pictures) + len(test.pictures) == 313 + 86, "and none occurs twice, in one folder or in both"
    assert not train.pictures & test.pictures and not train.groups & test.groups
    assert len(test.groups) > 40 and len(test.pictures) > 80


@pytest.mark.parametrize("experiment", CHAIN)
def test_no_stage_trains_on_held_out_pictures(
    configs: dict[str, DictConfig], parts: dict[str, Part], experiment: str
) -> None:
    train, test = parts["train"], parts["test"]
    only_held_out = test.texts - train.texts
    assert len(only_held_out) > 150
    nodes = {name: node for name, node in configs[experiment].data.source.items() if node is not None}
    assert nodes
    for name, node in nodes.items():
        seen = list(read(build(node)))
        assert len(seen) > 100, name
        for group, picture, texts in seen:
            assert group in train.groups and group not in test.groups, f"{name}: {group}"
            assert picture in train.pictures and picture not in test.pictures, f"{name}: a picture of {group}"
            assert not only_held_out.intersection(texts), f"{name}: a text of {group}"


@pytest.mark.parametrize("experiment", CHAIN)
def test_every_evaluator_asks_about_held_out_pictures_alone(
    configs: dict[str, DictConfig], parts: dict[str, Part], experiment: str
) -> None:
    evaluators = configs[experiment].train.evaluator
    assert evaluators
    for name, node in evaluators.items():
        seen = list(read(build(node.source)))
        assert len(seen) > 40, name
        for group, picture, _ in seen:
            assert group in parts["test"].groups and picture in parts["test"].pictures, f"{name}: {group}"


@pytest.mark.parametrize("experiment", [name for name, entry in CHAIN.items() if entry == "finetune"])
def test_the_language_model_warms_up_on_the_training_part_alone(
    configs: dict[str, DictConfig], parts: dict[str, Part], experiment: str
) -> None:
    from finetune import some_dialogues

    sources = {name: build(node) for name, node in configs[experiment].data.source.items()}
    dialogues, descriptions = some_dialogues(sources)
    assert len(descriptions) == len(dialogues)
    assert len(dialogues) >= sum(source.num_samples("en") for source in sources.values())
    for dialogue in dialogues:
        assert dialogue.language == "en"
        (turn,) = dialogue.turns
        assert turn.answer in parts["train"].texts or f"{turn.question} {turn.answer}" in parts["train"].texts
        assert turn.answer not in parts["test"].texts - parts["train"].texts


def test_each_stage_starts_from_the_one_before(configs: dict[str, DictConfig]) -> None:
    one, two = configs["stage_one/xray"], configs["stage_two/xray"]
    assert not one.model.vision.frozen and two.model.vision.frozen, "the encoder trains along in stage one alone"
    assert two.model.weights.stage_one == one.run.dir
    for name in ("finetune/xray_vqa", "finetune/xray_report"):
        model = configs[name].model
        assert model.weights.vision == one.run.dir and model.weights.stage_one == two.run.dir
        assert model.llm.folder == two.model.llm.folder == f"{two.run.dir}/llm"
        assert model.adapter._target_ == "model.adapter.Lora" and model.vision.frozen


def test_whatever_is_about_x_rays_says_what_it_is_not_for() -> None:
    files = [
        path for path in (ROOT / "configs").rglob("*.yaml") if "xray" in path.name and path.name != "xrayglm_json.yaml"
    ]
    assert len(files) >= 11
    for path in files:
        head = " ".join(line.strip("# ") for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
        assert WARNING in head, path
    for experiment in CHAIN:
        for name, node in composed(experiment).train.evaluator.items():
            assert WARNING in node.note, f"{experiment}: {name}"
    for name in ("README.md", "docs/results.md"):
        assert WARNING in (ROOT / name).read_text("utf-8").casefold(), name
    assert "不用于临床" in (ROOT / "README_zh.md").read_text("utf-8")


def test_the_lines_of_the_readme_are_right() -> None:
    section = (ROOT / "README.md").read_text("utf-8").split("## Fine-tuning on your own X-rays\n")[1].split("\n## ")[0]
    commands = [
        shlex.split(line) for line in section.splitlines() if " experiment=" in line and line.startswith("python")
    ]
    assert {word.removeprefix("experiment=") for words in commands for word in words} >= set(CHAIN)
    for words in commands:
        config = compose("finetune" if "finetune.py" in words else "pretrain", [word for word in words if "=" in word])
        if "finetune/visualglm_lora" in words[2]:
            assert config.data.source.mine.group == "patient_id" and config.data.source.mine.part == "train"
    (row,) = [json.loads(line) for line in section.splitlines() if line.startswith("{")]
    (turn,) = VisualGLMJson.conversation(VisualGLMJson.__new__(VisualGLMJson), row).turns
    assert (turn.question, turn.answer) == (row["prompt"], row["label"]) and row["patient_id"]


# --------------------------------------------------------------------------------------------- the chain, made tiny

TINY = (
    "run.device=cpu run.threads=1 run.wandb.mode=disabled data.loader.num_workers=0 data.transform.image_size=32 "
    "model.vision.image_size=32 model.vision.num_layers=1 model.vision.width=16 model.vision.num_heads=2 "
    "model.vision.mlp_width=16 model.qformer.num_layers=1 model.qformer.hidden_size=16 model.qformer.num_heads=2 "
    "model.qformer.intermediate_size=16 model.qformer.num_query_tokens=2 train.global_batch_size=4 train.steps=2 "
    "train.log_every=1 train.eval_every=2"
).split()
TINY_LLM = (
    "model.llm.hidden_size=16 model.llm.num_layers=1 model.llm.num_heads=2 model.llm.inner_size=16 model.llm.steps=2 "
    "model.llm.batch_size=4 model.llm.max_pieces=400"
).split()


def few(*evaluators: str) -> list[str]:
    return [f"train.evaluator.{e}.{what}" for e in evaluators for what in ("num_samples=12", "max_new_tokens=2")]


def run(shared: Path, *words: str) -> str:
    env = {**os.environ, "QUEQIAO_SHARED": str(shared), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, *TINY], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_the_chain_runs_from_end_to_end(shared: Path, tmp_path: Path) -> None:
    one, two, vqa = (tmp_path / name for name in ("one", "two", "vqa"))
    said = run(
        shared, "-m", "train.pretrain", "experiment=stage_one/xray", f"run.dir={one}",
        "train.evaluator.unseen_reports.num_samples=8",
    )  # fmt: skip
    assert "unseen_reports en: pool of 8 images" in said and WARNING in said
    said = run(
        shared, "finetune.py", "experiment=stage_two/xray", f"run.dir={two}", f"model.weights.stage_one={one}",
        *TINY_LLM, *few("xray_vqa", "xray_report", "xray_finding", "xray_view"),
    )  # fmt: skip
    assert "a small language model learns" in said
    said = run(
        shared, "finetune.py", "experiment=finetune/xray_vqa", f"run.dir={vqa}", f"model.weights.vision={one}",
        f"model.weights.stage_one={two}", f"model.llm.folder={two}/llm", *few("xray_vqa"),
    )  # fmt: skip
    assert "a small language model learns" not in said, "it is stage two's"
    loaded = said.split("parameter group")[0]
    assert "FROZEN AND RANDOM" not in loaded and "  new " not in loaded, (
        "encoder, Q-Former and projection are all there"
    )
    assert_encoder_of(one)
    table = said[said.index("measured  ") :]
    for measure in ("closed/normalised_match", "closed/majority", "open/13a/bleu_4", "open/13a/rouge_l"):
        assert f"xray_vqa/en/{measure} " in table
    assert WARNING in table
    assert (vqa / "adapter/adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (vqa / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2]
    assert all(0.5 < line["en/closed/majority"] <= 1 for line in lines if line["kind"] == "eval")


def assert_encoder_of(stage_one: Path) -> None:
    """`model.weights.vision` takes the encoder out of a run, whole, and nothing else of it."""
    overrides = [word for word in TINY if word.startswith("model.vision.")]
    holder = torch.nn.Module()
    holder.vision = build(compose("finetune", ["experiment=finetune/xray_vqa", *overrides]).model.vision)
    report = initialise(holder, vision=str(stage_one))
    expected = load_file(stage_one / "checkpoints/latest/weights.safetensors")
    assert not report.new and len(report.loaded) == sum(name.startswith("model.vision.") for name in expected) > 10
    for name, parameter in holder.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"]), name
