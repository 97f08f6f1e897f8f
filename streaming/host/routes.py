"""The pack's addresses on ComfyUI's server.

`GET /layerstream/state`   what is true now, with history: JSON, as the messages to the browser, and more of each model
`GET /layerstream/report`  the same for people: text, or JSON with `?format=json`
`POST /layerstream/free`   have streamed models leave the card, all or `{"gib": number}`; between runs only

What cannot be understood is answered with status 400, what cannot be done now with 409, and `{"error": reason}`.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from aiohttp import web

from .freeing import BadRequest, RunUnderWay, bytes_to_free, free_streamed
from .recorder import HISTORY_COLUMNS, Recorder
from .report_text import report_text
from .settings import GIB
from .telemetry import state

logger = logging.getLogger("layerstream")

FORMATS = ("text", "json")
RECORDER = web.AppKey("layerstream.recorder", Recorder)


def register_routes(server: Any) -> None:
    """Serve the addresses and begin to watch runs."""
    recorder = server.app[RECORDER] = Recorder(server)
    recorder.begin()

    @server.routes.get("/layerstream/state")
    async def get_state(request: web.Request) -> web.Response:
        return web.json_response(full_state(recorder))

    @server.routes.get("/layerstream/report")
    async def get_report(request: web.Request) -> web.Response:
        form = request.query.get("format", FORMATS[0])
        if form not in FORMATS:
            return refusal(400, f"format is {form!r}: it must be one of {', '.join(FORMATS)}")
        report = full_state(recorder)
        if form == "json":
            return web.json_response(report)
        return web.Response(text=report_text(report), content_type="text/plain")

    @server.routes.post("/layerstream/free")
    async def post_free(request: web.Request) -> web.Response:
        try:
            size_bytes = bytes_to_free(await request.read())
            # It waits for the queue and moves weights, which must not hold up the server.
            work = partial(free_streamed, server.prompt_queue, size_bytes)
            freed_bytes = await asyncio.get_running_loop().run_in_executor(None, work)
        except BadRequest as reason:
            return refusal(400, str(reason))
        except RunUnderWay as reason:
            return refusal(409, str(reason))
        logger.info("LayerStream: asked to free the card: gave back %.2f GiB", freed_bytes / GIB)
        return web.json_response({"freed_bytes": freed_bytes})


def recorder_of_server() -> Recorder:
    """The recorder of the server that runs in this process."""
    from server import PromptServer

    return PromptServer.instance.app[RECORDER]


def full_state(recorder: Recorder) -> dict[str, Any]:
    """What is true now, all that is known of each model, and the last ten minutes of running."""
    return {
        **state(),
        "now": recorder.moment(),
        "is_running": recorder.is_running,
        "happened": list(recorder.happenings),
        "history": {
            "columns": HISTORY_COLUMNS,
            "rows": [[row[column] for column in HISTORY_COLUMNS] for row in tuple(recorder.history)],
        },
    }


def refusal(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)
