"""`scripts/parity.py` on the folders of references: losses within 1e-5, tensors and gradients within 1e-4."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import parity

TENSORS = ("image_embeds", "query_output", "sim_i2t", "sim_t2i", "itm_logits")


def run_parity(folder: Path, repo_root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/parity.py", "stage-one", str(folder)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("name", ["stage_one_1rank", "stage_one_2ranks"])
def test_stage_one_equals_lavis(name: str, shared_dir: Path, repo_root: Path) -> None:
    folder = shared_dir / "parity" / name
    done = run_parity(folder, repo_root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["ranks"]
    assert len(found) == json.loads((folder / "config.json").read_text())["world_size"]
    for rank, result in enumerate(found):
        expected = load_file(folder / f"rank{rank}.safetensors")
        for loss in ("loss_itc", "loss_itm", "loss_itg"):
            assert result[loss] == pytest.approx(expected[f"expected.{loss}"].item(), abs=1e-5)
        assert max(result[tensor] for tensor in TENSORS) < 1e-4
        assert result["grad"].keys() == {key[14:] for key in expected if key.startswith("expected.grad.")}
        assert max(result["grad"].values()) < 1e-4


def test_a_changed_weight_shows(shared_dir: Path, repo_root: Path, tmp_path: Path) -> None:
    folder = shared_dir / "parity" / "stage_one_1rank"
    weights = load_file(folder / "weights.safetensors")
    weights["Qformer.bert.encoder.layer.1.attention.self.value.weight"] *= 1.1
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("config.json", "rank0.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = json.loads(run_parity(tmp_path, repo_root).stdout)["ranks"][0]
    assert found["image_embeds"] < 1e-4 < found["query_output"]
    (tmp_path / "rank0.safetensors").unlink()
    refused = run_parity(tmp_path, repo_root)
    assert refused.returncode != 0 and "rank [0] has no rank<r>.safetensors" in refused.stderr


def run_visualglm(folder: Path, repo_root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/parity.py", "visualglm", str(folder)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=240)


def test_visualglm_equals_its_own_code(shared_dir: Path, repo_root: Path) -> None:
    folder = shared_dir / "parity" / "visualglm_sat"
    done = run_visualglm(folder, repo_root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = load_file(folder / "io.safetensors")
    assert found["loss"] == pytest.approx(expected["expected.loss"].item(), abs=1e-5)
    assert found.keys() == {"loss", "projected", "logits"}
    assert max(found["projected"], found["logits"]) < 1e-4


def test_visualglm_shows_a_changed_weight(shared_dir: Path, repo_root: Path, tmp_path: Path) -> None:
    folder = shared_dir / "parity" / "visualglm_sat"
    for name in ("model_config.json", "latest"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    refused = run_visualglm(tmp_path, repo_root)
    assert refused.returncode != 0 and "holds no io.safetensors" in refused.stderr
    (tmp_path / "io.safetensors").write_bytes((folder / "io.safetensors").read_bytes())
    weights = torch.load(folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)
    rows = weights["module"]["transformer.layers.1.attention.query_key_value.weight"]
    rows[:] = rows.roll(1, 0)  # as a wrong order of rows would
    (tmp_path / "1").mkdir()
    torch.save(weights, tmp_path / "1" / "mp_rank_00_model_states.pt")
    found = json.loads(run_visualglm(tmp_path, repo_root).stdout)
    assert found["projected"] < 1e-4 < found["logits"]


def copied(folder: Path, target: Path) -> Path:
    """Links, so that a test may put files of its own in their place."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    return target


@pytest.mark.parametrize(
    ("what", "name", "file", "change", "told"),
    [
        ("stage-one", "stage_one_1rank", "weights.safetensors", "cut", "perhaps cut short"),
        ("stage-one", "stage_one_2ranks", "rank1.safetensors", "cut", "perhaps cut short"),
        ("stage-one", "stage_one_1rank", "weights.safetensors", "other", "of its tensors are missing"),
        ("stage-one", "stage_one_1rank", "rank0.safetensors", "other", "has no input_ids"),
        ("stage-one", "stage_one_1rank", "weights.safetensors", "gone", "there is no checkpoint at"),
        ("stage-one", "stage_one_1rank", "config.json", "cut", "no readable JSON"),
        ("visualglm", "visualglm_sat", "io.safetensors", "cut", "perhaps cut short"),
    ],
)
def test_a_damaged_reference_is_one_line(
    what: str,
    name: str,
    file: str,
    change: str,
    told: str,
    shared_dir: Path,
    repo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(shared_dir / "parity" / name, tmp_path / name)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change == "cut":
        (folder / file).write_bytes(content[: len(content) // 2])
    elif change == "other":
        save_file({"expected.loss": torch.ones(()), "query_tokens": torch.ones(1)}, folder / file)
    if name == "stage_one_2ranks":  # all that a user sees, also of what the processes of the ranks raise
        done = run_parity(folder, repo_root)
        assert done.returncode == 1 and not done.stdout
        (line,) = done.stderr.splitlines()
    else:
        monkeypatch.setattr(sys, "argv", ["parity", what, str(folder)])
        with pytest.raises(SystemExit) as exit:
            parity.main()
        line = str(exit.value)
    assert line.startswith("parity: ") and str(folder / file) in line and told in line
    assert line.endswith(f"copy {folder} again") and "\n" not in line
