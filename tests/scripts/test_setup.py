"""setup.sh against a stand-in for pip: what it installs in which order, when it does nothing, how it recovers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Notes pip's arguments instead of installing; fails at the requirement file that FAIL_AT names.
PYTHON = f"""#!/bin/sh
if [ "$1" = -m ] && [ "$2" = pip ]; then
  echo "$@" >> "$PIP_CALLS"
  case "$*" in *"${{FAIL_AT:-nothing}}"*) echo "ERROR: connection lost" >&2; exit 7;; esac
  exit 0
fi
case "$2" in *"import data"*) exit 0;; esac  # the last check; importing torch takes seconds
exec {sys.executable} "$@"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with empty packages whose .venv has the stand-in for Python."""
    root = tmp_path / "project"
    for folder in ("scripts", "data", "model", "train", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    for package in ("data", "model", "train"):
        (root / package / "__init__.py").touch()
    shutil.copy(ROOT / "scripts/setup.sh", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    for name in ("python", "pip"):
        (root / ".venv/bin" / name).write_text(PYTHON)
        (root / ".venv/bin" / name).chmod(0o755)
    return root


def setup(project: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs it; also what pip was asked for, call by call."""
    calls = project / "pip_calls"
    calls.write_text("")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QUEQIAO_")}
    done = subprocess.run(
        ["bash", str(project / "scripts/setup.sh")],
        env={**inherited, "PIP_CALLS": str(calls), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines()


def test_order_of_installation_then_nothing_to_do(project: Path) -> None:
    done, calls = setup(project)
    assert done.returncode == 0, done.stderr
    expected = [
        "requirements/build.txt",
        "requirements/lock.txt",
        "requirements/torch.txt",
        "requirements/last.txt",
        "-e",
    ]
    assert [next((word for word in expected if f" {word}" in call), call) for call in calls] == expected
    hashed = [call for call in calls if "--require-hashes" in call]
    assert ["torch.txt" in call or "-e ." in call for call in calls].count(False) == len(hashed) == 3
    assert all("--no-deps" in call for call in hashed), "with dependencies pip would look for what the lock leaves out"

    done, calls = setup(project)
    assert (done.returncode, calls) == (0, [])
    assert "up to date" in done.stdout


def test_a_changed_lock_or_a_new_package_installs_again(project: Path) -> None:
    setup(project)
    with (project / "requirements/lock.txt").open("a") as lock:
        lock.write("# changed\n")
    assert len(setup(project)[1]) == 5
    (project / "serve").mkdir()
    (project / "serve/__init__.py").touch()
    assert len(setup(project)[1]) == 5
    assert setup(project)[1] == []


def test_an_interrupted_install_is_told_and_taken_up_again(project: Path) -> None:
    done, calls = setup(project, FAIL_AT="requirements/torch.txt")
    assert done.returncode == 1
    assert len(calls) == 3
    assert "connection lost" in done.stderr and "goes on from here" in done.stderr
    done, calls = setup(project)
    assert (done.returncode, len(calls)) == (0, 5)


def test_a_moved_folder_gets_a_new_environment(project: Path) -> None:
    (project / ".venv/bin/activate").write_text(f"VIRTUAL_ENV={project}/.venv\n")
    assert setup(project)[0].returncode == 0
    moved = project.rename(project.with_name("moved"))
    assert (moved / ".venv/.queqiao-installed").exists()
    # The stand-in goes with the old environment; without an index the real pip stops at its first file.
    done, _ = setup(
        moved, QUEQIAO_PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull
    )
    assert done.returncode == 1 and "requirements/build.txt" in done.stderr
    assert str(moved / ".venv") in (moved / ".venv/bin/activate").read_text()


def test_a_copy_whose_own_python_works_gets_a_new_environment_too(project: Path) -> None:
    """Its interpreter decides, and goes with the old environment."""
    assert setup(project)[0].returncode == 0
    (project / ".venv/bin/activate").write_text('VIRTUAL_ENV="/elsewhere/.venv"\n')
    (project / "pyproject.toml").write_text((project / "pyproject.toml").read_text() + "\n")
    done, _ = setup(project, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert "No such file" not in (project / ".venv/setup.log").read_text()
    assert str(project / ".venv") in (project / ".venv/bin/activate").read_text(), done.stderr


def test_an_environment_of_another_checkout_is_left_alone(project: Path) -> None:
    """Behind a link it would look moved, and be removed for the one who uses it."""
    assert setup(project)[0].returncode == 0
    other = project.with_name("other")
    shutil.copytree(project, other, ignore=shutil.ignore_patterns(".venv"))
    (other / ".venv").symlink_to(project / ".venv")
    (project / ".venv/bin/activate").write_text(f'VIRTUAL_ENV="{project}/.venv"\n')
    done, calls = setup(other)
    assert done.returncode == 1 and calls == [] and f".venv is a link to {project}/.venv" in done.stderr
    assert (project / ".venv/bin/python").is_file() and setup(project)[1] == []


def test_a_package_cut_off_half_way_is_installed_again(project: Path) -> None:
    """pip would call it installed: its metadata is there, some of its files are not."""
    site = project / ".venv/lib/python3.11/site-packages"
    for name, files in {
        "numpy-2.4.6": ["METADATA", "RECORD"],
        "six-1.17.0": ["METADATA", "RECORD", "INSTALLER"],
    }.items():
        (site / f"{name}.dist-info").mkdir(parents=True)
        for file in files:
            (site / f"{name}.dist-info" / file).touch()
    done, _ = setup(project)
    assert "numpy-2.4.6 was cut off" in done.stdout
    assert [path.name for path in site.iterdir()] == ["six-1.17.0.dist-info"]


def test_an_index_for_torch_is_passed_on_for_torch_alone(project: Path) -> None:
    _, calls = setup(project, QUEQIAO_TORCH_INDEX="https://example.org/cpu")
    assert [("https://example.org/cpu" in call) for call in calls] == [False, False, True, False, False]


def test_a_python_that_does_not_fit_is_refused(project: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.18" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done, calls = setup(project, QUEQIAO_PYTHON=str(old))
    assert (done.returncode, calls) == (1, [])
    assert "is Python 3.9.18; Python 3.11, 3.12 or 3.13 is needed" in done.stderr
