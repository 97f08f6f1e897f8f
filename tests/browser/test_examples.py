"""The example workflows as a person sees them: every node is there, none lies on another, each is inside its group."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from chromium import Page, command, open_page, save_picture, seed_settings
from scripts.example import EXAMPLES, workflow_of
from scripts.frontends import frontend_arguments
from scripts.hosts import Host
from scripts.server import Server, run_server

NAMES = sorted(path.stem.removeprefix("layerstream_") for path in EXAMPLES.glob("*.json"))
# What would lie over the graph.
BARE = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
MARGIN = 20
SETTLE_MS = 700

# Shows all of the graph at its own size in a window that fits it; gives the window's size, and what lies wrong.
LAY_OUT = """margin => {
  const graph = window.app.graph;
  const boxes = graph._nodes.map(node => [node.title, [...node.getBounding()]]);
  const groups = graph._groups.map(group => [group.title, [...group._bounding]]);
  const all = [...boxes, ...groups].map(([, box]) => box);
  const left = Math.min(...all.map(([x]) => x)) - margin;
  const top = Math.min(...all.map(([, y]) => y)) - margin;
  const right = Math.max(...all.map(([x, , width]) => x + width)) + margin;
  const bottom = Math.max(...all.map(([, y, , height]) => y + height)) + margin;
  const faults = graph._nodes.filter(node => node.has_errors).map(node => `${node.type} is missing`);
  const apart = (a, b) => a[0] + a[2] <= b[0] || b[0] + b[2] <= a[0] || a[1] + a[3] <= b[1] || b[1] + b[3] <= a[1];
  const within = (a, b) => a[0] >= b[0] && a[1] >= b[1] && a[0] + a[2] <= b[0] + b[2] && a[1] + a[3] <= b[1] + b[3];
  for (const [name, box] of boxes) {
    for (const [other, its] of boxes) if (name < other && !apart(box, its)) faults.push(`${name} lies on ${other}`);
    for (const [group, its] of groups) {
      if (!apart(box, its) && !within(box, its)) faults.push(`${name} sticks out of ${group}`);
    }
  }
  window.app.canvas.ds.scale = 1;
  window.app.canvas.ds.offset = [-left, -top];
  return { width: Math.ceil(right - left), height: Math.ceil(bottom - top), faults };
}"""


@pytest.fixture(scope="module")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has the models of all examples by name, or their loaders would be marked."""
    empty = tmp_path_factory.mktemp("models") / "empty"
    empty.touch()
    with run_server(host, dict.fromkeys(places(), empty), arguments=frontend_arguments(host)) as running:
        yield running


def places() -> set[str]:
    """Where the models of all examples go, under ComfyUI's models folder, as their notes say."""
    nodes = [node for name in NAMES for node in workflow_of(name)["nodes"]]
    (texts,) = zip(*(node["widgets_values"] for node in nodes if node["type"] == "MarkdownNote"), strict=True)
    found = set()
    for folder, files in re.findall(r"`ComfyUI/models/(.+?)/`\n((?:\s*- .+\n)+)", "".join(texts)):
        found |= {f"{folder}/{name}" for name in re.findall(r"\[(.+?)\]", files)}
    return found


@pytest.fixture(scope="module")
def page(context: Any, server: Server) -> Iterator[Page]:
    seed_settings(server, **BARE)
    page, _ = open_page(context, server)
    command(page, "Workspace.ToggleFocusMode")
    page.add_style_tag(content="button:has(.pi-bars) { visibility: hidden }")
    yield page
    page.close()
    seed_settings(server)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_opens_with_every_node_in_its_place(page: Page, name: str) -> None:
    workflow = workflow_of(name)
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(SETTLE_MS)
    seen = page.evaluate(LAY_OUT, MARGIN)
    page.set_viewport_size({"width": seen["width"], "height": seen["height"]})
    page.wait_for_timeout(SETTLE_MS)
    page.evaluate(LAY_OUT, MARGIN)
    page.evaluate("() => window.app.canvas.setDirty(true, true)")
    page.wait_for_timeout(SETTLE_MS)
    save_picture(page, f"layerstream_{name}")
    assert page.evaluate("() => window.app.graph._nodes.length") == len(workflow["nodes"]) > 5
    assert seen["faults"] == []
