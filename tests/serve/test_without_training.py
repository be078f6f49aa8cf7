"""Where the language model is not SAT's, chat runs on a machine without deepspeed and triton (and without SAT)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from serve.session import Session
from tests.conftest import ROOT
from tests.model.glm_common import train_sentencepieces
from tests.tiny_run import glm_nodes, write_run

WITHOUT = """
import importlib.util, runpy, sys

HIDDEN = ('deepspeed', 'triton', 'sat', 'SwissArmyTransformer', 'wandb', 'webdataset')

class Hiding:
    '''A machine where training's libraries are not installed.'''
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split('.')[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
assert not [name for name in sys.modules if name.split('.')[0] in HIDDEN], 'imported all the same'
print('and nothing was missed')
"""


def test_chat_needs_neither_deepspeed_nor_triton(tmp_path: Path) -> None:
    """With a LoRA and in 4 bits, so that peft and bitsandbytes are there too."""
    nodes = glm_nodes(train_sentencepieces(tmp_path / "tokenizer.model"), tmp_path / "chatglm3", endless=True)
    write_run(tmp_path / "run", nodes)
    session = Session.load(tmp_path / "run", quantize=4, device="cpu")
    expected, _ = session.chat(None, "What is in the picture?", temperature=0, max_new_tokens=8)
    options = ["--model", str(tmp_path / "run"), "--temperature", "0", "--max-new-tokens", "8", "--lang", "en"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "scripts/chat.py", *options, "--quantize", "4", "--device", "cpu"],
        input="\nWhat is in the picture?\nstop\n",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"run: {expected}\n" in done.stdout and done.stdout.endswith("Goodbye.\nand nothing was missed\n")
