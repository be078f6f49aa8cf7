"""What a radiologist may have, through experiment=finetune/try_out: it is read, or named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.source.visualglm_json import VisualGLMJson
from tests.conftest import ROOT
from train.config import ConfigError, compose
from train.loading import build_sources

QUICK = ["train.steps=2", "train.eval_every=2", "model.llm.steps=4", "model.vision.num_layers=1"]


def chest(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Chinese names, 16-bit greyscale, a DICOM file, a missing picture, half of one, an empty answer, half a line."""
    (folder / "影像 2024").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(20):
        name = f"影像 2024/患者 {number // 2} 第{number}张.png"
        Image.fromarray(generator.integers(0, 4096, (40, 50)).astype(np.uint16)).save(folder / name)
        rows.append(
            {"img": name, "prompt": "这张片子显示了什么？", "label": "双肺未见实变。", "patient_id": number // 2}
        )
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(100))
    half = folder / rows[9]["img"]
    half.write_bytes(half.read_bytes()[:2000])
    rows[3]["img"], rows[5]["img"], rows[7]["label"] = "IM0001", "missing.png", ""
    file = folder / "reports.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n{"img": "cut', "utf-8")
    return file, rows


def test_what_cannot_be_used_is_named_and_the_rest_is_learned(tmp_path: Path) -> None:
    file, _ = chest(tmp_path)
    settings = {"path": file, "image_root": tmp_path, "group": "patient_id"}
    own = [f"data.source.mine.{key}={value}" for key, value in settings.items()]
    words = ["experiment=finetune/try_out", *own, *QUICK, f"run.dir={tmp_path / 'run'}", "data.max_skip_rate=0.4"]
    with pytest.raises(ValueError, match="row 8: field 'label': .* not empty.*: data.source.<name>.malformed=skip"):
        build_sources(compose("finetune", words))
    command = [sys.executable, "finetune.py", *words, "data.source.mine.malformed=skip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "mine: 2 malformed rows left out" in done.stderr and "row 21: expected a JSON value" in done.stderr
    told = [line for line in done.stderr.splitlines() if "pictures looked at" in line]
    assert any("IM0001 (row 4): DICOM file (export it as PNG)" in line for line in told)
    assert any("missing.png (row 6): no image" in line for line in told)
    assert any("第9张.png (row 10): truncated image" in line for line in told)
    assert "held_out/zh/normalised_match" in done.stdout and (tmp_path / "run/adapter/adapter_config.json").is_file()


def test_an_evaluator_that_cannot_be_is_told_before_weights_are_read(tmp_path: Path) -> None:
    file, rows = chest(tmp_path)
    file.write_text(json.dumps(rows[0]), "utf-8")
    words = ["experiment=finetune/try_out", f"data.source.mine.path={file}", f"data.source.mine.image_root={tmp_path}"]
    words += ["data.source.mine.split=null", "data.source.mine.part=null", "model.weights.stage_one=/nowhere", *QUICK]
    done = subprocess.run(
        [sys.executable, "finetune.py", *words, f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "error: held_out: part=test and group=None say nothing" in done.stderr, done.stderr


def test_a_file_that_is_not_named_is_asked_for_though_the_evaluator_refers_to_it() -> None:
    with pytest.raises(ConfigError, match=r"not set: data.source.mine.path\.  Say it on the command line"):
        compose("finetune", ["experiment=finetune/try_out"])


def test_the_evaluator_asks_about_the_other_part(tmp_path: Path) -> None:
    file, rows = chest(tmp_path)
    file.write_text("\n".join(json.dumps({**row, "label": "a"}, ensure_ascii=False) for row in rows), "utf-8")
    for experiment in ("finetune/try_out", "finetune/visualglm_lora"):
        settings = {"path": file, "image_root": tmp_path, "group": "patient_id", "split": "80/20", "part": "train"}
        words = [f"data.source.mine.{key}={value}" for key, value in settings.items()]
        needed = ["model.llm.tokenizer=x"] if "lora" in experiment else []
        needed += [f"model.weights.{key}" for key in ("visualglm=x", "qkv_order=blocks") if "lora" in experiment]
        config = compose("finetune", [f"experiment={experiment}", "train/evaluator=held_out", *words, *needed])
        nodes = [config.data.source.mine, config.train.evaluator.held_out.source]
        mine, held_out = (VisualGLMJson(**{k: v for k, v in node.items() if k != "_target_"}) for node in nodes)
        sides = [
            {source.group_of(language, n) for language in source.languages for n in range(source.num_samples(language))}
            for source in (mine, held_out)
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {str(number) for number in range(10)}
