"""`write_report`: runs -> one HTML file that needs nothing else, and the same pictures as PNG."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from train.evaluation import PREDICTIONS
from train.evaluator.picture import BUNDLED_FONT
from train.report.attention import Looks, look
from train.report.chart import COLOURS, LANGUAGES, Chart, evaluation_charts, training_charts
from train.report.facts import differences, facts, skipped, told_events
from train.report.pictures import pictures_of
from train.report.records import PredictionSet, RunRecord, read_runs
from train.report.results import columns, tables, title
from train.report.samples import Samples, retrieved, side_by_side

HERE = Path(__file__).parent
SMALL_PNG = 12_000  # bytes up to which a picture stays a PNG
MOST_SETS = 4  # predictions side by side
ONE_RUN, SEVERAL = "report.html", "comparison.html"
CONTENTS = (
    ("runs", "Runs"),
    ("results", "Results"),
    ("training", "Training"),
    ("retrieval", "Retrieval"),
    ("attention", "Attention"),
    ("said", "Captions and answers"),
)


@dataclass(frozen=True)
class Options:
    """
    examples    successes and failures of each kind of retrieval; captions and answers of each set: twice as many
    looks       pictures whose attention is drawn, of each run
    attention   "auto" leaves out runs on published language models, which fill a computer's memory; "yes", "no"
    device      where the model is asked for its attention
    """

    examples: int = 6
    looks: int = 3
    attention: str = "auto"
    device: str = "cpu"


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    evaluate: bool = False,
    wandb: str = "disabled",
    options: Options | None = None,
) -> Path:
    """
    Args:
        folders: of runs.
        out: the HTML file; default RUN/report/report.html, of several runs report/comparison.html in the last one.
        evaluate: measures the newest checkpoint first where that was not done yet, as evaluate.py does.
        wandb: offline or online, to add the pictures to the runs' own wandb runs; "auto" does as each run did.
    Returns:
        the HTML file; the PNGs lie beside it.
    Raises:
        ValueError: a folder that holds no run; a place where nothing can be written.
    """
    options = options or Options()
    runs = read_runs(folders)
    if not runs:
        raise ValueError("name the directory of a run, such as outputs/demo")
    out = out or runs[-1].folder / "report" / (ONE_RUN if len(runs) == 1 else SEVERAL)
    _check_place(out)
    if evaluate and _measure_missing(runs):
        runs = read_runs(folders)
    content = collect(runs, options)
    out.write_text(html(content), encoding="utf-8", errors="replace")
    pictures = pictures_of(content)
    for name, picture in pictures.items():
        picture.save(out.parent / f"{out.stem}_{name}.png", optimize=True)
    _to_wandb(runs, pictures, wandb)
    return out


def _check_place(out: Path) -> None:
    """Before anything is measured or drawn.  Raises ValueError."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the page's file, such as {out / ONE_RUN}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        is_new = not out.exists()
        out.touch()
        if is_new:
            out.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}): name another file (--out)") from error


def collect(runs: Sequence[RunRecord], options: Options) -> dict[str, Any]:
    """All that the template shows."""
    samples = _SamplesByNode()
    sets = [(_set_name(runs, run, made), made) for run in runs for made in run.predictions]
    measured, evaluated = columns(runs), evaluation_charts(runs)
    said = list(side_by_side(_few(sets), samples.of_sets([made for _, made in sets]), 2 * options.examples))
    retrieval = [
        {
            "name": name,
            "source": str(made.folder / PREDICTIONS),
            "found": found,
            "problem": "; ".join(dict.fromkeys(samples.problems(made, [one.evaluator for one in found]))),
        }
        for name, made in _last_ranking(runs, sets)
        if (found := list(retrieved(made, samples.of_sets([made]), options.examples)))
    ]
    attention = [{"name": run.name, "folder": str(run.folder), "looks": _looks(run, samples, options)} for run in runs]
    names = ", ".join(run.name for run in runs)
    return {
        "title": names if len(names) < 80 else f"{len(runs)} runs",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "notes": list(dict.fromkeys(note for run in runs for note in run.notes)),
        "contents": [one for one in CONTENTS if one[0] != "retrieval" or retrieval or not all(map(_talks, runs))],
        "facts": facts(runs),
        "differences": differences(runs) if len(runs) > 1 else [],
        "colours": [COLOURS[number % len(COLOURS)] for number in range(len(runs))],
        "columns": measured,
        "tables": tables(measured),
        "training_charts": training_charts(runs),
        "evaluation_charts": evaluated,
        "files": ", ".join(str(run.metrics_file) for run in runs),
        "dashes": _dashes(runs, evaluated),
        "weights": _weights(runs),
        "resumed": any(event.get("event") == "resumed" for run in runs for event in run.events),
        "skips": [skipped(run) for run in runs],
        "events": [told_events(run) for run in runs],
        "retrieval": retrieval,
        "attention": attention,
        "said": said,
        "said_sources": [str(made.folder / PREDICTIONS) for _, made in _few(sets)],
        "said_twice": any(len(compared.sets) > 1 for compared in said),
        "no_predictions": "No predictions of this kind were kept. python evaluate.py run="
        f"{runs[0].folder} makes them for the newest checkpoint, and checkpoint=NAME for another one; then write this "
        "report again.",
        "command": f"python scripts/report.py {' '.join(str(run.folder) for run in runs)}",
    }


