"""What the engine measured, as plain figures for the browser and for people."""

from __future__ import annotations

from typing import Any

from .streams import ModelStream, live_streams


def report(stream: ModelStream) -> dict[str, Any]:
    """Figures of one model; bytes unless the name says otherwise, None where nothing was measured yet."""
    session, plan, meter = stream.session, stream.session.plan, stream.session.meter
    return {
        "model": type(stream.model).__name__,
        "family": stream.family.name,
        "family_listed": stream.family.is_listed,
        "backend": stream.device.name,
        "blocks": len(session.parts.blocks),
        "loaded": stream.is_in_place,
        "resident_bytes": session.resident_bytes,
        "outside_bytes": session.outside_bytes,
        "streamed_bytes_per_step": plan.streamed_bytes if plan else None,
        "is_packed": plan.is_packed if plan else None,
        "moved_bytes_per_step": meter.last.moved_bytes if meter.passes else None,
        "ring_bytes": plan.ring_bytes if plan else None,
        "host_bytes": session.host_bytes,
        "page_locked_bytes": session.page_locked_bytes,
        "peak_bytes": stream.device.peak_bytes(),
        "budget_bytes": stream.budget_bytes,
        "passes": meter.passes,
        "broken_passes": meter.broken_passes,
        "hits": meter.total.hits,
        "misses": meter.total.misses,
        "departures": meter.total.departures,
        "copy_ms": sum(times.copy_ms or 0.0 for times in meter.times.values()),
        "wait_ms": sum(times.wait_ms or 0.0 for times in meter.times.values()),
        "restore_ms": sum(times.restore_ms or 0.0 for times in meter.times.values()),
        "compute_ms": sum(times.compute_ms or 0.0 for times in meter.times.values()),
        "times_ms": [
            {
                "block": session.parts.blocks[index].name,
                "copy": times.copy_ms,
                "wait": times.wait_ms,
                "restore": times.restore_ms,
                "compute": times.compute_ms,
            }
            for index, times in sorted(meter.times.items())
            if times.visits
        ],
    }


def state() -> dict[str, Any]:
    """Figures of every model that streams now."""
    return {"sessions": [report(stream) for stream in live_streams()]}


def register_routes(server: Any) -> None:
    """Serve `GET /layerstream/state` from ComfyUI's own server."""
    from aiohttp import web

    @server.routes.get("/layerstream/state")
    async def get_state(request: web.Request) -> web.Response:
        return web.json_response(state())
