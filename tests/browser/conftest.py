"""A real server with its own browser part, and a real Chromium, for the tests of this folder.

One process tests one ComfyUI: the first that `COMFYUI_PATH` names, or the first found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from chromium import CHROMIUM, browser, find_chromium, seed_settings
from live_run import streaming_server
from scripts.frontends import frontend_arguments
from scripts.hosts import Host, HostError, find_host, open_host
from scripts.server import Server

# The files of workflows are written by the host's own classes.
HOST = find_host()
open_host(HOST, "--cpu", "--bf16-unet")


def why_not() -> str | None:
    """The reason why no page can be opened here."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    if find_chromium() is None:
        return f"no Chromium is installed: apt install chromium, or set {CHROMIUM}"
    try:
        frontend_arguments(HOST)
    except HostError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason or ""))


@pytest.fixture(scope="session")
def host() -> Host:
    return HOST


@pytest.fixture(scope="session")
def server(host: Host) -> Iterator[Server]:
    with streaming_server(host, *frontend_arguments(host)) as running:
        seed_settings(running)
        yield running


@pytest.fixture(scope="session")
def context() -> Iterator[Any]:
    with browser() as opened:
        yield opened
