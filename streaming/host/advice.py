"""What limits a run, and the one change that would help most.

In: figures as `telemetry.report` has them. Out: the name of a sentence and its figures. The sentences themselves are
with the translations, `locales/<language>/main.json`, for the browser and for reports alike.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .settings import GIB

LOCALES = Path(__file__).resolve().parents[2] / "locales"

# Of page-locked memory less than this share of the slabs is worth telling.
LOCKED_SHARE = 0.98
# A pass is late that takes this many times what was predicted.
LATE = 1.15


class Advice(NamedTuple):
    """A sentence's name under `layerstream.advice` and the figures in it."""

    name: str
    figures: dict[str, Any]


def advice(sessions: list[dict[str, Any]]) -> Advice:
    """The one thing to say of these models: of the one that runs, or the last that did."""
    loaded = [session for session in sessions if session["loaded"]]
    if not loaded:
        return Advice("nothing" if not sessions else "left", {})
    return _of_one(max(loaded, key=lambda session: session["streamed_bytes_per_step"] or 0))


def _of_one(session: dict[str, Any]) -> Advice:
    streamed_bytes, step_ms, predicted_ms = (
        session[key] for key in ("streamed_bytes_per_step", "step_ms", "predicted_step_ms")
    )
    model = {"model": session["model"]}
    if not streamed_bytes and not session["is_packed"]:
        return Advice("fits", {**model, "gib": _gib(session["resident_bytes"])})
    if session["in_file_bytes_per_step"]:
        return Advice("file", {**model, "gib": _gib(session["in_file_bytes_per_step"])})
    unlocked_bytes = session["host_bytes"] - session["page_locked_bytes"]
    if unlocked_bytes > (1 - LOCKED_SHARE) * session["host_bytes"]:
        return Advice("unlocked", {"gib": _gib(unlocked_bytes), "of": _gib(session["host_bytes"])})
    if not session["has_clock"]:
        return Advice("simulated", {**model, "gib": _gib(streamed_bytes)})
    if step_ms is None or predicted_ms is None:
        return Advice("unmeasured", model)
    if step_ms > LATE * predicted_ms:
        return Advice(
            "late", {"step": round(step_ms), "predicted": round(predicted_ms), "wait": round(session["wait_ms"])}
        )
    if session["limit"] == "link":
        excess_ms = session["expected_link_ms"] - session["expected_compute_ms"]
        # What more of the weights must stay for the link to keep pace.
        share = excess_ms / session["expected_link_ms"]
        return Advice(
            "link",
            {
                "link": round(session["expected_link_ms"]),
                "compute": round(session["expected_compute_ms"]),
                "gib": _gib(share * streamed_bytes),
            },
        )
    percent = max(0.0, 100 * (step_ms / session["expected_compute_ms"] - 1))
    return Advice("compute", {**model, "percent": round(percent, 1)})


def _gib(size_bytes: float) -> float:
    return round(size_bytes / GIB, 2)


@cache
def texts(language: str = "en") -> dict[str, Any]:
    """The pack's sentences in `language`."""
    return json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))["layerstream"]


def sentence(what: Advice) -> str:
    """The advice in English."""
    return texts()["advice"][what.name].format(**what.figures)
