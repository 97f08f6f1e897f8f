"""The pack in a real server: it offers its nodes and its browser part. `test_workflows` has it stream."""

from collections.abc import Iterator
from typing import Any

import pytest

from scripts.example import STREAMING_NODE
from scripts.hosts import Host
from scripts.pack import ROOT
from scripts.server import PACK_FOLDER, Server, run_server

STREAMING = ["mode", "prefetch_blocks", "vram_gb", "min_free_mb"]
INPUTS = {
    STREAMING_NODE: ["model", *STREAMING, "budget"],
    "LayerStreamClip": ["clip", *STREAMING, "budget"],
    "LayerStreamVramBudget": ["vram_gb", "min_free_mb", "ram_gb", "hard_limit"],
    "LayerStreamOffloadPolicy": [
        "mode",
        *("offload_cond_stage", "offload_diffusion", "reload_cond_stage", "reload_diffusion"),
        *("estimation", "log", "model", "clip", "vae", "budget"),
    ],
    "LayerStreamGgufModelLoader": ["unet_name"],
    "LayerStreamGgufClipLoader": ["clip_name1", "type", "clip_name2", "clip_name3", "clip_name4"],
    "LayerStreamReport": ["after", "width"],
}
"""Required inputs, then optional ones: the order in which a saved workflow has their values."""

WIDGETS = {
    "prefetch_blocks": (0, 0, 8),
    "vram_gb": (0.0, -64.0, 256.0),
    "min_free_mb": (256, 0, 65536),
    "ram_gb": (0.0, 0.0, 2048.0),
    "width": (1024, 640, 4096),
}
"""Default, least and most."""


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with run_server(host, models={}) as running:
        yield running


@pytest.mark.parametrize(("node", "names"), INPUTS.items())
def test_saved_workflows_find_the_inputs_where_they_were(server: Server, node: str, names: list[str]) -> None:
    inputs = inputs_of(server, node)
    assert list(inputs) == names
    assert all(options.get("tooltip") for _, options in inputs.values())
    for name in WIDGETS.keys() & names:
        default, least, most = WIDGETS[name]
        options = inputs[name][1]
        assert (options["default"], options["min"], options["max"]) == (default, least, most), name


def test_the_node_is_what_it_was(server: Server) -> None:
    node = server.client.get_json(f"/object_info/{STREAMING_NODE}")[STREAMING_NODE]
    inputs = inputs_of(server, STREAMING_NODE)
    assert node["display_name"] == "Layer-Stream Model"
    assert inputs["model"][0] == "MODEL" and inputs["budget"][0] == "LAYERSTREAM_BUDGET"
    mode_type, mode_options = inputs["mode"]
    assert (mode_options["options"] if mode_type == "COMBO" else mode_type) == ["auto", "always", "off"]
    assert (node["output"], node["output_name"]) == (["MODEL"], ["model"])


def test_the_browser_part_is_served_as_it_is_in_the_repository(server: Server) -> None:
    path = f"/extensions/{PACK_FOLDER}/layerstream.js"
    assert path in server.client.get_json("/extensions")
    assert server.client.get_bytes(path) == (ROOT / "web" / "layerstream.js").read_bytes()


def inputs_of(server: Server, node: str) -> dict[str, Any]:
    inputs = server.client.get_json(f"/object_info/{node}")[node]["input"]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}
