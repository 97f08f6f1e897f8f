"""A real Chromium on a page of a real server."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.server import Server

CHROMIUM = "LAYERSTREAM_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# ComfyUI's manager asks for what is installed, by name, where it may not.
NOT_OURS = "Content Security Policy"

Page = Any


def find_chromium() -> str | None:
    """The browser to use: what the variable names, or the first installed."""
    named = os.environ.get(CHROMIUM)
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def seed_settings(server: Server, **settings: Any) -> None:
    """Write what a person has set, before the page is opened. The tutorial would cover the page."""
    folder = server.folder / "user" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfy.settings.json").write_text(json.dumps({"Comfy.TutorialCompleted": True, **settings}))


class Problems(list[str]):
    """What the page complained of that has to do with the pack: it is named in the message, its stack or its place.

    ComfyUI's own page is not free of complaints, about itself.
    """

    def note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.add(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def note_exception(self, error: Any) -> None:
        self.add(f"exception: {error.message} {error.stack}")

    def add(self, complaint: str) -> None:
        if "layerstream" in complaint.lower() and NOT_OURS not in complaint:
            self.append(complaint)


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium with a fresh profile, which gives pages by `new_page`."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 900},
            permissions=["clipboard-read", "clipboard-write"],
            accept_downloads=True,
        )
        try:
            yield context
        finally:
            context.close()


def open_page(context: Any, server: Server) -> tuple[Page, Problems]:
    """A page of the server's, ready to be used, and what it will have complained of."""
    page, problems = context.new_page(), Problems()
    page.on("console", problems.note)
    page.on("pageerror", problems.note_exception)
    page.goto(server.client.address)
    page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.command", timeout=60_000)
    page.wait_for_function(
        "() => window.app.extensionManager.getSidebarTabs().some(tab => tab.id === 'layerstream')", timeout=30_000
    )
    return page, problems


def command(page: Page, name: str) -> None:
    page.evaluate("name => window.app.extensionManager.command.execute(name)", name)


def open_panel(page: Page, place: str = "sidebar") -> Any:
    """Open the live view, wait until it has drawn, and give it."""
    tab = {"sidebar": "SidebarTab.layerstream", "bottom": "BottomPanelTab.layerstream-bottom"}[place]
    command(page, f"Workspace.Toggle{tab}")
    panel = page.locator(f".ls-panel[data-place={place}][data-draws]")
    panel.wait_for(timeout=10_000)
    return panel


def save_picture(page: Page, name: str) -> None:
    """Keep a screenshot where `LAYERSTREAM_SCREENSHOTS` says, if it does."""
    folder = os.environ.get("LAYERSTREAM_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
