"""Where the language model is not SAT's, chat and evaluation run without deepspeed and triton (and without SAT)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from serve.session import Session
from tests.conftest import ROOT
from tests.model.glm_common import train_sentencepieces
from tests.tiny_run import WITHOUT, glm_nodes, vqa_arguments, write_run


def run_without(*command: object, typed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, command)],
        input=typed,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stdout.endswith("and nothing was missed\n"), done.stderr[-3000:]
    return done.stdout


def test_chat_and_evaluation_need_neither_deepspeed_nor_triton(tmp_path: Path) -> None:
    """Chat with a LoRA and in 4 bits, so that peft and bitsandbytes are there too."""
    nodes = glm_nodes(train_sentencepieces(tmp_path / "tokenizer.model"), tmp_path / "chatglm3", endless=True)
    write_run(tmp_path / "run", nodes)
    session = Session.load(tmp_path / "run", quantize=4, device="cpu")
    expected, _ = session.chat(None, "What is in the picture?", temperature=0, max_new_tokens=8)
    options = ["--model", tmp_path / "run", "--temperature", "0", "--max-new-tokens", "8", "--lang", "en"]
    typed = "\nWhat is in the picture?\nstop\n"
    said = run_without("scripts/chat.py", *options, "--quantize", "4", "--device", "cpu", typed=typed)
    assert f"run: {expected}\n" in said and "Goodbye.\n" in said
    assert "numbers in" in run_without("evaluate.py", f"run={tmp_path / 'run'}", *vqa_arguments(tmp_path))
