"""The demo: from pictures through stages one and two and a fine-tuning to tables, on a CPU; scripts/demo.sh calls it.

    python scripts/demo.py [--dir outputs/demo] [--fresh] [key=value ...]

Each part leaves its result in the directory and is not done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NUM_SCENES, VOCAB_SIZE = 12000, 1000
NAMES = {"zh": "Chinese", "en": "English"}
OUR_FOLDERS = ("scenes", "shards", "tokenizer", "checkpoints", "report", "eval", "wandb", "stage_two", "finetune")
NUM_PARTS = 8
LATER = {  # what follows stage one
    "stage_two": "stage two: a tiny ChatGLM learns the texts of training scenes, is frozen, the Q-Former speaks to it",
    "finetune": "fine-tuning with LoRA: reports of grey pictures; one row in four stays a coloured scene",
}
OUR_FILES = ("config.yaml", "metrics.jsonl", "prepared.json")


def main() -> None:
    options = parse_arguments()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    folder: Path = options.dir
    overrides = ["experiment=demo", f"run.dir={folder}", *options.overrides]
    from train.config import compose
    from train.config_check import ConfigError

    try:
        config = compose("pretrain", overrides)  # first: a mistyped key must not cost a minute
    except ConfigError as error:
        sys.exit(str(error))
    if not config.train.eval_every:
        sys.exit("train.eval_every=0 would leave the demo without numbers to report; give it 1 or more")
    if options.fresh:
        remove(folder)
    started = time.monotonic()
    reported = finished(folder, config)
    later = later_runs(folder)
    tuned = reported is not None and all(is_done(run, steps) for run, steps, _ in later)
    if tuned:
        print(f"The demo in {folder} is done already; bash scripts/demo.sh --fresh starts afresh.")
    if reported is None:
        for run, _, _ in later:  # of another stage one
            shutil.rmtree(run, ignore_errors=True)
        prepare(folder)
        with part(4, f"stage one, {config.train.steps} steps; interrupted, the same command goes on from there"):
            train(folder, config.train.steps, ["-m", "train.pretrain", *overrides])
        with part(5, "its report on 256 scenes whose compositions never occur in training"):
            reported = report(folder, config)
    print(f"\n{table(reported)}", flush=True)
    for number, (run, steps, overrides) in enumerate(later, start=6):
        if not is_done(run, steps):
            with part(number, LATER[run.name]):
                train(run, steps, ["finetune.py", *overrides])
    with nullcontext() if tuned else part(8, "report on unseen scenes, before and after"):
        answers(folder)
        if not tuned or not page(folder).is_file():
            runs = [str(folder), *(str(run) for run, _, _ in later)]
            subprocess.run([sys.executable, "scripts/report.py", *runs, "--out", str(page(folder))], check=True)
    if not tuned:
        print(f"\nAll of it took {(time.monotonic() - started) / 60:.1f} minutes.")
    print(what_next(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/demo.sh", description="All stages on synthetic scenes, on a CPU."
    )
    parser.add_argument("--dir", type=Path, default=Path("outputs/demo"), help="where everything goes (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo left there, start afresh")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for stage one, e.g. train.steps=4000")
    options = parser.parse_args()
    for text in options.overrides:
        if "=" not in text:
            parser.error(f"expected key=value, got {text!r}")
    options.dir = options.dir.resolve()
    if options.dir.is_relative_to(ROOT):
        options.dir = options.dir.relative_to(ROOT)
    return options


def remove(folder: Path) -> None:
    """What a demo makes, and nothing else that may lie there."""
    for name in OUR_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in OUR_FILES:
        (folder / name).unlink(missing_ok=True)


def finished(folder: Path, config: DictConfig) -> dict[str, float] | None:
    """The metrics of a demo that has been through stage one with as many steps."""
    file = folder / "report" / "report.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text("utf-8"))
    return found["metrics"] if found["steps"] == config.train.steps else None


@contextmanager
def part(number: int, what: str) -> Iterator[None]:
    print(f"\n[{number}/{NUM_PARTS}] {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"      {time.monotonic() - started:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------------------ the parts


def prepare(folder: Path) -> None:
    """Pictures -> shards -> tokenizer, as one would with pictures of one's own."""
    from data.source.synthetic import SceneSource

    scenes = SceneSource(NUM_SCENES)
    marker = folder / "prepared.json"
    fingerprint = {**scenes.fingerprint(), "vocab_size": VOCAB_SIZE}
    if marker.exists() and json.loads(marker.read_text("utf-8")) == fingerprint:
        print(f"[1-3/{NUM_PARTS}] shards and tokenizer are there already")
        return
    with part(1, f"draw {NUM_SCENES} scenes with Chinese and English captions"):
        pairs = scenes.write_pairs(folder / "scenes")
    with part(2, "pack them into shards"):
        command = ["scripts/pack_shards.py", str(pairs), str(folder / "shards"), "--overwrite"]
        subprocess.run([sys.executable, *command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        shutil.rmtree(folder / "scenes" / "pictures")
    with part(3, "train a WordPiece tokenizer on the captions"):
        train_tokenizer(scenes, folder / "tokenizer")
    marker.write_text(json.dumps(fingerprint), "utf-8")


def train_tokenizer(scenes: Any, folder: Path) -> None:
    from data.caption import clean_caption
    from model.tokenizer import train_wordpiece

    texts = [
        clean_caption(text, language)
        for index in range(0, NUM_SCENES, 4)  # every word occurs in a few hundred scenes
        for language in scenes.languages
        for text in scenes.scene(index).captions(language)
    ]
    train_wordpiece(texts, VOCAB_SIZE, folder)


def train(folder: Path, steps: int, command: list[str]) -> None:
    """Ends the demo too where the training failed or was interrupted."""
    process = subprocess.Popen([sys.executable, *command])
    code = None
    while code is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the training got it as well, and saves after the running step
            continue
    if code:
        sys.exit(code)
    newest = newest_checkpoint(folder)
    if newest is None or newest.name != f"step_{steps}":
        sys.exit(f"The training stopped at {newest.name if newest else 'step 0'}; the same command goes on from there.")


def newest_checkpoint(folder: Path) -> Path | None:
    from train.checkpoint import Checkpoints
    from train.distributed import Ranks

    return Checkpoints(folder, Ranks.alone(), keep=1).newest()[0]


def later_runs(folder: Path) -> list[tuple[Path, int, list[str]]]:
    """Stage two and the fine-tuning: where, how many steps, and what their command says."""
    from train.config import compose

    aligned, tuned = (folder / name for name in LATER)
    commands = {
        aligned: ["experiment=demo_stage_two", f"model.weights.stage_one={folder}"],
        tuned: [
            "experiment=demo_finetune",
            f"model.weights.vision={folder}",
            f"model.weights.stage_one={aligned}",
            f"model.llm.folder={aligned / 'llm'}",
        ],
    }
    overrides = {run: [*command, f"run.dir={run}"] for run, command in commands.items()}
    return [(run, compose("finetune", told).train.steps, told) for run, told in overrides.items()]


def is_done(run: Path, steps: int) -> bool:
    """Whether finetune.py is through: what it writes last, from the last step."""
    newest = newest_checkpoint(run)
    return newest is not None and newest.name == f"step_{steps}" and (run / "adapter/trained.safetensors").is_file()


def page(folder: Path) -> Path:
    return folder / "report" / "report.html"


def answers(folder: Path) -> None:
    subprocess.run([sys.executable, "scripts/demo_answers.py", str(folder)], check=True)


def report(folder: Path, config: DictConfig) -> dict[str, float]:
    """The last evaluation's numbers; examples from the newest checkpoint.  Writes report.json and examples.png."""
    import torch

    from train.checkpoint import load_weights
    from train.config import build
    from train.distributed import Ranks
    from train.loading import build_evaluators
    from train.pretrain import build_stage
    from train.run import Run

    ranks, device = Ranks.alone(), torch.device("cpu")
    newest = newest_checkpoint(folder)
    assert newest is not None, f"training left no checkpoint in {folder}"
    codec = build(config.model.tokenizer)

    class Silent(Run):
        def say(self, text: str) -> None:
            """The table of weights was printed when training began."""

    stage = build_stage(config, Silent(device, ranks, folder), codec)
    load_weights(stage, newest)
    evaluators = {evaluator.name: evaluator for evaluator in build_evaluators(config, codec)}
    metrics = {
        f"{entry['evaluator']}/{key}": value
        for entry in read_metrics(folder / "metrics.jsonl", "eval")
        if entry["step"] == config.train.steps
        for key, value in entry.items()
        if key not in ("kind", "step", "evaluator")
    }
    (folder / "report").mkdir(parents=True, exist_ok=True)
    picture = draw_report(stage.model, evaluators, draw_curves(folder / "metrics.jsonl", config), ranks)
    picture.save(folder / "report" / "examples.png", optimize=True)
    content = {"steps": config.train.steps, "checkpoint": newest.name, "metrics": metrics}
    (folder / "report" / "report.json").write_text(json.dumps(content, indent=1), "utf-8")
    return metrics


def read_metrics(file: Path, kind: str) -> list[dict[str, Any]]:
    from train.json_lines import json_lines

    return [entry for entry in json_lines(file)[0] if entry["kind"] == kind]


# ----------------------------------------------------------------------------------------------------------- the report


def table(metrics: Mapping[str, float]) -> str:
    """Rows of measures, a column for each language; each number with the size of its pool."""
    size = int(metrics["retrieval/zh/num_images"])
    rows = [
        (f"{says}, {how.upper()}  R@{k}", f"retrieval/{{}}/{how}/{direction}/r@{k}")
        for direction, says in (("image_to_text", "image to text"), ("text_to_image", "text to image"))
        for how in ("itc", "itm")
        for k in (1, 5)
    ]
    rows.append(("captions exactly right, ITG", "caption/{}/exactly_right"))
    lines = [f"{f'{size} unseen scenes':<32}" + "".join(f"{name:>10}" for name in NAMES.values())]
    lines += [f"{says:<32}" + "".join(f"{metrics[key.format(lang)]:>10.1%}" for lang in NAMES) for says, key in rows]
    lines.append("(ITC ranks by features alone; ITM ranks its best candidates again, image and text together)")
    return "\n".join(lines)


def draw_report(
    model: Any, evaluators: Mapping[str, Any], curves: Image.Image, ranks: Any, number: int = 6
) -> Image.Image:
    """Loss curves above; below them unseen scenes, what was retrieved and what was generated for them."""
    from PIL import Image

    from train.evaluator.picture import spread, text_beside_images
    from train.evaluator.predictions import Predictions

    retrieval, caption = evaluators["retrieval"], evaluators["caption"]
    predictions = Predictions(ranks)
    for evaluator in (retrieval, caption):
        evaluator(model, device=next(model.parameters()).device, ranks=ranks, predictions=predictions)
    pools = {language: retrieval.pools.of(language, ranks) for language in NAMES}
    lines: dict[int, list[tuple[str, bool | None]]] = {i: [] for i in spread(pools["zh"].num_images, number)}
    for language, pool in pools.items():
        right = retrieval.right(pool)["image_to_text"]
        found = predictions.known(retrieval.name, f"{language}/image_to_text")
        captions = predictions.known(caption.name, language)
        for i, shown in lines.items():
            best, said = found[i]["best_index"][0], captions[i]["caption"]
            shown.append((f"retrieved:  {pool.captions[best]}", best in right[i]))
            shown.append((f"generated:  {said}", caption.judge(said, pool.samples[i], language)))
    images = pools["zh"].pictures(list(lines), ranks)
    examples = text_beside_images([(images[i], shown) for i, shown in lines.items()], columns=1)
    width = max(examples.width, curves.width)
    canvas = Image.new("RGB", (width, curves.height + examples.height), "white")
    canvas.paste(curves, (0, 0))
    canvas.paste(examples, (0, curves.height))
    return canvas


def draw_curves(metrics_file: Path, config: DictConfig, width: int = 960, height: int = 240) -> Image.Image:
    """The three losses, and what came out on unseen scenes while training went on."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    training, evaluations = read_metrics(metrics_file, "train"), read_metrics(metrics_file, "eval")
    names = {"itc": "ITC (contrastive)", "itm": "ITM (matching)", "itg": "ITG (captions)"}
    figure, panels = pyplot.subplots(1, 4, figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    for axes, (name, title) in zip(panels, names.items(), strict=False):
        weight = config.train.loss[name].weight  # metrics.jsonl has what is back-propagated
        steps, values = [entry["step"] for entry in training], [entry[name] / weight for entry in training]
        smooth = running_mean(values)
        axes.plot(steps, values, color="#a8c4ee", lw=1)
        axes.plot(steps, smooth, color="#1f4fa0", lw=1.5)
        axes.set_ylim(top=1.3 * max(smooth[len(smooth) // 40 :]))  # the first few steps would flatten the rest
        axes.set_title(title, fontsize=10)
    for (evaluator, key), style in {
        ("retrieval", "itc/image_to_text/r@1"): ("R@1, ITC", "#1f4fa0"),
        ("retrieval", "itm/image_to_text/r@1"): ("R@1, ITM", "#d07a1c"),
        ("caption", "exactly_right"): ("captions", "#2a8a4a"),
    }.items():
        found = [entry for entry in evaluations if entry["evaluator"] == evaluator]
        means = [sum(entry[f"{language}/{key}"] for language in NAMES) / len(NAMES) for entry in found]
        panels[-1].plot([entry["step"] for entry in found], means, label=style[0], color=style[1], marker=".")
    panels[-1].set_title("unseen scenes: share right", fontsize=10)
    panels[-1].set_ylim(top=1.02)
    panels[-1].legend(fontsize=7, loc="lower right")
    for axes in panels:
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        pyplot.close(figure)
        return Image.open(file).convert("RGB")


def running_mean(values: list[float], span: int = 9) -> list[float]:
    near = [values[max(0, i - span // 2) : i + span // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def what_next(folder: Path) -> str:
    return f"""
  {page(folder)}     all of it on one page, for a browser
  {folder}/report/examples.png    stage one: examples and loss curves
  {folder}/report/answers.png     stage two and fine-tuning: answers before and after
  {folder}/metrics.jsonl          every number of stage one; those of the others in stage_two/ and finetune/
  {folder}/config.yaml            every setting of it

What to do next
  longer training            bash scripts/demo.sh --fresh train.steps=4000
  your own pictures          python scripts/pack_shards.py --help
                             python scripts/pack_shards.py PAIRS.jsonl datasets/mine
                             python -m train.pretrain experiment=stage_one/emoji data.source.shards.paths=datasets/mine
  talk to what was trained   python scripts/chat.py --model {folder}/finetune     about {folder}/report/unseen.png
                             python scripts/serve.py --model {folder}/finetune    on a page, or through REST
  every key of a run         python -m train.pretrain --help;  python finetune.py --help
  what this machine can do   python scripts/doctor.py"""


if __name__ == "__main__":
    main()
