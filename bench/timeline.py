"""What a card did in one step: how busy each stream was, where the compute stream stood still, and why.

In: the events of a trace in Chrome's format, as torch's profiler writes it (times in microseconds). Out: plain values
and a text table. Pure: it profiles nothing, see `bench.trace`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

DEVICE_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "kernel"}
RESTORING = ("decode_kernel",)
"""What the names of kernels that restore packed weights hold."""
GAP_US = 50.0
LISTED_GAPS = 12
NAME_LENGTH = 44


class Work(NamedTuple):
    """One kernel or copy: when the device did it and when the host asked for it, None where that is not known."""

    stream: int
    kind: str
    name: str
    begin_us: float
    end_us: float
    copied_bytes: int
    asked_us: float | None


class Span(NamedTuple):
    begin_us: float
    end_us: float


def summarise(events: Sequence[dict[str, Any]], window_name: str) -> dict[str, Any]:
    """The step that the annotation `window_name` brackets; milliseconds and bytes, as JSON values.

    Raises ValueError when the trace has no such annotation.
    """
    window = _window(events, window_name)
    work = [item for item in _device_work(events) if item.begin_us < window.end_us and item.end_us > window.begin_us]
    by_stream: dict[int, list[Work]] = defaultdict(list)
    for item in sorted(work, key=lambda item: item.begin_us):
        by_stream[item.stream].append(item)
    streams = [_stream_row(stream, items, window) for stream, items in by_stream.items()]
    streams.sort(key=lambda row: -row["busy_ms"])
    compute = max(streams, key=lambda row: row["compute_ms"], default=None)
    summary: dict[str, Any] = {"step_ms": (window.end_us - window.begin_us) / 1e3, "streams": streams}
    if compute is not None:
        summary["compute_stream"] = compute["stream"]
        summary |= _gaps(by_stream[compute["stream"]], work, window)
    summary["host"] = _host_calls(events, window)
    return summary


def _window(events: Iterable[dict[str, Any]], name: str) -> Span:
    for event in events:
        if event.get("name") == name and event.get("cat") == "user_annotation":
            return Span(event["ts"], event["ts"] + event["dur"])
    raise ValueError(f"the trace has no annotation `{name}`: the profiler recorded no whole step")


def _device_work(events: Iterable[dict[str, Any]]) -> list[Work]:
    calls = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        kind = DEVICE_KINDS.get(event.get("cat", ""))
        if kind is None:
            continue
        if any(part in event["name"] for part in RESTORING):
            kind = "restore"
        details = event.get("args", {})
        found.append(
            Work(
                details.get("stream", -1),
                kind,
                event["name"],
                event["ts"],
                event["ts"] + event["dur"],
                details.get("bytes", 0),
                calls.get(details.get("correlation")),
            )
        )
    return found


def _stream_row(stream: int, items: Sequence[Work], window: Span) -> dict[str, Any]:
    copies = [item for item in items if item.kind == "copy"]
    copy_ms = busy_us(copies, window) / 1e3
    copied_bytes = sum(item.copied_bytes for item in copies)
    return {
        "stream": stream,
        "busy_ms": busy_us(items, window) / 1e3,
        "compute_ms": busy_us([item for item in items if item.kind == "kernel"], window) / 1e3,
        "restore_ms": busy_us([item for item in items if item.kind == "restore"], window) / 1e3,
        "copy_ms": copy_ms,
        "copied_bytes": copied_bytes,
        "kernels": sum(item.kind != "copy" for item in items),
        "copies": len(copies),
    }


def busy_us(items: Iterable[Work], window: Span) -> float:
    """Time within the window in which at least one of `items`, sorted by begin, was under way."""
    total, reached = 0.0, window.begin_us
    for item in items:
        end = min(item.end_us, window.end_us)
        total += max(0.0, end - max(item.begin_us, reached))
        reached = max(reached, end)
    return total


def _gaps(compute: Sequence[Work], work: Sequence[Work], window: Span) -> dict[str, Any]:
    """Where the compute stream stood still for longer than `GAP_US`, longest first.

    Of each, `host_ms` until the host asked for what comes next, and `wait_ms` from then on: the stream waited for
    another one, or what was asked for stood in line behind the work of others.
    """
    gaps: list[dict[str, Any]] = []
    before: Work | None = None
    reached = window.begin_us
    copies = sorted((item for item in work if item.kind == "copy"), key=lambda item: item.begin_us)
    for item in compute:
        if item.begin_us - reached > GAP_US:
            span = Span(reached, item.begin_us)
            asked_us = min(max(item.asked_us or 0.0, span.begin_us), span.end_us)
            gaps.append(
                {
                    "at_ms": (span.begin_us - window.begin_us) / 1e3,
                    "length_ms": (span.end_us - span.begin_us) / 1e3,
                    "host_ms": (asked_us - span.begin_us) / 1e3,
                    "wait_ms": (span.end_us - asked_us) / 1e3,
                    "copying_ms": busy_us(copies, span) / 1e3,
                    "before": before.name if before else "(start of the step)",
                    "after": item.name,
                }
            )
        if item.end_us > reached:
            reached, before = item.end_us, item
    gaps.sort(key=lambda gap: -gap["length_ms"])
    return {
        "gaps": len(gaps),
        "gaps_ms": sum(gap["length_ms"] for gap in gaps),
        "gaps_by_cause_ms": {cause: sum(gap[f"{cause}_ms"] for gap in gaps) for cause in ("wait", "host")},
        "longest_gaps": gaps[:LISTED_GAPS],
        "tail_ms": max(0.0, window.end_us - reached) / 1e3,
        "queue_ms_median": _queue_ms_median(compute),
    }


def _queue_ms_median(compute: Sequence[Work]) -> float | None:
    """Median time from the host's call to the kernel's begin: near nothing when the host hardly keeps up."""
    leads = sorted(item.begin_us - item.asked_us for item in compute if item.asked_us is not None)
    return leads[len(leads) // 2] / 1e3 if leads else None


def _host_calls(events: Iterable[dict[str, Any]], window: Span) -> list[dict[str, Any]]:
    """Calls into the CUDA runtime within the window by name, those that took longest first."""
    begins_and_ends: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and window.begin_us <= event["ts"] < window.end_us:
            begins_and_ends[event["name"]].append(Span(event["ts"], event["ts"] + event["dur"]))
    rows: list[dict[str, Any]] = [
        {"call": name, "count": len(spans), "ms": sum(span.end_us - span.begin_us for span in spans) / 1e3}
        for name, spans in begins_and_ends.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:6]


def format_timeline(summary: dict[str, Any]) -> str:
    """The summary as a short text table."""
    step_ms = summary["step_ms"]
    lines = [f"one step under the profiler: {step_ms:.2f} ms"]
    lines.append("  stream   busy   compute  restore     copy       copied   kernels  copies   (ms)")
    for row in summary["streams"]:
        rate = row["copied_bytes"] / row["copy_ms"] / 1e6 if row["copy_ms"] else 0.0
        lines.append(
            f"  {row['stream']:>6} {row['busy_ms']:>6.2f} {row['compute_ms']:>9.2f} {row['restore_ms']:>8.2f} "
            f"{row['copy_ms']:>8.2f} {row['copied_bytes'] / 1e6:>9.1f} MB {row['kernels']:>9} {row['copies']:>7}"
            + (f"   {rate:.1f} GB/s" if row["copies"] else "")
        )
    if "gaps" in summary:
        causes = ", ".join(f"{cause} {length:.2f}" for cause, length in summary["gaps_by_cause_ms"].items())
        lines.append(
            f"  stream {summary['compute_stream']} idle: {summary['gaps_ms']:.2f} ms in {summary['gaps']} gaps over "
            f"{GAP_US:.0f} us ({causes}), {summary['tail_ms']:.2f} ms at the end; "
            f"kernels queued for {_milliseconds(summary['queue_ms_median'])} ms (median)"
        )
        lines += [_gap_line(gap) for gap in summary["longest_gaps"]]
    calls = ", ".join(f"{row['call']} {row['ms']:.2f} ms ({row['count']})" for row in summary["host"])
    return "\n".join([*lines, f"  host: {calls}"])


def _gap_line(gap: dict[str, Any]) -> str:
    before, after = gap["before"][:NAME_LENGTH], gap["after"][:NAME_LENGTH]
    return (
        f"    at {gap['at_ms']:>7.2f} for {gap['length_ms']:>5.2f} ms, host {gap['host_ms']:.2f}, wait "
        f"{gap['wait_ms']:.2f}, copies ran for {gap['copying_ms']:.2f}: {before} | {after}"
    )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
