"""In CI a skip is a failure, unless what is missing is a GPU: a skipped test looks exactly like a passing one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

def test_needs_a_browser(): pytest.skip("no chromium")
def test_needs_reference_data(shared_dir): pass
@pytest.mark.gpu
def test_on_the_gpu(): pass
@pytest.mark.skipif(True, reason="needs two GPUs")
def test_on_two(): pass
@pytest.mark.xfail
def test_known_fault(): assert False
def test_fine(): pass
"""


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ("1", {"failed": 1, "errors": 2, "skipped": 2, "xfailed": 1, "passed": 1}),
        ("", {"skipped": 5, "xfailed": 1, "passed": 1}),
    ],
)
def test_what_a_skip_counts_as(tmp_path: Path, ci: str, expected: dict[str, int]) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    (tests / "test_cases.py").write_text(CASES)
    (tests / "test_absent.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    env = dict(os.environ, QUEQIAO_CI=ci, QUEQIAO_SHARED=str(tmp_path / "nowhere"), CUDA_VISIBLE_DEVICES="")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "tests",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    closing_line = done.stdout.splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)\b", closing_line)}
    assert counts == expected, done.stdout
