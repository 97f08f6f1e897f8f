"""Grouped horizontal bars as an SVG picture, with nothing but the standard library.

In: groups of named values. Out: the picture's text. Each group has a scale of its own: the groups of a benchmark are
different models, and only bars of one group are to be compared.
"""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LABEL_WIDTH, NOTE_WIDTH, MARGIN = 860, 190, 190, 16
BAR_HEIGHT, BAR_GAP, GROUP_GAP, HEADING_HEIGHT, TITLE_HEIGHT = 15, 4, 18, 22, 30
FONT = "font-family='system-ui,-apple-system,Segoe UI,sans-serif'"
INK, FAINT, PAPER = "#1f2328", "#59636e", "#ffffff"


class Bar(NamedTuple):
    """One value; `note` stands behind the bar."""

    name: str
    value: float
    note: str
    colour: str


class Group(NamedTuple):
    heading: str
    bars: Sequence[Bar]


def bar_chart(title: str, groups: Sequence[Group]) -> str:
    """The groups below each other. Raises ValueError when there is no positive value in a group."""
    parts = [_text(MARGIN, MARGIN + 14, title, size=15, weight="600")]
    top = MARGIN + TITLE_HEIGHT
    for group in groups:
        parts.append(_text(MARGIN, top + 12, group.heading, size=12, weight="600"))
        top += HEADING_HEIGHT
        longest = max((bar.value for bar in group.bars), default=0.0)
        if longest <= 0:
            raise ValueError(f"`{group.heading}` has no positive value to draw")
        for bar in group.bars:
            parts += _bar(bar, top, longest)
            top += BAR_HEIGHT + BAR_GAP
        top += GROUP_GAP
    height = top - GROUP_GAP + MARGIN
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(title)}'>"
    )
    # A ground of its own: the page behind it may be light or dark.
    ground = f"<rect width='{WIDTH}' height='{height}' rx='6' fill='{PAPER}'/>"
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def _bar(bar: Bar, top: int, longest: float) -> list[str]:
    room = WIDTH - 2 * MARGIN - LABEL_WIDTH - NOTE_WIDTH
    length = room * bar.value / longest
    left, baseline = MARGIN + LABEL_WIDTH, top + BAR_HEIGHT - 4
    return [
        _text(left - 8, baseline, bar.name, size=11, colour=FAINT, anchor="end"),
        f"<rect x='{left}' y='{top}' width='{length:.1f}' height='{BAR_HEIGHT}' rx='2' fill='{bar.colour}'/>",
        _text(left + length + 6, baseline, bar.note, size=11),
    ]


def _text(
    x: float, y: float, text: str, *, size: int, weight: str = "400", colour: str = INK, anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y}' {FONT} font-size='{size}' font-weight='{weight}' fill='{colour}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )
