"""The rules of the layout, executed: who may import whom, how long a file may be, what a config folder stands for.

The rules are functions of (path, source), so that the tests below also show each of them finding a fault.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "model", "train", "serve")
ENTRY_POINTS = ("train/pretrain.py", "finetune.py", "evaluate.py")  # see everything, seen by no package
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
TOO_LONG: frozenset[str] = frozenset()  # "path" or "path:function" that may be longer; keep it empty

MAY_IMPORT = {  # package -> what it may import of ours
    "data": ("data",),
    "model": ("data.batch", "model"),
    "train": ("data", "model", "train"),
    "serve": ("data", "model", "serve"),
}
ONLY_IN = {  # library -> where it may be imported at all
    "hydra": ("train/config.py", "model/build.py"),
    "torch.distributed": ("train/distributed.py", "train/engine.py", "train/torchrun.py"),  # the last starts processes
    "deepspeed": ("train/engine.py",),
    "sat": ("model/llm/", "model/weights/"),
    "transformers": ("model/", "train/", "serve/"),
}
LAZY_BUT_IN = {  # slow to import: only inside functions, but for these files
    "deepspeed": (),
    "sat": (),
    "wandb": (),
    "matplotlib": (),
    "datasets": (),
    "peft": (),
    "bitsandbytes": (),
    "transformers": ("model/vision/", "model/weights/", "model/tokenizer.py", "model/llm/"),
}
LOSS_MAY_IMPORT = (
    ("__future__", "torch", "dataclasses", "typing", "collections", "math", "annotated_types")
    + ("data.batch", "model", "train.distributed", "train.loss")  # what a loss is handed: a batch, a model, the ranks
)


@dataclass(frozen=True)
class Import:
    name: str  # dotted, with the imported name: "torch.nn.functional", "data.batch.Batch"
    line: int
    lazy: bool  # inside a function, or for the type checker alone


def imports_of(source: str) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; say where it comes from"
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inner)

    return visit(ast.parse(source), False)


def under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def inside(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def wrong_imports(path: str, source: str) -> list[str]:
    """What this file of a package imports against "data <- model <- train", and which library is out of place."""
    package = path.split("/")[0]
    entry = path in ENTRY_POINTS
    faults = []
    for found in imports_of(source):
        where = f"{path}:{found.line}"
        ours = found.name.split(".")[0] in (*PACKAGES, "scripts", "tests", "benchmarks", "finetune", "evaluate")
        if ours and not entry and not under(found.name, MAY_IMPORT[package]):
            faults.append(f"{where}: {package}/ may not import {found.name}")
        if under(found.name, ("train.pretrain",)):
            faults.append(f"{where}: nobody imports an entry point ({found.name})")
        for library, places in ONLY_IN.items():
            if under(found.name, (library,)) and not inside(path, places) and not (entry and library == "hydra"):
                faults.append(f"{where}: {library} may only be imported in {', '.join(places)}")
        for library, places in LAZY_BUT_IN.items():
            if under(found.name, (library,)) and not found.lazy and not inside(path, places):
                faults.append(f"{where}: import {library} inside the function that needs it; it is slow to load")
        if path.startswith("train/loss/") and not under(found.name, LOSS_MAY_IMPORT):
            faults.append(f"{where}: a loss is a function of tensors; it may not import {found.name}")
    return faults


def too_long(path: str, source: str) -> list[str]:
    faults = []
    num_lines = source.count("\n")
    if num_lines > MAX_FILE_LINES and path not in TOO_LONG:
        faults.append(f"{path}: {num_lines} lines, more than {MAX_FILE_LINES}; what is its second subject?")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            docstring = 0 if body[0] is first else (first.end_lineno or 0) - first.lineno + 1
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > MAX_FUNCTION_LINES and f"{path}:{node.name}" not in TOO_LONG:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return faults


def shadowing(path: str, source: str) -> list[str]:
    """`python scripts/x.py` puts scripts/ first on the path: a types.py there would replace the standard library's."""
    name = Path(path).stem
    return [f"{path}: named like the standard library's {name}"] if name in sys.stdlib_module_names else []


def package_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def other_files() -> list[str]:
    found = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return sorted(str(p.relative_to(ROOT)) for p in found)


@pytest.mark.parametrize("path", package_files())
def test_imports_point_one_way(path: str) -> None:
    assert wrong_imports(path, (ROOT / path).read_text("utf-8")) == []


@pytest.mark.parametrize("path", package_files() + other_files())
def test_files_and_functions_fit_in_the_head(path: str) -> None:
    assert too_long(path, (ROOT / path).read_text("utf-8")) == []


