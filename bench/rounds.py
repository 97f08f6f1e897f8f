"""The turns of contenders that ran several times become one row each.

In: a row a turn, in the order in which they ran, and each one's latent. Out: how a turn compares with its reference,
and for each contender the row of the median turn of those that met the fastest processor. Nothing that went wrong in
another turn is left out: other bits are the row's too, and a turn that failed stands in its `rounds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contenders import CONTENDERS
from bench.processor import SLOWER
from bench.results import Row, add_comparison


def compare_turns(turns: Sequence[Row], latents: Sequence[Path]) -> None:
    """Add to each turn how it compares with the first turn of its reference that ran, whatever came first.

    Without such a turn there is no ratio, and bits are unequal where a contender's own turns differ: one of them is not
    the reference's.
    """
    first: dict[str, int] = {}
    for index, turn in enumerate(turns):
        if "error" not in turn:
            first.setdefault(turn["name"], index)
    for turn, latent in zip(turns, latents, strict=True):
        if "error" in turn:
            continue
        reference = first.get(CONTENDERS[turn["name"]].reference)
        if reference is not None:
            add_comparison(turn, turns[reference], latent, latents[reference])
            continue
        own = first[turn["name"]]
        add_comparison(turn, turns[own], latent, latents[own])
        turn.update(ratio_to_resident=None, bit_equal=None if turn["bit_equal"] else False)


def merge_rounds(turns: Sequence[Row]) -> list[Row]:
    """One row a contender, in the order of their first turns; `turns` have been compared."""
    names = dict.fromkeys(turn["name"] for turn in turns)
    rows = {name: _merged([turn for turn in turns if turn["name"] == name]) for name in names}
    for name, row in rows.items():
        if row.get("ratio_to_resident") is not None:
            # Both times are those of their fastest processor.
            row["ratio_to_resident"] = row["step_s_median"] / rows[CONTENDERS[name].reference]["step_s_median"]
    return list(rows.values())


def _merged(turns: Sequence[Row]) -> Row:
    """The turn that counts, or the first where none ran, and what became of all of them."""
    if not turns[0]["ran"]:
        return dict(turns[0])  # it cannot run here, in no round
    finished = [turn for turn in turns if "error" not in turn]
    row = dict(_median_of_fastest(finished) if finished else turns[0])
    row["rounds"] = [_round(turn) for turn in turns]
    other = [turn for turn in finished if turn["bit_equal"] is False]
    if other:
        differences = [turn["max_abs_difference"] for turn in other]
        row["bit_equal"] = False
        row["max_abs_difference"] = math.nan if any(map(math.isnan, differences)) else max(differences)
    return row


def _median_of_fastest(turns: Sequence[Row]) -> Row:
    """Of the turns that met the fastest processor, the one with the median step, of two the faster."""
    least_ms = min(turn["loop_ms"] for turn in turns)
    near = [turn for turn in turns if turn["loop_ms"] <= SLOWER * least_ms]
    return sorted(near, key=lambda turn: turn["step_s_median"])[(len(near) - 1) // 2]


def _round(turn: Row) -> dict[str, Any]:
    if "error" in turn:
        return {"step_s_median": None, "loop_ms": None, "error": turn["error"]}
    return {key: turn[key] for key in ("step_s_median", "loop_ms", "bit_equal")}
