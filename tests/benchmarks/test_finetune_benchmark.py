"""The benchmark of fine-tuning on a CPU: the command and its line for each variant."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT


def test_small_sizes_on_a_cpu() -> None:
    what = ["--tiny", "--variants", "visualglm", "ours", "qlora", "--steps", "1", "--rounds", "1", "--one-process"]
    done = subprocess.run(
        [sys.executable, "benchmarks/finetune.py", *what], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pattern = r"^(\w+) .* ([\d.]+) real of ([\d.]+) tokens +([\d.]+) samples/s.*ZeRO-0, ([\d.]+) M trained"
    lines = {m[1]: [float(m[i]) for i in (2, 3, 4, 5)] for m in re.finditer(pattern, done.stdout, re.MULTILINE)}
    assert list(lines) == ["visualglm", "ours", "qlora"]
    assert lines["visualglm"][1] == lines["qlora"][1] == 320 and lines["ours"][1] < 200, "padded to theirs, to its own"
    assert lines["visualglm"][0] == lines["ours"][0] == lines["qlora"][0], "the same samples"
    assert all(rate > 0 for _, _, rate, _ in lines.values())
    assert lines["visualglm"][3] < lines["ours"][3]
