"""Curves of one run or several: drawn once, kept as SVG that takes the page's colours and as a PNG.

A faint line is every value logged, a strong one its running mean.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from train.report.records import RunRecord, is_number

INK, GRID = "#2b2b33", "#dcdce2"  # what the page replaces by its own
COLOURS = ("#3b7dc4", "#d9772b", "#3a9a5b", "#9a64c0", "#cf4f4f", "#7a7f8a", "#b0902c", "#2f9da3")
SIZE, DPI = (4.7, 2.7), 120
MOST_POINTS = 500  # of a line; more are averaged in bins
LANGUAGES = {"zh": "Chinese", "en": "English"}
WORDS = {
    "itc": "ITC",
    "itm": "ITM",
    "char": "by characters",
    "jieba": "by jieba",
    "13a": "by 13a",
    "intl": "by intl",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "vqa_accuracy": "VQA accuracy",
    "majority": "always the most frequent answer",
}


@dataclass(frozen=True)
class Line:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    marked: bool = False  # a few measurements instead of a curve
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str
    picture: Image.Image
    note: str = ""


def training_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Losses by part and language, learning rate, gradient, throughput, waiting for data, skipped samples."""
    charts = [chart for part in _parts(runs) for chart in _loss_charts(runs, part)]
    for key, title, unit in (
        ("lr", "Learning rate", ""),
        ("grad_norm", "Norm of the gradient, before clipping", ""),
        ("samples_per_second", "Throughput", "samples / s"),
        ("data_wait", "Waiting for data", "share of the time"),
        ("memory_gib", "Memory of the GPU", "GiB"),
        ("skips", "Skipped samples, so far", ""),
    ):
        lines = _lines(runs, key)
        if not lines or (key == "skips" and not any(max(line.values) for line in lines)):
            continue  # a flat line at 0 is said in words
        smooth = key in ("grad_norm", "samples_per_second", "data_wait")
        whole = key in ("samples_per_second", "data_wait", "skips")
        charts.append(chart(title, lines, unit=unit, smooth=smooth, whole=whole, marks=_resumes(runs)))
    return charts


def evaluation_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """What was measured while training, where it was measured more than once: one chart for each kind of number.

    R@1 by ITC alone is dashed, re-ranked by ITM it is not; where several runs share a chart, dashes mean English.
    """
    found: dict[str, list[Line]] = {}
    for run, run_colour in zip(runs, _run_colours(runs), strict=True):
        for evaluator, lines in run.measured().items():
            keys = dict.fromkeys(key for line in lines for key in line if _worth_a_curve(key))
            for key in keys:
                language, _, what = key.partition("/")
                how, _, rest = what.partition("/")
                ranks = how in ("itc", "itm")
                if len(runs) > 1 and how == "itc" and f"{language}/itm/{rest}" in keys:
                    continue
                pairs = [(line["step"], float(line[key])) for line in lines if is_number(line.get(key))]
                if len(pairs) < 2:
                    continue
                name = LANGUAGES.get(language, language)
                if len(runs) > 1:
                    label, colour, dashed = f"{run.name}, {name}", run_colour, language == "en"
                else:
                    label = f"{name}, {how.upper()}" if ranks else name
                    colour, dashed = _language_colour(language), how == "itc"
                curves = found.setdefault(f"{evaluator}: {spoken(rest if ranks else what)}", [])
                steps, values = [step for step, _ in pairs], [value for _, value in pairs]
                curves.append(Line(label, steps, values, colour, marked=True, dashed=dashed))
    return [chart(title, lines, whole=True) for title, lines in found.items()]


def spoken(key: str) -> str:
    """A metric's name for people: "zh/itm/image_to_text/r@1" -> "Chinese, ITM, image to text, R@1"."""
    parts = key.split("/")
    return ", ".join(
        WORDS.get(part) or LANGUAGES.get(part) or part.replace("_", " ").replace("r@", "R@") for part in parts
    )


def _worth_a_curve(key: str) -> bool:
    last = key.rpartition("/")[2]
    return last in ("r@1", "exactly_right", "exact_match", "normalised_match", "vqa_accuracy", "bleu_4", "cider")


def _parts(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(part for run in runs for part in run.parts()))


def _loss_charts(runs: Sequence[RunRecord], part: str) -> list[Chart]:
    """One run: its languages in one chart.  Several: a chart for each language, since colours stand for runs."""
    languages = list(dict.fromkeys(language for run in runs for language in run.parts().get(part, ())))
    title = "Loss" if part == "loss" else f"{part.upper() if len(part) <= 4 else part} loss"
    whole = [
        Line(run.name, run.series(part)[0], [value / run.loss_weight(part) for value in run.series(part)[1]], colour)
        for run, colour in zip(runs, _run_colours(runs), strict=True)
    ]
    whole = [line for line in whole if line.steps]
    marks = _resumes(runs)
    if len(runs) == 1:
        named = [Line("all", line.steps, line.values, COLOURS[0]) for line in whole]
        named += [
            Line(LANGUAGES.get(language, language), *runs[0].series(f"{part}/{language}"), _language_colour(language))
            for language in sorted(languages, reverse=True)
        ]
        # the whole lies between the languages and says nothing more
        return [chart(title, named[1:] or named, smooth=True, marks=marks)]
    charts = [chart(title, whole, smooth=True)]
    for language in sorted(languages, reverse=True):
        lines = _lines(runs, f"{part}/{language}")
        charts.append(chart(f"{title}, {LANGUAGES.get(language, language)}", lines, smooth=True))
    return charts


