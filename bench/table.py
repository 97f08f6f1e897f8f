"""The rows of a benchmark as a text table; what went wrong stands below it in words, and so does a processor that was
slower for some of them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.processor import SLOWER
from bench.results import Row
from bench.spec import GIB
from bench.timeline import format_timeline

COLUMNS = (
    ("s/step", "step_s_median", 4),
    ("min", "step_s_min", 4),
    ("max", "step_s_max", 4),
    ("x resident", "ratio_to_resident", 3),
    ("calls", "calls_per_step", 0),
    ("peak GiB", "peak_gib", 2),
    ("left GiB", "peak_margin_gib", 2),
    ("resident", "resident_gib", 2),
    ("streamed", "streamed_gib_per_step", 2),
    ("moved", "moved_gib_per_step", 2),
    ("first step s", "first_step_s", 2),
)
"""Heading, key and decimal places."""

MORE_ROUNDS = 2

BITS = {True: "equal", False: "DIFFER", None: "-"}


def format_table(rows: Sequence[Row]) -> str:
    """One line a contender, then a line for each that failed, differs, or proves little."""
    lines = [["contender", "bits", *[heading for heading, _, _ in COLUMNS]]]
    for row in rows:
        if "error" in row:
            lines.append([row["name"], "failed" if row["ran"] else "absent", *["" for _ in COLUMNS]])
        else:
            numbers = [_decimal(row[key], places) for _, key, places in COLUMNS]
            lines.append([row["name"], BITS[row["bit_equal"]], *numbers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *[remark for row in rows for remark in _remarks(row)], *_slow_processor(rows)])


def _slow_processor(rows: Sequence[Row]) -> list[str]:
    """A line that names those whose times would have been shorter on the processor as the others met it, if any."""
    timed = [row for row in rows if row.get("loop_ms") is not None]  # older results have none
    least_ms = min((row["loop_ms"] for row in timed), default=0.0)
    slow = [row for row in timed if row["loop_ms"] > SLOWER * least_ms]
    if not slow:
        return []
    said = [f"{row['loop_ms'] / least_ms:.1f} times slower while {row['name']} ran" for row in slow]
    rounds = max(len(row.get("rounds", [row])) for row in timed) + MORE_ROUNDS
    return [f"the processor was {', '.join(said)}: repeat with --rounds {rounds}"]


def _remarks(row: Row) -> list[str]:
    if "error" in row:
        return ["", f"{row['name']}: {row['error']}"]
    rounds = row.get("rounds", [])
    failed = [each["error"].splitlines()[-1] for each in rounds if "error" in each]
    other = sum(each.get("bit_equal") is False for each in rounds)
    remarks = []
    if failed:
        remarks.append(f"{row['name']}: failed in {len(failed)} of {len(rounds)} rounds: {failed[0]}")
    if row["bit_equal"] is False:
        where = f" in {other} of {len(rounds)} rounds" if len(rounds) > 1 else ""
        remarks.append(f"{row['name']}: its output differs{where} by up to {row['max_abs_difference']:.3g}")
    if not row["latent_is_finite"]:
        remarks.append(f"{row['name']}: its output holds NaN or infinity, so that equal bits prove little")
    if row["report"].get("predicted_step_ms") is not None:
        remarks.append(_expected(row))
    if row["trace"] is not None:
        remarks.append(f"{row['name']}: {format_timeline(row['trace'])}")
    return remarks


def _expected(row: Row) -> str:
    """What LayerStream's planner expected of the step, and the RAM that is page-locked for it."""
    report = row["report"]
    parts = [f"predicted {report['predicted_step_ms']:.1f} ms a walk over the blocks"]
    if report.get("floor_ms") is not None:
        parts.append(f"floor {report['floor_ms']:.1f} ms")
    if report.get("limit") is not None:
        parts.append(f"limit: {report['limit']}")
    locked_bytes, streamed_bytes = report.get("page_locked_bytes"), report.get("streamed_bytes_per_step")
    if locked_bytes is not None and streamed_bytes:
        share = locked_bytes / streamed_bytes
        parts.append(f"{locked_bytes / GIB:.2f} GiB of RAM page-locked, {share:.0%} of what streams")
    return f"{row['name']}: {', '.join(parts)}"


def _decimal(number: float | None, places: int) -> str:
    return "-" if number is None else f"{number:.{places}f}"
