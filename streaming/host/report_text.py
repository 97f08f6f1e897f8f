"""A report for people: what streamed, how, and what limits it, as plain text to copy and share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .advice import Advice, sentence
from .settings import GIB

CARD_PARTS = (
    ("weights that stay", "resident_bytes"),
    ("ring", "ring_bytes"),
    ("compute", "activation_bytes"),
    ("other models", "other_model_bytes"),
    ("other programs", "other_program_bytes"),
    ("free", "free_bytes"),
)
COUNTS = ("passes", "broken_passes", "hits", "misses", "departures", "unplaced")
SLOWEST = 5


class Line(NamedTuple):
    """A line of the report: a figure with its label, or, without one, a sentence."""

    label: str
    text: str


def report_text(state: dict[str, Any]) -> str:
    """The state that `GET /layerstream/state` gives, as lines of text."""
    lines = (f"  {label:<18} {text}" if label else text for label, text in report_lines(state))
    return "\n".join(lines) + "\n"


def report_lines(state: dict[str, Any]) -> Iterator[Line]:
    """The same, line by line."""
    yield Line("", "LayerStream report")
    yield Line("", sentence(Advice(*state["advice"])))
    card, host = state["now"]["card"], state["now"]["host"]
    if card is None:
        yield Line("", "Card: none to stream to")
    else:
        yield Line("", f"Card: {card['name']}, {_gib(card['total_bytes'])}")
        yield from (Line(label, _gib(card[key])) for label, key in CARD_PARTS)
    yield Line("", f"RAM: {_gib(host['ram_free_bytes'])} free of {_gib(host['ram_total_bytes'])}")
    yield Line("held for streaming", f"{_gib(host['slab_bytes'])}, {_gib(host['page_locked_bytes'])} page-locked")
    for session in state["sessions"]:
        yield from _session_lines(session)


def _session_lines(session: dict[str, Any]) -> Iterator[Line]:
    where = "" if session["loaded"] else ", not on the card now"
    family = f"{session['family']}, {session['backend']}"
    yield Line("", f"{session['model']} ({family}), {session['blocks']} blocks{where}")
    yield Line("resident", f"{_gib(session['resident_bytes'])} of a budget of {_gib(session['budget_bytes'])}")
    if session["streamed_bytes_per_step"] is not None:
        crossing = _gib(session["link_bytes_per_step"])
        yield Line("streamed a pass", f"{_gib(session['streamed_bytes_per_step'])}, {crossing} over the link")
        yield Line("ring", _gib(session["ring_bytes"]))
    if session["in_file_bytes_per_step"]:
        yield Line("read from its file", f"{_gib(session['in_file_bytes_per_step'])} a pass: RAM is short")
    if session["patch_bytes"]:
        yield Line("patches on card", f"{_gib(session['patch_bytes'])}, applied as layers run")
    if session["run_time_patches"]:
        yield Line("patched as run", f"{session['run_time_patches']} weights: RAM was short for patched ones")
    yield Line("counted", ", ".join(f"{session[name]} {name.replace('_', ' ')}" for name in COUNTS))
    if session["step_ms"] is None:
        yield Line("a pass", "none was timed yet")
        return
    compute, wait, copy, restore = (session[f"{part}_ms"] for part in ("compute", "wait", "copy", "restore"))
    yield Line("a pass", f"{session['step_ms']:.1f} ms: {compute:.1f} ms compute, {wait:.1f} ms waiting")
    yield Line("beside it", f"{copy:.1f} ms copying, {restore:.1f} ms restoring")
    if session["predicted_step_ms"] is not None:
        limit = {"link": "link", "compute": "card"}[session["limit"]]
        floor = f"no faster than {session['floor_ms']:.1f} ms by the {limit}"
        yield Line("predicted", f"{session['predicted_step_ms']:.1f} ms, {floor}")
    slowest = sorted(session["times_ms"], key=lambda block: -(block["compute"] + block["wait"]))[:SLOWEST]
    for block in slowest:
        took = f"{block['compute']:.2f} ms compute, {block['wait']:.2f} ms waiting"
        yield Line("slow", f"{block['block']}: {took}, {block['form']}")


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f} GiB"
