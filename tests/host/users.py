"""Users of a server that is run for several."""

from __future__ import annotations

import json
import urllib.request
from typing import Any, NamedTuple

from scripts.server import Server


class User(NamedTuple):
    """One of several users of a server."""

    server: Server
    id: str

    def ask(self, path: str, body: Any = None) -> Any:
        """What the server answers this user, as JSON where it is; POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"comfy-user": self.id, "Content-Type": "application/json"}
        request = urllib.request.Request(self.server.client.address + path, data=data, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            answer = response.read()
            return json.loads(answer) if "json" in response.headers.get_content_type() else answer.decode()


def make_user(server: Server, name: str) -> User:
    """A new user of a server that was started with `--multi-user`."""
    return User(server, User(server, "").ask("/users", {"username": name}))
