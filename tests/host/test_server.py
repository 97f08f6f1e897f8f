"""The pack in a real server: it offers its node and its browser part. `test_workflows` has it stream."""

from collections.abc import Iterator

import pytest

from scripts.example import STREAMING_NODE
from scripts.hosts import Host
from scripts.pack import ROOT
from scripts.server import PACK_FOLDER, Server, run_server


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with run_server(host, models={}) as running:
        yield running


def test_the_node_has_its_documented_inputs_in_order(server: Server) -> None:
    node = server.client.get_json(f"/object_info/{STREAMING_NODE}")[STREAMING_NODE]
    inputs = node["input"]["required"]
    assert node["display_name"] == "Layer-Stream Model"
    assert list(inputs) == ["model", "mode", "prefetch_blocks", "vram_gb", "min_free_mb"]
    assert inputs["model"][0] == "MODEL"
    mode_type, mode_options = inputs["mode"]
    assert (mode_options["options"] if mode_type == "COMBO" else mode_type) == ["auto", "always", "off"]
    limits = {name: (inputs[name][1]["min"], inputs[name][1]["max"]) for name in ("prefetch_blocks", "vram_gb")}
    assert limits == {"prefetch_blocks": (0, 8), "vram_gb": (-64.0, 256.0)}
    assert (node["output"], node["output_name"]) == (["MODEL"], ["model"])


def test_the_browser_part_is_served_as_it_is_in_the_repository(server: Server) -> None:
    path = f"/extensions/{PACK_FOLDER}/layerstream.js"
    assert path in server.client.get_json("/extensions")
    assert server.client.get_bytes(path) == (ROOT / "web" / "layerstream.js").read_bytes()
