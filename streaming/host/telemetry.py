"""What the engine measured of one model, as plain figures for the browser and for people.

In: a stream, whose session and meter hold every figure. Out: a dict for JSON. What changes from moment to moment is in
`moment.py`; this is the rest, read when a plan or a timed pass is new.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..engine.meter import PassTimes
from .advice import advice
from .budget import budget_of
from .ladder import rungs_taken
from .memory import mapped_bytes
from .streams import ModelStream, live_streams


def report(stream: ModelStream) -> dict[str, Any]:
    """Figures of one model; bytes unless the name says otherwise, None where nothing was measured yet."""
    session, plan, meter = stream.session, stream.session.plan, stream.session.meter
    times = meter.times or PassTimes()
    expected = session.expect(plan) if plan else None
    budget = budget_of(stream)
    return {
        "id": stream.number,
        "nodes": sorted(stream.node_ids),
        "model": type(stream.model).__name__,
        "family": stream.family.name,
        "family_listed": stream.family.is_listed,
        "backend": stream.device.name,
        "has_clock": stream.device.has_clock,
        "blocks": len(session.parts.blocks),
        "loaded": stream.is_in_place,
        "resident_bytes": session.resident_bytes,
        "packed_resident_bytes": session.packed_resident_bytes,
        "outside_bytes": session.outside_bytes,
        "streamed_bytes_per_step": plan.streamed_bytes if plan else None,
        "is_packed": session.is_packed if plan else None,
        "in_file_bytes_per_step": session.in_file_bytes if plan else None,
        "run_time_patches": len(stream.run_time.by_key) if stream.run_time else 0,
        "patch_bytes": stream.patch_bytes,
        "moved_bytes_per_step": meter.last.moved_bytes if meter.passes else None,
        "ring_bytes": plan.ring_bytes + plan.scratch_bytes if plan else None,
        "link_bytes_per_step": session.link_bytes if plan else None,
        "host_bytes": session.host_bytes,
        "page_locked_bytes": session.page_locked_bytes,
        "mapped_bytes": mapped_bytes(stream),
        "peak_bytes": stream.device.peak_bytes(),
        "budget_bytes": stream.budget_bytes,
        "budget_split_bytes": budget.split() if budget else None,
        "fitting_bytes": stream.fitting_bytes,
        "passes": meter.passes,
        "broken_passes": meter.broken_passes,
        "hits": meter.total.hits,
        "misses": meter.total.misses,
        "departures": meter.total.departures,
        "unplaced": meter.total.unplaced,
        "predicted_step_ms": expected.step_ms if expected else None,
        "floor_ms": expected.floor_ms if expected else None,
        "limit": expected.limit if expected else None,
        "expected_link_ms": expected.link_ms if expected else None,
        "expected_compute_ms": expected.compute_ms if expected else None,
        "step_ms": times.pass_ms if meter.times else None,
        "copy_ms": times.total_ms("copy_ms"),
        "wait_ms": times.total_ms("wait_ms"),
        "restore_ms": times.total_ms("restore_ms"),
        "compute_ms": times.busy_ms,
        "link_bytes_per_s": meter.rates.link * 1000 if meter.rates else None,
        "rungs": rungs_taken(stream.model),
        "moves": asdict(stream.moves),
        "units": [
            {
                "name": block.name,
                "bytes": block.weight_bytes(),
                "form": plan.forms[index].name.lower() if plan else None,
            }
            for index, block in enumerate(session.parts.blocks)
        ],
        "times_ms": [
            {
                "block": session.parts.blocks[index].name,
                "form": plan.forms[index].name.lower() if plan else None,
                "copy": block.copy_ms,
                "wait": block.wait_ms,
                "restore": block.restore_ms,
                "compute": block.compute_ms,
                "lead": block.lead_ms,
            }
            for index, block in times.blocks.items()
        ],
    }


def state() -> dict[str, Any]:
    """Figures of every model that streams now, and the one thing to say of them."""
    sessions = [report(stream) for stream in live_streams()]
    return {"sessions": sessions, "advice": advice(sessions)}
