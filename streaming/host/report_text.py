"""A report for people: what streamed, how, and what limits it, as plain text to copy and share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def report_text(state: dict[str, Any]) -> str:
    """The state that `GET /layerstream/state` gives, as lines of text."""
    return "\n".join(_lines(state)) + "\n"


def _lines(state: dict[str, Any]) -> Iterator[str]:
    yield "LayerStream report"
    yield sentence(Advice(*state["advice"]))
    card, host = state["now"]["card"], state["now"]["host"]
    if card is None:
        yield "Card: none to stream to"
    else:
        yield f"Card: {card['name']}, {_gib(card['total_bytes'])}"
        yield from (f"  {label:<18} {_gib(card[key])}" for label, key in CARD_PARTS)
    yield f"RAM: {_gib(host['ram_free_bytes'])} free of {_gib(host['ram_total_bytes'])}"
    yield f"  {'held for streaming':<18} {_gib(host['slab_bytes'])}, {_gib(host['page_locked_bytes'])} page-locked"
    for session in state["sessions"]:
        yield from _session_lines(session)


def _session_lines(session: dict[str, Any]) -> Iterator[str]:
    yield f"{session['model']} ({session['family']}, {session['backend']}), {session['blocks']} blocks"
    if not session["loaded"]:
        yield "  not on the card now"
    yield f"  resident           {_gib(session['resident_bytes'])} of a budget of {_gib(session['budget_bytes'])}"
    if session["streamed_bytes_per_step"] is not None:
        crossing = _gib(session["link_bytes_per_step"])
        yield f"  streamed a pass    {_gib(session['streamed_bytes_per_step'])}, {crossing} over the link"
        yield f"  ring               {_gib(session['ring_bytes'])}"
    yield "  " + ", ".join(f"{session[name]} {name.replace('_', ' ')}" for name in COUNTS)
    if session["step_ms"] is None:
        yield "  no pass was timed yet"
        return
    compute, wait, copy, restore = (session[f"{part}_ms"] for part in ("compute", "wait", "copy", "restore"))
    yield f"  a pass             {session['step_ms']:.1f} ms: {compute:.1f} ms compute, {wait:.1f} ms waiting"
    yield f"                     beside it {copy:.1f} ms copying, {restore:.1f} ms restoring"
    if session["predicted_step_ms"] is not None:
        limit = f"{session['floor_ms']:.1f} ms, by the {session['limit']}"
        yield f"  predicted          {session['predicted_step_ms']:.1f} ms, no faster than {limit}"
    slowest = sorted(session["times_ms"], key=lambda block: -(block["compute"] + block["wait"]))[:SLOWEST]
    for block in slowest:
        yield f"  {block['block']}: {block['compute']:.2f} ms compute, {block['wait']:.2f} ms waiting, {block['form']}"


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f} GiB"