class _SamplesByNode:
    """Each source is opened once, whoever asks."""

    def __init__(self) -> None:
        self._known: dict[str, Samples] = {}

    def of_node(self, node: Mapping[str, Any]) -> Samples:
        return self._known.setdefault(json.dumps(node, sort_keys=True, default=str), Samples(node))

    def of_sets(self, made: Sequence[PredictionSet]) -> Callable[[str], Samples]:
        return lambda name: self.of_node(next((one.nodes[name] for one in made if name in one.nodes), {}))

    def of_run(self, run: RunRecord) -> Callable[[str], Samples]:
        nodes = dict(run.setting("train.evaluator", {}) or {})
        for made in run.predictions:
            nodes |= made.nodes
        return lambda name: self.of_node(nodes.get(name) or {})

    def problems(self, made: PredictionSet, evaluators: Sequence[str]) -> list[str]:
        return [problem for name in evaluators if (problem := self.of_sets([made])(name).problem)]


def _looks(run: RunRecord, samples: _SamplesByNode, options: Options) -> Looks:
    if options.attention == "no":
        return Looks("", (), 0, "not asked for")
    large = options.attention == "yes"
    return look(run, samples.of_run(run), number=options.looks, device=options.device, large=large)


def _set_name(runs: Sequence[RunRecord], run: RunRecord, made: PredictionSet) -> str:
    return f"{run.name}, {title(made)}" if len(runs) > 1 else title(made)


def _talks(run: RunRecord) -> bool:
    """A run of stage two, which ranks nothing."""
    return run.setting("model.visual_chat") is not None


def _few(sets: Sequence[tuple[str, PredictionSet]]) -> list[tuple[str, PredictionSet]]:
    """The first and the last ones."""
    return [*sets[:1], *sets[1:][-(MOST_SETS - 1) :]]


def _last_ranking(
    runs: Sequence[RunRecord], sets: Sequence[tuple[str, PredictionSet]]
) -> list[tuple[str, PredictionSet]]:
    """Of each run the last set with retrieval."""
    ranking = [(name, made) for name, made in sets if any("/" in part for _, part in made.parts)]
    last = {made.folder.parent: (name, made) for name, made in ranking}
    return [one for run in runs if (one := last.get(run.folder / "eval")) is not None]


def _dashes(runs: Sequence[RunRecord], evaluated: Sequence[Chart]) -> str:
    if len(runs) > 1:
        return "Dashed: English."
    ranks = any("R@" in chart.title for chart in evaluated)
    return "Dashed: ITC alone; not dashed: re-ranked by ITM." if ranks else ""


def _weights(runs: Sequence[RunRecord]) -> str:
    found = dict.fromkeys(f"{part} {run.loss_weight(part):g}" for run in runs for part in run.parts())
    return ", ".join(found) or "none"


def _measure_missing(runs: Sequence[RunRecord]) -> bool:
    """Whether something was measured."""
    from model.weights import ours
    from train.config_evaluate import evaluate_config
    from train.evaluation import evaluate

    done = False
    for run in runs:
        newest = ours.find(run.folder, "newest").parent.name
        if all(made.checkpoint != newest for made in run.predictions):
            evaluate(evaluate_config([f"run={run.folder}"]))
            done = True
    return done


def _to_wandb(runs: Sequence[RunRecord], pictures: Mapping[str, Image.Image], wish: str) -> None:
    """Into the run's own wandb run, at its last step; of several runs, into the last one's."""
    from train.tracking import WandbWriter

    run = runs[-1]
    mode = str(run.setting("run.wandb.mode", "disabled")) if wish == "auto" else wish
    if mode == "disabled":
        return
    writer = WandbWriter(
        run.folder,
        name=str(run.setting("run.name", run.name)),
        project=str(run.setting("run.wandb.project", "queqiao")),
        mode=mode,
        timeout=float(run.setting("run.wandb.timeout", 20.0)),
        config=run.config,
    )
    writer.log(run.last_step, {}, {f"report/{name}": picture for name, picture in pictures.items()})
    writer.close()


# ------------------------------------------------------------------------------------------------------------ the page


def html(content: Mapping[str, Any]) -> str:
    """Every text is escaped, whoever wrote it; only our own drawings and our own style are not."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"uri": uri, "trusted": Markup, "language": lambda name: LANGUAGES.get(name, name)}
    font = base64.b64encode(BUNDLED_FONT.read_bytes()).decode()
    face = f'@font-face {{ font-family: "Queqiao Scenes"; src: url(data:font/otf;base64,{font}); }}\n'
    style = Markup(face + (HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(**content, style=style)


def uri(picture: Image.Image) -> str:
    """A picture as an address that holds it: a small PNG, else a JPEG."""
    with io.BytesIO() as file:
        picture.save(file, format="PNG", optimize=True)
        kind, raw = "png", file.getvalue()
    if len(raw) > SMALL_PNG:
        with io.BytesIO() as file:
            picture.convert("RGB").save(file, format="JPEG", quality=86)
            kind, raw = "jpeg", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"
