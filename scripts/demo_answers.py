"""What the demo's stage two and fine-tuning came to: a table, a picture with answers before and after, a short talk.

    python scripts/demo_answers.py [outputs/demo]

`scripts/demo.py` calls it; the pictures are report/answers.png and report/unseen.png, which the talk is about.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"zh": "Chinese", "en": "English"}
PARTS = {  # the run, what its part of the table is called, and its evaluators
    "stage_two": ("stage two, the language model frozen", {"captions": "captions", "answers": "questions answered"}),
    "finetune": (
        "fine-tuning on grey pictures with LoRA",
        {
            "reports": "reports",
            "findings": "findings",
            "captions": "not forgotten: captions",
            "answers": "not forgotten: questions",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Table and picture of the demo's stage two and fine-tuning.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/demo"), help="(%(default)s)")
    folder: Path = parser.parse_args().folder
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path.insert(0, str(ROOT))
    for run in PARTS:
        if not (folder / run / "metrics.jsonl").is_file():
            sys.exit(f"there is no run in {folder / run}: bash scripts/demo.sh makes it")
    print(f"\n{table(folder)}", flush=True)
    picture = folder / "report" / "answers.png"
    newest = max((folder / run / "metrics.jsonl").stat().st_mtime for run in PARTS)
    if not picture.is_file() or picture.stat().st_mtime < newest:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(folder).save(picture, optimize=True)
    print(f"\n{talk(folder)}")


def talk(folder: Path) -> str:
    """One question in each language about a grey picture never seen, asked as any user of the model would ask."""
    from omegaconf import OmegaConf

    from serve.session import Session
    from train.config import build

    source = build(OmegaConf.load(folder / "finetune" / "config.yaml").train.evaluator.reports.source)
    image = source.read("zh", 0).images[0]
    shown = folder / "report" / "unseen.png"
    image.resize((4 * image.width, 4 * image.height)).save(shown, optimize=True)
    session = Session.load(folder / "finetune", device="cpu")
    lines = [f"the fine-tuned model, asked about a picture it has never seen ({shown})"]
    for language in NAMES:
        question = source.dialogues(language, 0)[0].turns[0].question
        answer, _ = session.chat(image, question, temperature=0.0)
        lines.append(f"  {question}  {answer}")
    return "\n".join(lines)


def table(folder: Path) -> str:
    """Before and after, for each language, in percent of unseen scenes."""
    from train.evaluator.before_after import first_and_last

    found = {run: first_and_last(folder / run / "metrics.jsonl") for run in PARTS}
    size = int(found["stage_two"]["captions"][1]["zh/num_questions"])
    lines = [
        f"{f'{size} unseen scenes, exactly right':<44}" + "".join(f"{name:^16}" for name in NAMES.values()),
        " " * 44 + f"{'before':>8}{'after':>8}" * len(NAMES),
    ]
    for run, (title, evaluators) in PARTS.items():
        lines.append(title)
        for evaluator, says in evaluators.items():
            first, last = found[run][evaluator]
            numbers = [line[f"{language}/normalised_match"] for language in NAMES for line in (first, last)]
            lines.append(f"  {says:<42}" + "".join(f"{number:>8.1%}" for number in numbers))
    return "\n".join(lines)


def draw(folder: Path, number: int = 4) -> Image.Image:
    """Coloured scenes with what the aligned model says; below them grey ones, reported before and after fine-tuning."""
    from PIL import Image

    from model.load import load
    from train.evaluator.picture import text_beside_images

    aligned, tuned = load(folder / "stage_two", device="cpu"), load(folder / "finetune", device="cpu")
    coloured = [row for name in ("captions", "answers") for row in answers(folder, name, {"": aligned}, number)]
    grey = answers(folder, "reports", {"before:  ": aligned, "after:     ": tuned}, number + 1)
    parts = [text_beside_images(coloured, columns=2), text_beside_images(grey, columns=1)]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    canvas.paste(parts[0], (0, 0))
    canvas.paste(parts[1], (0, parts[0].height))
    return canvas


def answers(folder: Path, evaluator: str, models: dict[str, Any], number: int) -> list[Any]:
    """For some pictures of an evaluator: the pixels, and the lines to stand beside them, language by language."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf

    from train.config import build
    from train.distributed import Ranks
    from train.evaluator.answers import is_right
    from train.evaluator.predictions import Predictions

    node = OmegaConf.load(folder / "finetune" / "config.yaml").train.evaluator[evaluator]
    ranks, device = Ranks.alone(), torch.device("cpu")
    found: dict[int, list[tuple[str, bool | None]]] = {}
    for language in NAMES:
        for says, model in models.items():
            asking = build({**node, "num_samples": number}, codec=model.llm.codec, name=evaluator)
            for index, row in asking.answers(model, language, device, ranks, Predictions(ranks)).items():
                right, said = is_right(str(row["answer"]), row["right"]), says or f"{row['question']}  "
                found.setdefault(index, []).append((f"{said}{row['answer']}", right))
    picture = asking.transform.picture
    return [
        (picture(asking.source.read("zh", index).images[0], np.random.default_rng(0)), told)
        for index, told in sorted(found.items())
    ]


if __name__ == "__main__":
    main()
