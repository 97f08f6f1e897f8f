"""A picture of what streamed: the card's memory and the link over time, each model's blocks, the figures beside them.

In: the state that `GET /layerstream/state` gives. Out: a Pillow image. Colours and order are those of the live view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .report_text import Line, report_lines
from .settings import GIB

PARTS = {
    "resident": ("#4a90d9", "weights that stay"),
    "ring": ("#e8a33d", "ring"),
    "activation": ("#36b3a0", "compute"),
    "other_model": ("#c583c0", "other models"),
    "other_program": ("#8a919c", "other programs"),
}
FORMS = {"resident": "#4a90d9", "resident_packed": "#2f5f93", "streamed": "#e8a33d", "streamed_packed": "#8f6a2e"}
BACKGROUND, TEXT, QUIET, BORDER, LINE = "#1b1c1f", "#e6e6e6", "#9aa0a8", "#45484e", "#f4f1de"

MARGIN = 24
SPACE = 14
CHART_HEIGHT = 200
LINK_HEIGHT = 110
STRIP_HEIGHT = 26
FONT_PX = 15
LABEL_INDENT, LABEL_WIDTH = 12, 170
# Moments further apart are of different runs.
GAP_S = 2.0
RATE_OVER_S = 1.0

Rows = list[dict[str, Any]]


def draw_report(state: dict[str, Any], width: int) -> Image.Image:
    """The picture, `width` pixels wide and as high as it needs to be."""
    font = ImageFont.load_default(FONT_PX)
    room = width - 2 * MARGIN
    lines = [part for line in report_lines(state) for part in _folded(line, font, room)]
    line_height = FONT_PX + 5
    strips = [session for session in state["sessions"] if session["units"]]
    height = 2 * MARGIN + CHART_HEIGHT + LINK_HEIGHT + 2 * SPACE + 3 * line_height
    height += len(strips) * (STRIP_HEIGHT + line_height + SPACE) + len(lines) * line_height
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    right = width - MARGIN
    rows = [dict(zip(state["history"]["columns"], row, strict=True)) for row in state["history"]["rows"]]

    top = MARGIN
    _memory(draw, rows, (MARGIN, top, right, top + CHART_HEIGHT))
    top += CHART_HEIGHT + 4
    left = MARGIN
    for color, label in PARTS.values():
        draw.rectangle((left, top + 4, left + 9, top + 13), fill=color)
        draw.text((left + 14, top), label, QUIET, font)
        left += 14 + int(draw.textlength(label, font)) + 16
    top += line_height + SPACE
    top = _link(draw, rows, (MARGIN, top, right, top + LINK_HEIGHT), font) + SPACE
    for session in strips:
        draw.text((MARGIN, top), f"{session['model']}: blocks that stay, and blocks that stream", QUIET, font)
        top += line_height
        _strip(draw, session["units"], (MARGIN, top, right, top + STRIP_HEIGHT))
        top += STRIP_HEIGHT + SPACE
    for label, text in lines:
        draw.text((MARGIN + LABEL_INDENT, top), label, QUIET, font)
        draw.text((MARGIN + (LABEL_WIDTH if label else 0), top), text, TEXT, font)
        top += line_height
    return image


def _folded(line: Line, font: Any, room: int) -> Iterator[Line]:
    """The line in as many as it takes to be no wider than `room`."""
    room -= LABEL_WIDTH if line.label else 0
    label, text = line.label, ""
    for word in line.text.split(" "):
        if text and font.getlength(f"{text} {word}") > room:
            yield Line(label, text)
            label, text = " " * bool(label), word
        else:
            text = f"{text} {word}" if text else word
    yield Line(label, text)


Box = tuple[int, int, int, int]


def _memory(draw: ImageDraw.ImageDraw, rows: Rows, box: Box) -> None:
    """Stacked areas of what holds the card, its budget a line."""
    most = max((row["total_bytes"] or 0 for row in rows), default=0)
    draw.rectangle(box, outline=BORDER)
    if not most:
        return
    x, y = _scales(rows, most, box)
    for run in _runs(rows):
        below = [0.0] * len(run)
        for part, (color, _) in PARTS.items():
            above = [low + (row[f"{part}_bytes"] or 0) for low, row in zip(below, run, strict=True)]
            upper = [(x(row), y(value)) for row, value in zip(run, above, strict=True)]
            lower = [(x(row), y(value)) for row, value in zip(run, below, strict=True)]
            if len(run) > 1:
                draw.polygon([*upper, *reversed(lower)], fill=color)
            below = above
        budget = [(x(row), y(row["budget_bytes"])) for row in run if row["budget_bytes"] is not None]
        if len(budget) > 1:
            draw.line(budget, fill=LINE, width=2)


def _link(draw: ImageDraw.ImageDraw, rows: Rows, box: Box, font: Any) -> int:
    """A line of what began to cross the link, its highest point written under it; give where that ends."""
    draw.rectangle(box, outline=BORDER)
    rates = link_rates(rows)
    most = max((rate for rate in rates if rate is not None), default=0.0)
    if most:
        x, y = _scales(rows, 1.1 * most, box)
        rate_of = {row["time_s"]: rate for row, rate in zip(rows, rates, strict=True)}
        for run in _runs(rows):
            points = [(x(row), y(rate)) for row in run if (rate := rate_of[row["time_s"]]) is not None]
            if len(points) > 1:
                draw.line(points, fill=PARTS["ring"][0], width=2)
    draw.text((box[0], box[3] + 4), f"over the link, {most / GIB:.2f} GiB/s at most", QUIET, font)
    return box[3] + 4 + FONT_PX + 5


def link_rates(rows: Rows) -> list[float | None]:
    """Bytes a second over the second before each moment; None where there is none of the same run."""
    rates: list[float | None] = []
    begin = 0
    for index, row in enumerate(rows):
        if index and row["time_s"] - rows[index - 1]["time_s"] > GAP_S:
            begin = index
        while begin < index - 1 and row["time_s"] - rows[begin + 1]["time_s"] >= RATE_OVER_S:
            begin += 1
        seconds = row["time_s"] - rows[begin]["time_s"]
        rates.append(max(0.0, (row["moved_bytes"] - rows[begin]["moved_bytes"]) / seconds) if seconds > 0 else None)
    return rates


def _strip(draw: ImageDraw.ImageDraw, units: Sequence[dict[str, Any]], box: Box) -> None:
    """One cell a block, by where its weights are."""
    left, top, right, bottom = box
    cell = (right - left) / len(units)
    for index, unit in enumerate(units):
        begin = left + index * cell
        draw.rectangle((begin, top, max(begin, begin + cell - 1), bottom), fill=FORMS.get(unit["form"], BORDER))


def _scales(rows: Rows, most: float, box: Box) -> tuple[Callable[[dict[str, Any]], float], Callable[[float], float]]:
    """Where a moment is across the box, and where a value is from its bottom up."""
    left, top, right, bottom = box
    begin = rows[0]["time_s"]
    seconds = max(1.0, rows[-1]["time_s"] - begin)

    def x(row: dict[str, Any]) -> float:
        return left + (right - left) * (row["time_s"] - begin) / seconds

    def y(value: float) -> float:
        return bottom - (bottom - top) * min(1.0, value / most)

    return x, y


def _runs(rows: Rows) -> list[Rows]:
    """The moments, in runs without gaps."""
    runs: list[Rows] = []
    for row in rows:
        if not runs or row["time_s"] - runs[-1][-1]["time_s"] > GAP_S:
            runs.append([])
        runs[-1].append(row)
    return runs