def _lines(runs: Sequence[RunRecord], key: str) -> list[Line]:
    lines = [Line(run.name, *run.series(key), colour) for run, colour in zip(runs, _run_colours(runs), strict=True)]
    return [line for line in lines if line.steps]


def _run_colours(runs: Sequence[RunRecord]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))]


def _language_colour(language: str) -> str:
    return {"zh": COLOURS[4], "en": COLOURS[0]}.get(language, COLOURS[2])


def _resumes(runs: Sequence[RunRecord]) -> list[int]:
    if len(runs) > 1:
        return []
    return [int(event["step"]) for event in runs[0].events if event.get("event") == "resumed"]


# ------------------------------------------------------------------------------------------------------------- drawing


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    smooth: bool = False,
    whole: bool = False,
    marks: Sequence[int] = (),
) -> Chart:
    """
    Args:
        smooth: a running mean over the values themselves.
        whole: the axis begins at 0 and shows every value; else it may cut off the first few.
        marks: steps at which the run was resumed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_style(title)):
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(left=0.14, right=0.97, top=0.87, bottom=0.17)
        axes = figure.add_subplot()
        tops, bottoms = [], []
        for line in lines:
            tops_of, bottoms_of = _draw(axes, line, smooth=smooth)
            tops.append(tops_of)
            bottoms.append(bottoms_of)
        for step in marks:
            axes.axvline(step, color=INK, lw=0.8, ls=(0, (2, 3)), alpha=0.6)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axes.set_ylabel(unit)
        axes.set_title(title, loc="left", fontsize=11)
        _limits(axes, bottoms, tops, whole=whole)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")
        return Chart(title, _svg(figure), _png(figure))


def _draw(axes: Any, line: Line, *, smooth: bool) -> tuple[float, float]:
    """-> highest and lowest value that must be seen"""
    steps, values = thinned(line.steps, line.values)
    label = f" {line.label}"  # with a leading underscore matplotlib would leave it out
    if line.marked or len(steps) == 1:
        style = {"lw": 1.4, "marker": "o", "ms": 3.5, "ls": "--" if line.dashed else "-"}
        axes.plot(steps, values, color=line.colour, label=label, **style)
        return max(values), min(values)
    shown = running_mean(values, max(1, len(values) // 25)) if smooth else values
    if smooth:
        axes.plot(steps, values, color=line.colour, lw=0.8, alpha=0.3)
    axes.plot(steps, shown, color=line.colour, lw=1.6, label=label)
    later = shown[len(shown) // 40 :]
    return max(later), min(later)


def _limits(axes: Any, bottoms: Sequence[float], tops: Sequence[float], *, whole: bool) -> None:
    low, high = min(bottoms, default=0.0), max(tops, default=1.0)
    if whole or low >= 0.0 and low < 0.6 * high:
        low = min(low, 0.0)
    margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    axes.set_ylim(low if low == 0.0 else low - margin, high + margin)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of as many neighbours; the last step stays the last."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return list(steps), list(values)
    bins = [slice(first, first + size) for first in range(0, len(steps), size)]
    return [steps[part][-1] for part in bins], [sum(values[part]) / len(values[part]) for part in bins]


def running_mean(values: Sequence[float], span: int) -> list[float]:
    near = [values[max(0, place - span // 2) : place + span // 2 + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in near]


def _style(title: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
        "svg.hashsalt": title,  # names inside one SVG must not meet those of another in the page
        "text.parse_math": False,  # a run may be named $x$
        "font.family": ["DejaVu Sans", _chinese_font()],
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.formatter.limits": (-3, 5),
    }


@functools.cache
def _chinese_font() -> str:
    """The name under which matplotlib finds it."""
    from matplotlib import font_manager

    from train.evaluator.picture import chinese_font_path

    path = str(chinese_font_path())
    font_manager.fontManager.addfont(path)
    return str(font_manager.FontProperties(fname=path).get_name())


def _svg(figure: Any) -> str:
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)  # a style in here is one for the whole page
    text = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")


def _png(figure: Any) -> Image.Image:
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=DPI, facecolor="white")
        return Image.open(file).convert("RGB")


def tiled(pictures: Sequence[Image.Image], columns: int = 3) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = min(columns, len(pictures))
    canvas = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for place, picture in enumerate(pictures):
        canvas.paste(picture, ((place % columns) * width, (place // columns) * height))
    return canvas
