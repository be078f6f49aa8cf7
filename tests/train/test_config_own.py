"""A user's own experiment file is held to the same rules as ours, wherever it lies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import CONFIG_DIR, compose, from_command_line
from train.config_check import ConfigError

MINE = """# @package _global_
defaults:
  - override /data/source: shards
  - override /data/transform: left_right_matters
  - override /model/vision: vit_tiny
  - override /model/qformer: tiny
  - override /model/tokenizer: own_captions
run:
  name: mine
data:
  source:
    shards:
      paths: {shards}
  loader:
    max_text_tokens: 48
model:
  qformer:
    dropout: 0.0
train:
  steps: 5
  loss:
    itc:
      weight: 2.0
  optim:
    lr: 1.0e-3
  engine:
    deepspeed:
      zero_optimization:
        offload_optimizer:
          device: cpu
"""


def write_experiment(configs: Path, text: str = MINE) -> Path:
    (configs / "experiment").mkdir(parents=True, exist_ok=True)
    file = configs / "experiment" / "mine.yaml"
    file.write_text(text.replace("{shards}", str(configs / "no_such_shards")))
    return file


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("right", "wrong", "key", "nearest"),
    [
        ("run:", "rum:", "rum", "run"),
        ("  steps: 5", "  stps: 5", "train.stps", "train.steps"),
        ("      paths:", "      pahts:", "data.source.shards.pahts", "data.source.shards.paths"),
        ("    max_text_tokens:", "    max_txt_tokens:", "data.loader.max_txt_tokens", "data.loader.max_text_tokens"),
        ("    dropout:", "    dropuot:", "model.qformer.dropuot", "model.qformer.dropout"),
        ("  qformer:\n", "  qfomer:\n", "model.qfomer", "model.qformer"),
        ("      weight:", "      wieght:", "train.loss.itc.wieght", "train.loss.itc.weight"),
        ("    lr:", "    learning_rate:", "train.optim.learning_rate", "train.optim"),
        ("          device:", "          devise:", "offload_optimizer.devise", "offload_optimizer.device"),
    ],
)
def test_mistyped_key_in_a_users_experiment(
    tmp_path: Path, own: bool, right: str, wrong: str, key: str, nearest: str
) -> None:
    """A file of the user's own, in configs/experiment or in a folder given by --config-dir."""
    configs = tmp_path / "configs"
    folder = tmp_path / "my configs, it's mine" if own else configs
    where = {"own_dir": folder} if own else {"config_dir": configs}
    if not own:
        shutil.copytree(CONFIG_DIR, configs)
    file = write_experiment(folder)
    assert compose("pretrain", ["experiment=mine"], **where).train.steps == 5
    broken = MINE.replace(right, wrong)
    assert broken != MINE
    write_experiment(folder, broken)
    told = file if own else "configs/experiment/mine.yaml"
    line = broken[: broken.index(wrong)].count("\n") + 1
    with pytest.raises(ConfigError) as error:
        compose("pretrain", ["experiment=mine"], **where)
    assert re.search(rf"unknown key \S*{re.escape(key)} \({re.escape(f'{told}, line {line}')}\): ", str(error.value))
    assert re.search(rf"did you mean \S*{re.escape(nearest)}\?|{re.escape(nearest)} has", str(error.value))


def test_config_dir_on_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_experiment(folder)
    (folder / "model" / "qformer").mkdir(parents=True)
    (folder / "model" / "qformer" / "my_own.yaml").write_text("defaults: [tiny]\nnum_query_tokens: 7\n")
    for option in (["--config-dir", str(folder)], [f"--config-dir={folder}"]):
        config = from_command_line("pretrain", argv=["experiment=mine", *option, "model/qformer=my_own"])
        assert config.run.name == "mine" and config.model.qformer.num_query_tokens == 7
    write_experiment(folder, MINE.replace("  steps: 5", "  stps: 5"))
    command = [sys.executable, "-m", "train.pretrain", "experiment=mine", "--config-dir", str(folder)]
    done = subprocess.run(
        [*command, f"run.dir={tmp_path}/run"], capture_output=True, text=True, cwd=CONFIG_DIR.parent, timeout=120
    )
    assert done.returncode == 2 and "did you mean train.steps?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_config_dirs_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config-dir: there is no folder .*nowhere"):
        compose("pretrain", ["experiment=smoke"], own_dir=tmp_path / "nowhere")
    write_experiment(tmp_path).rename(tmp_path / "experiment" / "smoke.yaml")
    with pytest.raises(ConfigError, match="experiment/smoke.yaml is named like one of configs/"):
        compose("pretrain", ["experiment=smoke"], own_dir=tmp_path)
