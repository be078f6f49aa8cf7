"""The two READMEs say the same, and what they say exists."""

from __future__ import annotations

import ast
import math
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README_zh.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the code blocks, without comments, which are translated, and alignment."""
    found = []
    for language, content in FENCE.findall(text):
        lines = [re.sub(r"(^|\s+)#(?! @package).*", "", line).rstrip() for line in content.splitlines()]
        found.append((language, "\n".join(line for line in lines if line)))
    return found


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
    return [
        shlex.split(line) for language, content in blocks(text) if language == "bash" for line in content.splitlines()
    ]


def test_same_headings_level_by_level() -> None:
    def levels(text: str) -> list[int]:
        return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.MULTILINE)]

    assert levels(CHINESE) == levels(ENGLISH)


def test_same_code_blocks_but_for_comments() -> None:
    expected = blocks(ENGLISH)
    assert len(expected) >= 8
    assert blocks(CHINESE) == expected


def test_same_tables_row_by_row() -> None:
    """As many cells in every row, with the same code words in each."""

    def rows(text: str) -> list[list[set[str]]]:
        lines = [line for line in prose(text).splitlines() if line.startswith("|")]
        return [[set(re.findall(r"`([^`]+)`", cell)) for cell in line.strip("|").split("|")] for line in lines]

    assert rows(CHINESE) == rows(ENGLISH)


def test_same_numbers() -> None:
    def decimals(text: str) -> list[str]:
        return sorted(re.findall(r"(?<![\w.:])\d+\.\d+(?![\w.])", prose(text)))

    expected = decimals(ENGLISH)
    assert len(expected) > 20
    assert decimals(CHINESE) == expected


def test_links_lead_somewhere() -> None:
    for text in (ENGLISH, CHINESE):
        links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
        assert links, "a README without a link"
        assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_files_that_the_text_names_exist() -> None:
    pattern = r"`((?:data|model|train|configs|scripts|docs|tests|requirements)/[\w./]*|[A-Z]+(?:\.md)?)`"
    for text in (ENGLISH, CHINESE):
        named = set(re.findall(pattern, prose(text))) - {"N", "V", "NaN", "configs/experiment/mine.yaml"}
        named = {name for name in named if "/" in name or (ROOT / name).suffix or name == "LICENSE"}
        assert len(named) >= 7
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_experiments_that_the_text_names_exist() -> None:
    for text in (ENGLISH, CHINESE):
        named = set(re.findall(r"experiment=([\w/]+)", text)) - {"mine"}
        assert named
        assert [name for name in sorted(named) if not (ROOT / f"configs/experiment/{name}.yaml").is_file()] == []


def test_the_tree_is_the_tree() -> None:
    (tree,) = [content for language, content in blocks(ENGLISH) if language == "text" and content.startswith("data/")]
    folder, missing = Path(), []
    for line in tree.splitlines():
        name = line.strip()
        if not line.startswith(" "):
            folder = Path(name)
        path = folder if not line.startswith(" ") else folder / name
        if not (ROOT / path).exists():
            missing.append(str(path))
    assert missing == []
    scripts = re.search(r"^scripts/ +# commands: (.*)$", ENGLISH, re.MULTILINE)
    assert scripts is not None
    stems = {path.stem for path in (ROOT / "scripts").iterdir()}
    assert [name for name in scripts[1].split(", ") if name not in stems] == []


@pytest.mark.parametrize("command", commands(ENGLISH), ids=" ".join)
def test_commands_exist_with_their_options(command: list[str]) -> None:
    words = list(command)
    if words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
        return
    if words[0] in ("bash", "python"):
        program = words[1]
        if program.startswith("scripts/"):
            source = (ROOT / program).read_text("utf-8")
            for option in (word for word in words[2:] if re.match(r"--\w", word)):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", source), f"{program} does not know {option}"
    for flag in ("-m", "--module"):
        if flag in words:
            module = words[words.index(flag) + 1]
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    if words[0] == "pre-commit":
        hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
        expected = ["ruff", "ruff-format", "mypy"]
        assert [hook["id"] for hook in hooks] == expected


def test_deepspeed_knows_the_flags_that_the_text_gives_it() -> None:
    runner = ast.parse((Path(_deepspeed_folder()) / "launcher/runner.py").read_text("utf-8"))
    known = {node.value for node in ast.walk(runner) if isinstance(node, ast.Constant)}
    for text in (ENGLISH, CHINESE):
        flags = {flag for command in re.findall(r"`deepspeed ([^`]+)`", text) for flag in re.findall(r"--\w+", command)}
        assert flags and flags <= known


def _deepspeed_folder() -> str:
    from importlib.util import find_spec

    spec = find_spec("deepspeed")  # does not import it, which takes seconds
    assert spec is not None and spec.submodule_search_locations
    return list(spec.submodule_search_locations)[0]


def smoothing_floor(num_classes: int, smoothing: float = 0.1) -> float:
    """The entropy of a smoothed target: what cross-entropy cannot go below."""
    other = smoothing / num_classes
    own = 1 - smoothing + other
    return -own * math.log(own) - (num_classes - 1) * other * math.log(other)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("{} for N = 1024, 1.067", smoothing_floor(1024)),
        ("{} for N = 1680", smoothing_floor(1680)),
        ("{} for V = 30523, 1.321", smoothing_floor(30523)),
        ("{} for V = 21129", smoothing_floor(21129)),
    ],
)
def test_floors_are_what_label_smoothing_gives(words: str, value: float) -> None:
    assert words.format(f"{value:.3f}") in ENGLISH


def test_starting_values_are_what_guessing_costs() -> None:
    assert f"ln N: {math.log(1024):.2f} for N = 1024" in ENGLISH
    assert f"ln V: {math.log(30523):.2f} for V = 30523" in ENGLISH
    prior = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)
    assert f"| ln 2 = {math.log(2):.2f}, soon {prior:.4f} |" in ENGLISH


def test_versions_agree_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    for text in (ENGLISH, CHINESE):
        assert re.search(r"Python 3\.11\S? ?3\.12 (or|或) 3\.13|Python 3\.11、3\.12 或 3\.13", text)


def readme_experiment(tmp_path: Path) -> Path:
    """A copy of configs/ with the README's experiment in it."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", configs)
    (content,) = [content for language, content in blocks(ENGLISH) if language == "yaml"]
    (configs / "experiment/mine.yaml").write_text(content + "\n")
    return configs


