"""Seconds a denoising step takes on a card that is too small, for LayerStream and for the host's own ways.

    python -m bench.step --family zimage --free-gib 8

Prints the machine and the floor first, then a table, and ends with one line of JSON; the same object is written to
`bench/results/`. Contenders and inputs are in `bench.contenders` and `bench.sampling`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from bench.child import ROOT, ChildError, run_child
from bench.contenders import CONTENDERS
from bench.contest import run_contenders
from bench.results import Row, even_spread_floor_s, link_floor_s, make_result, write_result
from bench.spec import FAMILIES, GIB, StepSpec
from bench.table import format_table

WRITE_TIMEOUT_S = 900.0
LINK_TIMEOUT_S = 180.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", choices=tuple(FAMILIES), required=True)
    add("--free-gib", type=float, required=True, help="memory the card has free before a contender starts")
    add("--resolution", type=int, default=1024, help="side of the square picture in pixels")
    add("--batch", type=int, default=1)
    add("--cfg", type=float, default=1.0, help="above 1 the model runs for a negative prompt too")
    add("--steps", type=int, default=6, help="the first two are not timed")
    add("--runs", type=int, default=2, help="prompts in a row; all but the first step are timed in the last")
    add("--contenders", help=f"comma-separated, of: {', '.join(CONTENDERS)}")
    add("--host", help="a ComfyUI folder or version; the newest that is found otherwise")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that all runs, its times mean nothing")
    add("--size", choices=("full", "narrow"), help="narrow is a few blocks, and the default on the CPU")
    add("--checkpoint", type=Path, help="a model file of the family instead of random weights")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "layerstream-bench", help="where they are kept")
    add("--prefetch", type=int, help="blocks that LayerStream fetches ahead")
    add("--layerstream-mode", choices=("auto", "always"), default="auto", help="what LayerStream streams")
    add("--layerstream-dynamic", choices=("on", "off"), default="on", help="the host's DynamicVRAM beneath it")
    add("--vram-gb", type=float, default=0.0, help="LayerStream's own memory limit in GiB; 0 for none")
    add("--synchronize", choices=("device", "stream"), default="stream", help="what the end of a step waits for")
    add("--link-gib-s", type=float, help="use this link bandwidth and not the measured one")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    add("--keep", type=Path, help="keep the contenders' logs and latents in this folder")
    add("--timeout-s", type=float, default=300.0, help="longest run of one contender")
    arguments = parser.parse_args()
    narrow = arguments.device == "cpu"
    arguments.size = arguments.size or ("narrow" if narrow else "full")
    names = arguments.contenders or ("resident,layerstream" if narrow else ",".join(CONTENDERS))
    arguments.contenders = names.split(",")
    unknown = [name for name in arguments.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown contender {', '.join(unknown)}: choose of {', '.join(CONTENDERS)}")
    return arguments


def find_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Path and bytes of the model file, which is written first when it is not there."""
    options = ["--family", arguments.family, "--size", arguments.size, "--cache", str(arguments.cache)]
    options += ["--device", arguments.device]
    if arguments.checkpoint is not None:
        options += ["--file", str(arguments.checkpoint)]
    return run_child("checkpoint", options, timeout_s=WRITE_TIMEOUT_S)


def find_host_path(choice: str | None) -> Path:
    """The ComfyUI tree to run: `choice`, a folder or version, or the newest that is found."""
    from scripts.hosts import find_host, find_hosts, prepare_host

    if choice is not None:
        return prepare_host(find_host(choice))
    return prepare_host(max(find_hosts(), key=lambda host: [int(part) for part in re.findall(r"\d+", host.version)]))


def make_spec(arguments: argparse.Namespace) -> StepSpec:
    """What is asked for, checked, without the model file's path."""
    return StepSpec(
        family=arguments.family,
        size=arguments.size if arguments.checkpoint is None else arguments.checkpoint.name,
        device=arguments.device,
        host_path=str(find_host_path(arguments.host)),
        checkpoint_path="",
        free_gib=arguments.free_gib,
        resolution=arguments.resolution,
        batch=arguments.batch,
        cfg=arguments.cfg,
        steps=arguments.steps,
        runs=arguments.runs,
        synchronize=arguments.synchronize,
        layerstream_mode=arguments.layerstream_mode,
        layerstream_dynamic=arguments.layerstream_dynamic == "on",
        prefetch_blocks=arguments.prefetch,
        vram_gib=arguments.vram_gb,
    )


def print_ceiling(spec: StepSpec, machine: dict[str, Any], weight_bytes: int) -> None:
    """Print what the machine is and what no contender can beat, before anything is measured."""
    memory = f", {machine['device_gib']} GiB" if machine["device_gib"] else ""
    print(f"{machine['device']}{memory}; RAM {machine['ram_gib']} GiB; torch {machine['torch']}")
    print(f"{spec.family}: {weight_bytes / GIB:.2f} GiB of weights, {spec.free_gib:g} GiB free on the card")
    rate = machine["link_gib_s"]
    if rate is not None:
        least_s = link_floor_s(weight_bytes, spec.free_gib, rate)
        print(f"link: {rate:.1f} GiB/s ({rate * GIB / 1e9:.1f} GB/s), so at least {least_s:.4f} s/step of raw copies")
    print(flush=True)


def print_share(rows: list[Row], floor_s: float | None) -> None:
    """Print the floor that LayerStream's residents allow, and how near each contender came to it."""
    if floor_s is None:
        return
    print(f"\nfloor of raw even-spread streaming with LayerStream's residents: {floor_s:.4f} s/step")
    for row in rows:
        if "error" not in row:
            print(f"  {row['name']}: {floor_s / row['step_s_median']:.0%} of that speed")


def pack_version() -> str:
    """This pack's version as its project file states it."""
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    match = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return match.group(1) if match else "unreleased"


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for."""
    spec = make_spec(arguments)
    machine = run_child("link", ["--device", arguments.device], timeout_s=LINK_TIMEOUT_S)
    if arguments.link_gib_s is not None:
        machine["link_gib_s"] = arguments.link_gib_s
    checkpoint = find_checkpoint(arguments)
    spec = dataclasses.replace(spec, checkpoint_path=checkpoint["path"])
    print_ceiling(spec, machine, checkpoint["bytes"])

    with tempfile.TemporaryDirectory(prefix="layerstream-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run_contenders(arguments.contenders, spec, folder, arguments.timeout_s)
    finished = next((row for row in rows if "error" not in row), {})
    floor_s = even_spread_floor_s(rows, machine["link_gib_s"])
    result = make_result(
        spec,
        machine,
        versions={
            "layerstream": pack_version(),
            "comfyui": finished.get("comfyui"),
            "torch": machine["torch"],
            "cuda": machine["cuda"],
        },
        date=datetime.date.today().isoformat(),
        dtype=finished.get("dtype"),
        weights_gib=checkpoint["bytes"] / GIB,
        link_floor_s=link_floor_s(checkpoint["bytes"], spec.free_gib, machine["link_gib_s"]),
        floor_s=floor_s,
        contenders=rows,
    )
    print("\n" + format_table(rows))
    print_share(rows, floor_s)
    print(f"written: {write_result(arguments.results, result).name}\n")
    print(json.dumps(result), flush=True)


def main() -> None:
    from scripts.hosts import HostError

    try:
        run(parse_arguments())
    except (ChildError, HostError, ValueError) as error:
        raise SystemExit(f"bench.step: {error}") from error


if __name__ == "__main__":
    main()
