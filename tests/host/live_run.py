"""A real server with a small workflow that streams on a simulated card, for tests of what is shown of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from scripts.example import SIMULATED_CARD
from scripts.hosts import Host
from scripts.server import Server, run_server
from scripts.small_example import small_example
from scripts.workflow_models import WORKFLOWS

WORKFLOW = "sd15"
CARD_GIB = 0.16
EVENT = "layerstream.state"


@contextmanager
def streaming_server(host: Host, *arguments: str, **options: Any) -> Iterator[Server]:
    """A server with the files of `WORKFLOW` and a simulated card."""
    environment = {SIMULATED_CARD: str(CARD_GIB), "OMP_NUM_THREADS": "1"}
    with run_server(host, WORKFLOWS[WORKFLOW](), arguments=arguments, environment=environment, **options) as server:
        yield server


def streamed_prompt(server: Server, *, steps: int = 2, mode: str = "auto", seed: int = 0) -> dict[str, Any]:
    """A prompt that streams about half of its model."""
    prompt = small_example(WORKFLOW, server.client.get_json("/object_info"), WORKFLOWS[WORKFLOW](), mode=mode)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"].update(steps=steps, seed=seed)
    return prompt


def post(server: Server, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that a POST is answered with."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(server.client.address + path, data=body), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class Listener:
    """One browser's worth of messages, each with when it came, while the context lasts."""

    def __init__(self, server: Server) -> None:
        self.messages: list[tuple[float, dict[str, Any]]] = []
        self._address = server.client.address
        self._is_over = threading.Event()
        self._is_connected = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))

    def __enter__(self) -> Listener:
        self._thread.start()
        assert self._is_connected.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _listen(self) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self._address}/ws?clientId=listener", max_msg_size=0) as socket,
        ):
            self._is_connected.set()
            while not self._is_over.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    continue
                event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                if event.get("type") == EVENT:
                    self.messages.append((time.monotonic(), event["data"]))
