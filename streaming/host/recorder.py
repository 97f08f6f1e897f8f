"""Watches runs and tells the browsers: what flows from the counters to whoever looks.

In: ComfyUI's server, whose queue says when something runs. Out: a moment every quarter of a second while something
runs, kept for ten minutes and sent to the browsers that are there; none while nothing runs. A thread of its own reads
counters, so that a step takes no notice; it sleeps until a prompt is queued.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

from .moment import Observer

logger = logging.getLogger("layerstream")

EVENT = "layerstream.state"
INTERVAL_S = 0.25
HISTORY_S = 600.0
# A queued prompt is checked before it can be taken up; one that is refused never is.
TAKE_UP_S = 10.0
MOST_HAPPENINGS = 200
# What of a card must change at once to be told of as something that happened.
TELLING_BYTES = 64 * 1024**2


class Recorder:
    """Moments of what runs, taken by a thread that `begin` starts."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._observer = Observer()
        self._observing = threading.Lock()
        self._queued = threading.Event()
        self._loaded: dict[str, int] = {}
        self.history: deque[dict[str, Any]] = deque(maxlen=int(HISTORY_S / INTERVAL_S))
        self.happenings: deque[dict[str, Any]] = deque(maxlen=MOST_HAPPENINGS)

    def begin(self) -> None:
        """Watch from the next prompt on."""
        self._server.add_on_prompt_handler(self._note_prompt)
        threading.Thread(target=self._watch, name="layerstream-recorder", daemon=True).start()

    def moment(self) -> dict[str, Any]:
        """What is true now."""
        with self._observing:
            return self._observer.moment(self._run())

    @property
    def is_running(self) -> bool:
        """True while a prompt waits or is executed."""
        return self._server.prompt_queue.get_tasks_remaining() > 0

    def _note_prompt(self, json_data: dict[str, Any]) -> dict[str, Any]:
        self._queued.set()
        return json_data

    def _watch(self) -> None:
        while True:
            self._queued.wait()
            self._queued.clear()
            try:
                self._follow()
            except Exception:
                # Whatever fails here must not end the live view of later runs, and fails no run.
                logger.exception("LayerStream: the live view lost sight of this run")

    def _follow(self) -> None:
        """Take moments until nothing runs any more, and one after that."""
        deadline = time.monotonic() + TAKE_UP_S
        while not self.is_running:
            if time.monotonic() > deadline:
                return
            time.sleep(INTERVAL_S)
        is_running = True
        while is_running:
            begun = time.monotonic()
            is_running = self.is_running
            self._take()
            time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - begun)))

    def _take(self) -> None:
        moment = self.moment()
        moment["happened"] = self._note_changes(moment)
        self.history.append(_slim(moment))
        if self._server.sockets:
            self._server.send_sync(EVENT, moment)

    def _run(self) -> dict[str, Any] | None:
        """The prompt and the node that are executed."""
        items = tuple(self._server.prompt_queue.currently_running.values())
        if not items:
            return None
        _, prompt_id, prompt = items[0][:3]
        node_id = self._server.last_node_id
        node = prompt.get(node_id, {}) if node_id is not None else {}
        return {"prompt": prompt_id, "node": node_id, "class": node.get("class_type")}

    def _note_changes(self, moment: dict[str, Any]) -> list[dict[str, Any]]:
        """What came to devices and what left since the moment before."""
        loaded: dict[str, int] = {}
        for model in moment["models"]:
            name = f"{model['name']} ({model['device']})"
            loaded[name] = loaded.get(name, 0) + model["loaded_bytes"]
        happened = []
        for name in {**self._loaded, **loaded}:
            change = loaded.get(name, 0) - self._loaded.get(name, 0)
            if abs(change) >= TELLING_BYTES or (change and (name in loaded) != (name in self._loaded)):
                happened.append({"time_s": moment["time_s"], "model": name, "change_bytes": change})
        self._loaded = loaded
        self.happenings.extend(happened)
        return happened


# What is kept of a moment, in this order.
HISTORY_COLUMNS = (
    "time_s",
    "total_bytes",
    "resident_bytes",
    "ring_bytes",
    "activation_bytes",
    "other_model_bytes",
    "other_program_bytes",
    "free_bytes",
    "budget_bytes",
    "moved_bytes",
    "passes",
)


def _slim(moment: dict[str, Any]) -> dict[str, Any]:
    """The moment's figures by `HISTORY_COLUMNS`, with the class of the node that was executed."""
    run = moment["run"] or {}
    figures = {
        "time_s": moment["time_s"],
        "moved_bytes": sum(session["moved_bytes"] for session in moment["sessions"]),
        "passes": sum(session["passes"] for session in moment["sessions"]),
        **(moment["card"] or {}),
    }
    return {**{column: figures.get(column) for column in HISTORY_COLUMNS}, "class": run.get("class")}
