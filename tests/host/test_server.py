"""The pack in a real server: it offers its node and its browser part, and streaming leaves images as they are."""

import json
from collections.abc import Iterator

import pytest

from scripts.checkpoint_cache import WORKFLOW_FILES, workflow_models
from scripts.demo import equal_pixels
from scripts.example import EXAMPLE_WORKFLOW, STREAMING_NODE, example_prompt, half_resident_budget
from scripts.hosts import Host
from scripts.pack import ROOT
from scripts.server import PACK_FOLDER, Server, run_server

# 25 image tokens, which Z-Image pads to 32.
PIXELS = 80
STEPS = 2

MODELS = workflow_models()
BUDGET = half_resident_budget(MODELS[WORKFLOW_FILES["diffusion_model"]])


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with run_server(host, MODELS, environment=BUDGET.environment) as running:
        yield running


def run_example(server: Server, mode: str) -> bytes:
    prompt = example_prompt(server.client, mode=mode, budget=BUDGET, pixels=PIXELS, steps=STEPS, prefix=f"test-{mode}")
    (image,) = server.client.images(server.client.queue(prompt))
    return image


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


def test_the_example_workflow_has_the_defaults_of_the_node(server: Server) -> None:
    inputs = server.client.get_json(f"/object_info/{STREAMING_NODE}")[STREAMING_NODE]["input"]["required"]
    workflow = json.loads(EXAMPLE_WORKFLOW.read_text(encoding="utf-8"))
    (node,) = [node for node in workflow["nodes"] if node["type"] == STREAMING_NODE]
    widgets = [options for name, (_, options) in inputs.items() if name != "model"]
    assert node["widgets_values"] == [options["default"] for options in widgets]


def test_the_browser_part_is_served_as_it_is_in_the_repository(server: Server) -> None:
    path = f"/extensions/{PACK_FOLDER}/layerstream.js"
    assert path in server.client.get_json("/extensions")
    assert server.client.get_bytes(path) == (ROOT / "web" / "layerstream.js").read_bytes()


def test_a_streamed_image_equals_the_resident_one(server: Server) -> None:
    resident = run_example(server, "off")
    assert server.client.get_json("/layerstream/state") == {"sessions": []}
    streamed = run_example(server, "auto")
    (session,) = server.client.get_json("/layerstream/state")["sessions"]
    assert session["moved_bytes_per_step"] == session["streamed_bytes_per_step"] > 0
    assert session["peak_bytes"] <= session["budget_bytes"]
    assert equal_pixels(resident, streamed)