def test_the_experiment_composes_and_every_key_it_names_exists(tmp_path: Path) -> None:
    configs = readme_experiment(tmp_path)
    from train.config import compose

    config = compose("pretrain", ["experiment=mine"], config_dir=configs)
    assert config.data.source.shards.paths == "datasets/mine/train"
    assert config.run.dir == "outputs/mine"
    # What the text suggests to set: `train.precision=bf16`, ...
    for text in (ENGLISH, CHINESE):
        settings = set(re.findall(r"`((?:run|train|data|model)\.[\w.]+=\w+)`", text))
        assert len(settings) >= 4
        own = {setting for setting in settings if setting.startswith("data.source.mine.")}  # of a fine-tuning
        large = {setting for setting in settings if setting.startswith("model.llm.")}  # of one of VisualGLM
        compose("pretrain", ["experiment=mine", *sorted(settings - own - large)], config_dir=configs)
        assert own and large
        compose(
            "finetune", ["experiment=finetune/try_out", "data.source.mine.path=x", *sorted(own)], config_dir=configs
        )
        weights = ["model.weights.visualglm=x", "model.weights.qkv_order=per_head", "model.llm.tokenizer=x"]
        tuned = ["experiment=finetune/visualglm_lora", "data.source.mine.path=x", *weights]
        compose("finetune", [*tuned, *sorted(own | large)], config_dir=configs)


def test_a_mistyped_key_would_be_noticed(tmp_path: Path) -> None:
    configs = readme_experiment(tmp_path)
    from train.config import compose

    experiment = configs / "experiment/mine.yaml"
    experiment.write_text(experiment.read_text().replace("warmup_steps", "warm_up_steps"))
    with pytest.raises(ValueError, match="warmup_steps"):
        compose("pretrain", ["experiment=mine"], config_dir=configs)


def test_names_in_the_log_are_those_of_the_code() -> None:
    """First column of the table of numbers: each name, or what stands before its slash, is a string in train/."""
    table = ENGLISH.split("## What the numbers")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = {name.split("/")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert len(names) >= 8
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "train").rglob("*.py"))
    assert [name for name in sorted(names) if f'"{name}"' not in code] == []
