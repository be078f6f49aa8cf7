"""What all tests share: where the reference data is, what may be skipped, and a quiet environment.

To run something on several CPU ranks, see `tests/ranks.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch, transformers or wandb are imported, here and in every process that a test starts.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WDS_SECURE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "PYTHONUTF8": "1",
}.items():
    os.environ.setdefault(_name, _value)


def shared_path() -> Path:
    """Where the reference data is expected: $QUEQIAO_SHARED, or `shared` beside the repository."""
    return Path(os.environ.get("QUEQIAO_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    path = shared_path()
    if not path.is_dir():
        pytest.skip(f"no reference data at {path} (set QUEQIAO_SHARED)")
    return path


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False"))


def _in_ci() -> bool:
    return os.environ.get("QUEQIAO_CI", "0") not in ("", "0")


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI only a GPU may be missing: everything else is installed there, and a skip would hide that it was not."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not _in_ci():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if re.search(r"\b(GPU|CUDA)s?\b", reason):
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: a skip is a failure in CI (QUEQIAO_CI=1). {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
