"""The written model files are the published ones but for their values, to every ComfyUI that is found."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bench.spec import FAMILIES
from scripts.checkpoints import diffusion_model_layout
from scripts.hosts import Host, HostError, find_hosts, prepare_host
from scripts.layouts.tensors import TensorLayout
from scripts.measured import NAMES
from scripts.pack import ROOT
from scripts.published import PUBLISHED, is_known_to
from scripts.random_file import write_random_file

MODELS = {
    "zimage": "Lumina2",
    "flux": "Flux",
    "flux-fp8": "Flux",
    "flux2": "Flux2",
    "flux2-dev": "Flux2",
    "qwen-image": "QwenImage",
    "sd35-large": "SD3",
    "ltx": "LTXV",
    "sdxl": "SDXL",
    "sd15": "BaseModel",
    "cascade-b": "StableCascade_B",
    "cascade-c": "StableCascade_C",
    "wan21-14b": "WAN21",
}
"""ComfyUI's class for each family."""
# ComfyUI 0.3.75 gives Z-Image a final norm that the published file lacks and no forward uses.
UNUSED = {"zimage": {"norm_final.weight"}}


def hosts() -> list[Host]:
    try:
        return find_hosts()
    except HostError:
        return []


def layouts_seen_by(host: Host) -> dict[str, Any]:
    """What one host makes of the layouts of all families that it knows."""
    command = [sys.executable, str(Path(__file__).with_name("detect.py")), str(prepare_host(host))]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def detected() -> dict[str, dict[str, Any]]:
    """What each host makes of the layouts, by the host's name."""
    if not hosts():
        pytest.skip("no ComfyUI found")
    return {host.name: layouts_seen_by(host) for host in hosts()}


@pytest.mark.parametrize("size", ["narrow", "full"])
@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_knows_every_tensor_of_the_file(detected: Any, host: Host, family: str, size: str) -> None:
    if not is_known_to(host, family):
        assert f"{family} {size}" not in detected[host.name]
        return
    found = detected[host.name][f"{family} {size}"]
    assert set(found["differing"]) <= UNUSED.get(family, set())
    assert found["model"] == MODELS[family]


@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_files_have_the_published_size(detected: Any, host: Host, family: str) -> None:
    if not is_known_to(host, family):
        pytest.skip(f"{host.name} does not know {family}")
    published = PUBLISHED[family]
    assert detected[host.name][f"{family} full"]["elements"] * published.dtype.itemsize == published.bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_hosts_agree_on_what_a_full_file_holds(detected: Any, family: str) -> None:
    seen = [found[f"{family} full"]["tensors"] for found in detected.values() if f"{family} full" in found]
    assert all(tensors == seen[0] for tensors in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_as_large_as_the_host_has_them(detected: Any, family: str) -> None:
    row = FAMILIES[family]
    for found in detected.values():
        model = found.get(f"{family} full", {})
        assert model.get("downscale") in (None, row.downscale)
        # A picture of a model that could make videos has one frame.
        if row.frame_downscale > 1:
            assert model.get("frame_downscale") in (None, row.frame_downscale)


def test_every_measured_family_has_a_file_and_a_name_in_the_table() -> None:
    assert list(PUBLISHED) == list(FAMILIES)
    assert set(NAMES) == set(FAMILIES)


def test_a_depth_that_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="layers cannot be set"):
        diffusion_model_layout("sdxl", "narrow", layers=2)
    with pytest.raises(ValueError, match="at least one block"):
        diffusion_model_layout("qwen-image", "narrow", layers=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_holds_every_value_that_was_drawn(tmp_path: Path, dtype: torch.dtype) -> None:
    """Larger than a chunk and of odd size, so that a lost chunk or a short write shows."""
    layout = [TensorLayout("large", (1031, 1033), 2.0, 0.5), TensorLayout("small", (3,), 0.0, 1.0)]
    path = write_random_file(tmp_path / "file.safetensors", layout, dtype=dtype, seed=3)
    again = write_random_file(tmp_path / "again.safetensors", layout[::-1], dtype=dtype, seed=3)
    with safe_open(path, framework="pt") as file, safe_open(again, framework="pt") as other:
        for tensor in layout:
            values = file.get_tensor(tensor.name)
            assert values.dtype == dtype and values.shape == tensor.shape
            assert torch.equal(values, other.get_tensor(tensor.name))
        rows = file.get_tensor("large").float()
    # Chunks are 2**20 values: both the first and the last have the distribution asked for.
    for part in (rows.flatten()[: 1 << 18], rows.flatten()[-(1 << 14) :]):
        assert math.isclose(part.mean(), 2.0, abs_tol=0.03) and math.isclose(part.std(), 0.5, abs_tol=0.03)
