"""Talks to a running ComfyUI server: reads its routes, queues prompts, follows their progress, fetches images.

It starts and stops nothing; `server.py` does.
"""

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncIterable, Callable
from typing import Any

import aiohttp

from .workflow import Prompt

ProgressCallback = Callable[[int, int], None]
"""Receives the steps done and the steps in all of the node that runs."""

REQUEST_TIMEOUT_S = 60.0
# Messages carry whole node outputs, which may pass aiohttp's limit of 4 MiB.
MESSAGE_LIMIT_BYTES = 64 << 20


class ServerError(RuntimeError):
    """The server did not start, refused a prompt or failed while running it."""


class Client:
    """One browser's worth of access to the server at `address`, such as `http://127.0.0.1:8188`."""

    def __init__(self, address: str) -> None:
        self.address = address
        # Requests to this machine must not go through a proxy that the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get_bytes(self, path: str) -> bytes:
        """The body that a GET of `path` (with its query) returns.

        Raises:
            ServerError: the server does not answer, or answers with an error status.
        """
        try:
            with self._opener.open(self.address + path, timeout=REQUEST_TIMEOUT_S) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"GET {path} failed with status {error.code}: {error.read()[:500]!r}") from error
        except OSError as error:
            raise ServerError(f"GET {path} got no answer from {self.address}: {error}") from error

    def get_json(self, path: str) -> Any:
        """The parsed JSON body that a GET of `path` returns; raises as `get_bytes` does."""
        return json.loads(self.get_bytes(path))

    def free(self) -> None:
        """Have the server let go of its models and what nodes gave, once it is idle, as its own button does.

        Raises:
            ServerError: the server does not answer.
        """
        wanted = json.dumps({"unload_models": True, "free_memory": True}).encode()
        request = urllib.request.Request(f"{self.address}/free", wanted, {"Content-Type": "application/json"})
        try:
            self._opener.open(request, timeout=REQUEST_TIMEOUT_S).close()
        except OSError as error:
            raise ServerError(f"POST /free failed at {self.address}: {error}") from error

    def queue(self, prompt: Prompt, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Run `prompt` to its end and return its history entry, whose `outputs` name the images.

        Raises:
            ServerError: the server refused the prompt, a node failed, or the connection broke.
        """
        return asyncio.run(self._queue(prompt, on_progress))

    def images(self, history: dict[str, Any]) -> list[bytes]:
        """The image files that a queued prompt saved, in the order of its nodes."""
        saved = [image for output in history["outputs"].values() for image in output.get("images", [])]
        return [self.get_bytes(f"/view?{urllib.parse.urlencode(image)}") for image in saved]

    async def _queue(self, prompt: Prompt, on_progress: ProgressCallback | None) -> dict[str, Any]:
        client_id = uuid.uuid4().hex
        try:
            async with aiohttp.ClientSession() as session:
                # Listening before queueing, so that no message is missed.
                url = f"{self.address}/ws?clientId={client_id}"
                async with session.ws_connect(url, max_msg_size=MESSAGE_LIMIT_BYTES) as socket:
                    prompt_id = await self._post(session, prompt, client_id)
                    await _follow(socket, prompt_id, on_progress)
                async with session.get(f"{self.address}/history/{prompt_id}") as response:
                    history = (await response.json())[prompt_id]
        except aiohttp.ClientError as error:
            raise ServerError(f"lost the connection to {self.address}: {error}") from error
        if history["status"]["status_str"] != "success":
            raise ServerError(_failure(history["status"]["messages"]))
        return history

    async def _post(self, session: aiohttp.ClientSession, prompt: Prompt, client_id: str) -> str:
        request = {"prompt": prompt, "client_id": client_id}
        async with session.post(f"{self.address}/prompt", json=request) as response:
            answer = await response.json()
        if response.status != 200:
            details = json.dumps(answer.get("node_errors") or answer.get("error"), indent=1)
            raise ServerError(f"the server refused the prompt: {details}")
        return answer["prompt_id"]


async def _follow(socket: AsyncIterable[Any], prompt_id: str, on_progress: ProgressCallback | None) -> None:
    """Read messages until the server has finished `prompt_id`, well or badly."""
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        data = event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        if event["type"] == "progress" and on_progress is not None:
            on_progress(data["value"], data["max"])
        # No node left to execute: sent after the history entry is complete, on failures too.
        if event["type"] == "executing" and data["node"] is None:
            return
    raise ServerError("the server closed the connection while the prompt ran")


def _failure(messages: list[Any]) -> str:
    for kind, data in messages:
        if kind == "execution_error":
            trace = "".join(data.get("traceback", []))
            return f"{data['node_type']} failed: {data['exception_type']}: {data['exception_message']}\n{trace}"
    return f"the prompt did not finish: {json.dumps(messages)}"
