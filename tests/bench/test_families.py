"""Every family that is measured runs narrow, resident and streamed, with equal bits; and what is asked is checked."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.arguments import read_picture
from bench.contenders import STANDARD, missing_reason
from bench.half import half_free_gib, read_free
from bench.machine import Checkpoint
from bench.results import lacks
from bench.room import check_room
from bench.spec import FAMILIES, GIB, Picture, StepSpec
from scripts.hosts import Host, HostError, find_hosts, prepare_host
from scripts.pack import ROOT
from scripts.published import OLDER, PUBLISHED, is_known_to

# Their widths are fixed, so that a narrow model has a billion weights: one host is enough for them.
WIDE = ("zimage", "flux", "flux-fp8", "qwen-image", "sdxl", "cascade-b", "cascade-c")


def found_hosts() -> list[Host]:
    try:
        return sorted(
            find_hosts(), key=lambda host: [int(part) for part in host.version.split(".") if part.isdecimal()]
        )
    except HostError:
        return []


def measured_families(host: Host) -> list[str]:
    """Those that `host` runs in seconds."""
    is_newest = host == found_hosts()[-1]
    known = [family for family in FAMILIES if is_known_to(host, family)]
    if host.version == OLDER:
        # As wide as they are published: 4.7 GB of two blocks.
        known = [family for family in known if PUBLISHED[family].narrow_older is None]
    return known if is_newest else [family for family in known if family not in WIDE]


@pytest.fixture(scope="module")
def sampled() -> dict[str, dict[str, Any]]:
    """What each host's families gave, by the host's name."""
    found = {}
    for host in found_hosts():
        script = str(Path(__file__).with_name("sample.py"))
        command = [sys.executable, script, str(prepare_host(host)), *measured_families(host)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[host.name] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("host", "family"), [(host.name, family) for host in found_hosts() for family in measured_families(host)]
)
def test_a_narrow_family_streams_with_the_resident_runs_bits(sampled: Any, host: str, family: str) -> None:
    run = sampled[host][family]
    assert run["is_equal"] and run["is_finite"] and run["largest"] > 0
    assert run["streamed_bytes"] > 0
    assert run["patchers"][1] == "StreamingModelPatcher" != run["patchers"][0]
    assert len(run["shape"]) == (5 if FAMILIES[family].frame_downscale > 1 or family == "qwen-image" else 4)


@pytest.mark.skipif(not found_hosts(), reason="no ComfyUI found")
def test_a_case_of_half_a_model_runs_every_contender_of_a_processor(tmp_path: Path) -> None:
    """The whole way: the file written, contenders in processes of their own, the result as a file."""
    command = [sys.executable, "-m", "bench.matrix", "--cases", "wan21-14b:half", "--device", "cpu"]
    command += [
        "--contenders",
        "resident,lowvram,layerstream",
        "--steps",
        "3",
        "--runs",
        "1",
        "--resolution",
        "64x64x5",
    ]
    command += ["--cache", str(tmp_path / "files"), "--results", str(tmp_path / "results"), "--delete-checkpoints"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["free_asked"], result["resolution"]) == ("half", "64x64x5")
    assert 0.5 * result["weights_gib"] < result["free_gib"] < 3 * result["weights_gib"]
    assert [(row["name"], row["bit_equal"]) for row in result["contenders"]] == [
        ("resident", True),
        ("lowvram", True),
        ("layerstream", True),
    ]
    assert not list((tmp_path / "files").iterdir())


def spec(family: str = "zimage", **values: Any) -> StepSpec:
    given = {
        "family": family,
        "size": "full",
        "device": "cuda",
        "host_path": "",
        "checkpoint_path": "",
        "free_gib": 8.0,
    }
    return StepSpec(**{**given, "picture": FAMILIES[family].picture, **values})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_picture_makes_a_latent_and_survives_the_way_to_a_worker(family: str, tmp_path: Path) -> None:
    asked = spec(family)
    asked.write(tmp_path / "spec.json")
    assert StepSpec.read(tmp_path / "spec.json") == asked
    assert min(asked.latent_size()) >= 1


def test_latents_are_as_the_hosts_own_nodes_make_them() -> None:
    assert spec("wan21-14b").latent_size() == (9, 60, 104)
    assert spec("ltx").latent_size() == (13, 16, 24)
    assert spec("cascade-c").latent_size() == (1, 24, 24)
    assert spec("cascade-b").latent_size() == (1, 256, 256)
    assert spec("flux2").latent_size() == (1, 64, 64)
    assert spec("sd15").latent_size() == (1, 64, 64)


def test_a_resolution_is_read_and_completed_by_the_familys_own() -> None:
    assert read_picture(None, "ltx") == Picture(768, 512, 97)
    assert read_picture("512", "wan21-14b") == Picture(512, 512, 33)
    assert read_picture("640x352x81", "wan21-14b") == Picture(640, 352, 81)
    assert str(read_picture("640x352x81", "wan21-14b")) == "640x352x81"
    for text in ("", "x", "1024x", "1x2x3x4", "-16"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            read_picture(text, "flux")


@pytest.mark.parametrize(
    ("family", "picture", "message"),
    [
        ("flux", Picture(1000, 1024), "multiples of 16"),
        ("ltx", Picture(752, 512, 97), "multiples of 32"),
        ("ltx", Picture(768, 512, 96), "one more than a multiple of 8"),
        ("flux", Picture(1024, 1024, 5), "single pictures"),
        ("cascade-b", Picture(32, 32), "at least 42"),
        ("wan21-14b", Picture(832, 480, 0), "at least 1"),
    ],
)
def test_a_picture_that_a_family_cannot_make_is_refused(family: str, picture: Picture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(family, picture=picture)


def test_half_is_the_weights_half_and_what_the_resident_run_took_beside_them() -> None:
    resident = {"allocated_peak_gib": 11.0, "reserved_peak_gib": 12.5, "peak_gib": 13.0}
    # 10 GiB of weights: 1 GiB of activations and 0.5 GiB beside the allocator, whose slack of 1.5 GiB is left out.
    assert half_free_gib(Checkpoint("", 10 * GIB), resident) == 6.5
    assert read_free("half") is None
    assert read_free("2.5") == 2.5
    with pytest.raises(ValueError, match="neither"):
        spec(free_gib=None)
    assert spec(free_gib=None, is_half=True).free_gib is None


def asked(cache: Path, **values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"cache": cache, "host": None, "device": "cuda", "size": None, **values})


@pytest.mark.skipif(not found_hosts(), reason="no ComfyUI found")
def test_a_model_too_large_for_ram_or_disk_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = argparse.Namespace(available=130 * GIB)
    disk = argparse.Namespace(free=62 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    check_room(asked(tmp_path), ["flux2-dev"])
    check_room(asked(tmp_path), ["flux2-dev", "qwen-image"], are_deleted=True)
    with pytest.raises(ValueError, match=r"flux2-dev, qwen-image need 99\.1 GiB of disk"):
        check_room(asked(tmp_path / "not" / "there"), ["flux2-dev", "qwen-image"])
    disk.free = 60 * GIB
    with pytest.raises(ValueError, match=r"flux2-dev need 61\.0 GiB of disk .* 60\.0 GiB free"):
        check_room(asked(tmp_path), ["flux2-dev"])
    # A file that is there already takes no room, and narrow ones are small.
    (tmp_path / "flux2-dev-full-bfloat16-0123abcd-seed0.safetensors").touch()
    check_room(asked(tmp_path), ["flux2-dev"])
    memory.available = 119 * GIB
    with pytest.raises(ValueError, match=r"flux2-dev has 60\.0 GiB of weights, which need 120\.0 GiB of RAM"):
        check_room(asked(tmp_path), ["flux2-dev"])
    check_room(asked(tmp_path, size="narrow"), ["flux2-dev"])


@pytest.mark.parametrize("host", found_hosts(), ids=lambda host: host.name)
def test_a_host_is_asked_only_for_what_it_knows(host: Host, tmp_path: Path) -> None:
    request = asked(tmp_path, host=str(host.path), device="cpu")
    if is_known_to(host, "flux2"):
        check_room(request, ["flux2"])
    else:
        with pytest.raises(ValueError, match="flux2 is not in ComfyUI"):
            check_room(request, ["flux2"])


@pytest.mark.skipif(not found_hosts(), reason="no ComfyUI found")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_keeps_the_standard_contenders_from_a_family_on_a_card(family: str) -> None:
    newest = found_hosts()[-1]
    on_card = spec(family, host_path=str(prepare_host(newest)))
    reasons = dict.fromkeys(STANDARD)
    if newest.version == OLDER:
        reasons["dynamic"] = "not in this host"
    assert {name: missing_reason(name, on_card) for name in STANDARD} == reasons
    on_processor = dataclasses.replace(on_card, device="cpu")
    assert missing_reason("dynamic", on_processor) == (reasons["dynamic"] or "it needs a CUDA device")


def test_a_result_says_which_contenders_it_lacks() -> None:
    good = {"name": "lowvram", "bit_equal": True, "latent_is_finite": True}
    rows = [
        good,
        {"name": "dynamic", "ran": True, "error": "first line\nout of memory"},
        good | {"name": "layerstream", "bit_equal": False},
        good | {"name": "resident", "latent_is_finite": False},
    ]
    assert lacks({"contenders": [good]}) == []
    assert lacks({"contenders": rows}) == [
        "dynamic has no time: out of memory",
        "layerstream has other bits than its reference",
        "resident gives NaN or infinity",
    ]
