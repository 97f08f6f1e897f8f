"""Every example workflow runs in a real server, and streaming leaves what it makes as it is, bit for bit.

One server runs all of them, on narrow models of the published names and a simulated card; `scripts/small_example.py`
says what differs from the workflow as a person opens it.
"""

import io
import os
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
import numpy
import pytest
import safetensors.torch
import torch

from scripts.demo import equal_pixels
from scripts.example import EXAMPLES, SIMULATED_CARD, STREAMING_NODE, workflow_of
from scripts.hosts import Host
from scripts.server import Server, run_server
from scripts.small_example import WIDEN_PACK, small_example
from scripts.tiny_models import is_newer_host
from scripts.workflow import NOTE_TYPES, to_prompt
from scripts.workflow_models import WORKFLOWS

# Both stages of Stable Cascade at once.
CARD_GIB = 4
RUN_WIDE = "LAYERSTREAM_TEST_WIDE"
ONLY_WIDE = {
    "flux2": "this ComfyUI takes FLUX.2 only at its full width: a block of each kind is 4.7 GB, and two runs take two "
    f"minutes and 15 GB of RAM; set {RUN_WIDE}=1 to have them"
}

Files = dict[str, Any]


class Result(NamedTuple):
    """What a run saved: latents, and files of pictures or of a video."""

    latents: list[torch.Tensor]
    pictures: list[bytes]


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    # One thread: models this narrow gain nothing from more, which only wait for each other on a busy machine.
    environment = {SIMULATED_CARD: str(CARD_GIB), "OMP_NUM_THREADS": "1"}
    with run_server(host, {}, environment=environment, packs=[WIDEN_PACK]) as running:
        yield running


@pytest.fixture
def files(server: Server, name: str) -> Iterator[Files]:
    """The workflow's narrow files by their place, in the server's folder as long as the test takes."""
    if name in ONLY_WIDE and not is_newer_host() and not os.environ.get(RUN_WIDE):
        pytest.skip(ONLY_WIDE[name])
    written = WORKFLOWS[name]()
    server.add_models(written)
    yield written
    # Of a deleted file that is still mapped, the disk keeps every byte.
    server.client.free()


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict[str, Any]:
    return server.client.get_json("/object_info")


def run(server: Server, prompt: dict[str, Any]) -> Result:
    history = server.client.queue(prompt)
    latents = [
        safetensors.torch.load(server.client.get_bytes(f"/view?{urllib.parse.urlencode(latent)}"))["latent_tensor"]
        for output in history["outputs"].values()
        for latent in output.get("latents", [])
    ]
    return Result(latents, server.client.images(history))


def frames(video: bytes) -> list[numpy.ndarray]:
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def is_same_picture(one: bytes, other: bytes, *, is_video: bool) -> bool:
    if not is_video:
        return equal_pixels(one, other)
    first, second = frames(one), frames(other)
    return len(first) == len(second) > 1 and all(map(numpy.array_equal, first, second))


def test_every_workflow_is_here_and_has_its_picture() -> None:
    assert {path.stem.removeprefix("layerstream_") for path in EXAMPLES.glob("*.json")} == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert (EXAMPLES / f"layerstream_{name}.jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_fits_the_nodes_of_the_host(object_info: dict[str, Any], name: str) -> None:
    """Every node is there, its inputs are what the host calls them, and nothing required is left open."""
    for key, node in to_prompt(workflow_of(name), object_info).items():
        description = object_info[node["class_type"]]["input"]
        known = {*description.get("required", {}), *description.get("optional", {})}
        label = f"{key} ({node['class_type']})"
        assert set(node["inputs"]) <= known, label
        assert set(description.get("required", {})) <= set(node["inputs"]), label


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_says_where_each_of_its_files_is_and_goes(name: str) -> None:
    """In the note, for people; and in the node that loads it, for ComfyUI to offer what is missing."""
    workflow = workflow_of(name)
    (note,) = [node for node in workflow["nodes"] if node["type"] in NOTE_TYPES]
    text = note["widgets_values"][0]
    named = 0
    for node in workflow["nodes"]:
        files = {value for value in node["widgets_values"] if str(value).endswith(".safetensors") and node is not note}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files
        for model in models:
            link = f"[{model['name']}]({model['url']})"
            assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")
            assert text.count(link) == 1
            assert text[: text.index(link)].split("`ComfyUI/models/")[-1].startswith(f"{model['directory']}/`")
        named += len(files)
    assert named > 0


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_the_defaults_of_the_node(object_info: dict[str, Any], name: str) -> None:
    inputs = object_info[STREAMING_NODE]["input"]["required"]
    defaults = [options["default"] for input_name, (_, options) in inputs.items() if input_name != "model"]
    nodes = [node for node in workflow_of(name)["nodes"] if node["type"] == STREAMING_NODE]
    assert nodes and all(node["widgets_values"] == defaults for node in nodes)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_streamed_workflow_makes_what_a_resident_one_makes(
    server: Server, object_info: dict[str, Any], files: Files, name: str
) -> None:
    resident = run(server, small_example(name, object_info, files, mode="off"))
    assert server.client.get_json("/layerstream/state")["sessions"] == []
    prompt = small_example(name, object_info, files, mode="auto")
    streamed = run(server, prompt)

    sessions = server.client.get_json("/layerstream/state")["sessions"]
    assert len(sessions) == sum(node["class_type"] == STREAMING_NODE for node in prompt.values())
    for session in sessions:
        assert session["moved_bytes_per_step"] > 0 and session["streamed_bytes_per_step"] > 0
        assert session["resident_bytes"] + session["ring_bytes"] <= session["budget_bytes"]
        assert session["departures"] == session["broken_passes"] == 0

    assert len(streamed.latents) == len(resident.latents) > 0
    for expected, result in zip(resident.latents, streamed.latents, strict=True):
        assert expected.isfinite().all() and expected.std() > 0
        assert torch.equal(result, expected)
    is_video = any(node["class_type"] == "SaveVideo" for node in prompt.values())
    assert len(streamed.pictures) == len(resident.pictures) == 1
    assert is_same_picture(resident.pictures[0], streamed.pictures[0], is_video=is_video)