@pytest.mark.parametrize("path", package_files() + other_files())
def test_no_module_shadows_the_standard_library(path: str) -> None:
    assert shadowing(path, "") == []


@pytest.mark.parametrize("path", other_files())
def test_scripts_are_imported_by_nobody_and_reach_no_process_group(path: str) -> None:
    found = list(imports_of((ROOT / path).read_text("utf-8")))
    assert [i.name for i in found if under(i.name, ("tests",))] == []
    if path.startswith("scripts/") and path != "scripts/doctor.py":
        assert [i.name for i in found if under(i.name, ("deepspeed", "torch.distributed"))] == []


@pytest.mark.parametrize(
    ("rule", "path", "source", "expected"),
    [
        (
            wrong_imports,
            "data/x.py",
            "from model.qformer import QFormer\n",
            "data/ may not import model.qformer.QFormer",
        ),
        (wrong_imports, "data/x.py", "def f():\n    import train.stage\n", "data/ may not import train.stage"),
        (wrong_imports, "model/x.py", "from data.loader import Loader\n", "model/ may not import data.loader.Loader"),
        (wrong_imports, "model/x.py", "import torch.distributed as dist\n", "torch.distributed may only be imported"),
        (wrong_imports, "model/x.py", "from torch import distributed\n", "torch.distributed may only be imported"),
        (wrong_imports, "train/x.py", "import hydra\n", "hydra may only be imported in train/config.py"),
        (wrong_imports, "train/x.py", "from scripts.doctor import main\n", "train/ may not import scripts.doctor.main"),
        (wrong_imports, "train/x.py", "from train import pretrain\n", "nobody imports an entry point"),
        (wrong_imports, "train/engine.py", "import deepspeed\n", "import deepspeed inside the function"),
        (wrong_imports, "serve/x.py", "from train.stage import Stage\n", "serve/ may not import train.stage.Stage"),
        (wrong_imports, "train/loss/x.py", "import os\n", "it may not import os"),
        (wrong_imports, "model/adapter.py", "import peft\n", "import peft inside the function"),
        (too_long, "data/x.py", "a = 1\n" * 401, "401 lines"),
        (too_long, "data/x.py", "def f():\n" + "    a = 1\n" * 60, "f has 61 lines"),
        (shadowing, "train/logging.py", "", "named like the standard library's logging"),
    ],
)
def test_each_rule_finds_a_fault(rule: Callable[[str, str], list[str]], path: str, source: str, expected: str) -> None:
    assert any(expected in fault for fault in rule(path, source)), rule(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/x.py", "from data.batch import ImageTextBatch\nimport torch.nn.functional as F\n"),
        ("train/engine.py", "def f():\n    import deepspeed\nimport torch.distributed as dist\n"),
        ("train/pretrain.py", "import hydra\nfrom data.loader import Loader\n"),
        ("train/loss/x.py", "from train.distributed import Ranks\nfrom collections.abc import Mapping\n"),
        ("model/tokenizer.py", "from transformers import AutoTokenizer\n"),
        ("data/x.py", 'def f():\n    """' + "long\n" * 70 + '"""\n    return 1\n'),
    ],
)
def test_the_rules_allow_what_the_design_does(path: str, source: str) -> None:
    assert wrong_imports(path, source) == []
    assert too_long(path, source) == []


def test_every_config_folder_mirrors_a_package() -> None:
    """configs/model/vision/*.yaml configures model/vision/ or model/vision.py; experiment/ holds whole runs."""
    orphans = []
    for folder in sorted({p.parent for p in (ROOT / "configs").glob("*/**/*.yaml")}):
        place = folder.relative_to(ROOT / "configs")
        if place.parts[0] == "experiment":
            continue
        if not (ROOT / place / "__init__.py").is_file() and not (ROOT / place).with_suffix(".py").is_file():
            orphans.append(f"configs/{place} stands for neither {place}/ nor {place}.py")
    assert orphans == []


def test_git_ignores_no_source_folder() -> None:
    """A `data/` line in .gitignore has cost several projects their loader."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    places = [*PACKAGES, "configs/data", "configs/model", "configs/train", "tests/data", "tests/model"]
    probes = [f"{place}/anything.py" for place in places]
    done = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", "--no-index", *probes], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_packages_are_stated_and_complete() -> None:
    """Every folder with modules is a package that an installed copy would contain."""
    missing = {str(Path(path).parent) for path in package_files()} - {
        str(p.parent.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")
    }
    assert missing == set()
