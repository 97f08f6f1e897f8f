"""One moment of everything that streams, as small as what is drawn from it.

In: live streams, the card. Out: a dict for JSON whose every figure is a counter of someone else's: rates and
differences are the reader's business. Reading counters is all that is done here, so that any thread may do it at any
time.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

from ..engine.forecast import Form
from ..engine.meter import PassTimes
from ..engine.plan import Plan
from .memory import Card, is_streamed, loaded_patchers, ram_use
from .streams import ModelStream, live_streams

# One letter a block: how its weights are kept, and over it what the pipeline does with it.
LETTERS = {Form.RESIDENT: "r", Form.RESIDENT_PACKED: "p", Form.STREAMED: "s", Form.STREAMED_PACKED: "z"}
FETCHED, RUNNING = "f", "c"


@dataclass
class _Known:
    """What was last seen of a stream: what is costly to count is counted again only when it can have changed."""

    plan: Plan | None = None
    times: PassTimes | None = None
    is_in_run: bool = False
    is_in_place: bool = False
    resident_bytes: int = 0
    letters: str = ""
    version: int = 0


class Observer:
    """Takes moments. Belongs to one thread at a time."""

    def __init__(self) -> None:
        self._card = Card()
        self._known: weakref.WeakKeyDictionary[ModelStream, _Known] = weakref.WeakKeyDictionary()

    def moment(self, run: dict[str, Any] | None) -> dict[str, Any]:
        """What is true now; `run` says which node of which prompt is executed."""
        streams = live_streams()
        known = [self._look_at(stream) for stream in streams]
        card = self._card.memory([(stream, seen.resident_bytes) for stream, seen in zip(streams, known, strict=True)])
        return {
            "time_s": time.time(),
            "run": run,
            "card": card._asdict() if card else None,
            "host": ram_use(streams)._asdict(),
            "models": [self._model(patcher) for patcher in loaded_patchers()],
            "sessions": [_session(stream, seen) for stream, seen in zip(streams, known, strict=True)],
        }

    def _look_at(self, stream: ModelStream) -> _Known:
        session, known = stream.session, self._known.setdefault(stream, _Known())
        plan, times, is_in_run, is_in_place = session.plan, session.meter.times, session.is_in_run, stream.is_in_place
        is_new = plan is not known.plan or times is not known.times or is_in_place != known.is_in_place
        # Residents come and go between runs and with plans only.
        if is_new or not (is_in_run and known.is_in_run):
            known.resident_bytes = stream.held_bytes
        if is_new:
            known.letters = "".join(LETTERS[form] for form in plan.forms) if plan else ""
            known.version += 1
            known.plan, known.times, known.is_in_place = plan, times, is_in_place
        known.is_in_run = is_in_run
        return known

    def _model(self, patcher: Any) -> dict[str, Any]:
        streams = is_streamed(patcher)
        known = self._known.get(patcher.stream) if streams else None
        # Adding up the blocks of a streamed model takes longer than all else here.
        size = known.resident_bytes + patcher.stream.session.ring_bytes if known else patcher.loaded_size()
        return {
            "name": type(patcher.model).__name__,
            "device": str(patcher.load_device),
            "loaded_bytes": int(size),
            "total_bytes": int(patcher.model_size()),
            "streams": streams,
        }


def _session(stream: ModelStream, known: _Known) -> dict[str, Any]:
    session, meter = stream.session, stream.session.meter

    def count(name: str) -> int:
        # The sum of all passes first: a pass that ends meanwhile is then missed once and not counted twice.
        return getattr(meter.total, name) + getattr(meter.current, name)

    return {
        "id": stream.number,
        "nodes": sorted(stream.node_ids),
        "model": type(stream.model).__name__,
        "version": known.version,
        "loaded": known.is_in_place,
        "in_run": known.is_in_run,
        "resident_bytes": known.resident_bytes,
        "ring_bytes": session.ring_bytes,
        "streamed_bytes_per_step": known.plan.streamed_bytes if known.plan else None,
        "budget_bytes": stream.budget_bytes,
        "passes": meter.passes,
        "moved_bytes": count("moved_bytes"),
        "hits": count("hits"),
        "misses": count("misses"),
        "departures": count("departures"),
        "blocks": _strip(stream, known.letters),
    }


def _strip(stream: ModelStream, letters: str) -> str:
    """One letter a block. Whether a copy has arrived would be a question to the driver, so it is not asked."""
    if not letters or not stream.is_in_place:
        return ""
    strip = list(letters)
    for place in stream.session.places():
        if place.index >= len(strip):
            continue
        if place.is_bound:
            strip[place.index] = RUNNING
        elif place.is_held and place.is_fresh and strip[place.index] != RUNNING:
            strip[place.index] = FETCHED
    return "".join(strip)
