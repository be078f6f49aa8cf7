"""The report's pictures, each by itself: as PNG beside the page, and for wandb."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from data.transform import to_tensor
from train.evaluator.picture import text_beside_images
from train.report.attention import sheet
from train.report.chart import tiled
from train.report.samples import Compared, Found, Query

Rows = Sequence[tuple[Any, Sequence[tuple[str, bool | None]]]]


def pictures_of(content: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Name -> picture, of what the page shows (`train.report.page.collect`)."""
    found: dict[str, Image.Image] = {}
    charts = [*content["training_charts"], *content["evaluation_charts"]]
    if charts:
        found["curves"] = tiled([chart.picture for chart in charts])
    for group in content["retrieval"]:
        for one in group["found"]:
            _add(found, f"{one.evaluator}_{one.language}_{one.direction}", _retrieval(one))
    for compared in content["said"]:
        _add(found, f"{compared.evaluator}_{compared.language}", _said(compared))
    for group in content["attention"]:
        for number, look in enumerate(group["looks"].pictures, start=1):
            _add(found, f"attention_{number}", [], sheet(look))
    return found


def _add(found: dict[str, Image.Image], name: str, rows: Rows, picture: Image.Image | None = None) -> None:
    """Under a name that no other has; nothing where there is nothing to see."""
    if picture is None and not rows:
        return
    name = re.sub(r"\W", "_", name)
    number = 1 + sum(other == name or re.fullmatch(rf"{name}_\d+", other) is not None for other in found)
    found[name if number == 1 else f"{name}_{number}"] = picture or text_beside_images(rows, columns=1)


def _retrieval(found: Found) -> Rows:
    queries = [query for query in found.right + found.wrong if _picture(query) is not None]
    return [(_square(_picture(query)), _lines(query)) for query in queries]


def _picture(query: Query) -> Image.Image | None:
    """Its own, or that of the first candidate."""
    return query.picture or next((candidate.picture for candidate in query.candidates), None)


def _lines(query: Query) -> list[tuple[str, bool | None]]:
    if query.picture is None:
        return [(query.text, query.rank == 1), (f"the right picture is in place {query.rank}", None)]
    lines: list[tuple[str, bool | None]] = [
        (f"{place}  {candidate.text}", candidate.right) for place, candidate in enumerate(query.candidates[:3], start=1)
    ]
    return [*lines, (f"right, in place {query.rank}:  {query.own}", None)] if query.own else lines


def _said(compared: Compared) -> Rows:
    rows = []
    for one in compared.rows:
        if one.picture is None:
            continue
        lines: list[tuple[str, bool | None]] = [(one.asked, None)] if one.asked else []
        lines += [(f"{name}:  {text}", right) for name, (text, right) in zip(compared.sets, one.answers, strict=True)]
        lines += [(f"right:  {one.references[0]}", None)] if one.references else []
        rows.append((_square(one.picture), lines))
    return rows


def _square(picture: Image.Image | None) -> Any:
    """uint8 CHW on white, so that nothing is squeezed."""
    assert picture is not None
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return to_tensor(canvas)
