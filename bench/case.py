"""One case: a family, the memory left free and the guidance, measured with every contender, printed and written.

In: a spec, the options, and what `bench.machine` found. Out: the result as one JSON object, and its file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import tempfile
from pathlib import Path
from typing import Any

from bench.child import ROOT, ChildError
from bench.contenders import HOST_REFERENCE
from bench.contest import run_contenders
from bench.half import half_free_gib
from bench.machine import Checkpoint
from bench.results import Row, even_spread_floor_s, link_floor_s, make_result, write_result
from bench.rounds import merge_rounds
from bench.spec import GIB, StepSpec
from bench.table import format_table


def measure_case(
    spec: StepSpec, arguments: argparse.Namespace, machine: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Run the contenders that `arguments` name, in as many rounds, print what they took, and write and return the
    result."""
    spec = dataclasses.replace(spec, checkpoint_path=checkpoint.path)
    names, turns = list(arguments.contenders), []
    print_ceiling(spec, machine, checkpoint.bytes)
    with tempfile.TemporaryDirectory(prefix="layerstream-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if spec.free_gib is None:
            first = names.index(HOST_REFERENCE) + 1
            turns = run_contenders(names[:first], spec, folder, arguments.timeout_s)
            spec = with_half_free(spec, checkpoint, turns[-1])
        left = (names * arguments.rounds)[len(turns) :]
        turns = run_contenders(left, spec, folder, arguments.timeout_s, before=turns)
    rows = merge_rounds(turns)
    result = result_of(spec, machine, checkpoint, rows)
    print("\n" + format_table(rows))
    print_share(rows, result["floor_s"])
    print(f"written: {write_result(arguments.results, result).name}\n", flush=True)
    return result


def with_half_free(spec: StepSpec, checkpoint: Checkpoint, resident: Row) -> StepSpec:
    """The spec with the memory that leaves room for half of the model. Raises ChildError when `resident` failed."""
    if "error" in resident:
        raise ChildError(f"{spec.family}: half of the model is not known without the resident run: {resident['error']}")
    free_gib = half_free_gib(checkpoint, resident)
    print(f"half of the model: {free_gib:g} GiB free on the card", flush=True)
    return dataclasses.replace(spec, free_gib=free_gib)


def result_of(spec: StepSpec, machine: dict[str, Any], checkpoint: Checkpoint, rows: list[Row]) -> dict[str, Any]:
    """One JSON object: what was measured where, of which versions, and what it took. The free memory is known."""
    assert spec.free_gib is not None
    finished = [row for row in rows if "error" not in row]
    now = datetime.datetime.now(datetime.timezone.utc)
    return make_result(
        spec,
        machine,
        versions={
            "layerstream": pack_version(),
            "comfyui": next((row["comfyui"] for row in finished if "comfyui" in row), None),
            "diffusers": next((row["diffusers"] for row in finished if "diffusers" in row), None),
            "torch": machine["torch"],
            "cuda": machine["cuda"],
        },
        date=now.date().isoformat(),
        time_utc=now.isoformat(timespec="seconds"),
        dtype=next((row["dtype"] for row in finished), None),
        weights_gib=checkpoint.bytes / GIB,
        link_floor_s=link_floor_s(checkpoint.bytes, spec.free_gib, machine["link_gib_s"]),
        floor_s=even_spread_floor_s(rows, machine["link_gib_s"]),
        contenders=rows,
    )


def print_ceiling(spec: StepSpec, machine: dict[str, Any], weight_bytes: int) -> None:
    """Print what the machine is and what no contender can beat, before anything is measured."""
    memory = f", {machine['device_gib']} GiB" if machine["device_gib"] else ""
    guided = f", cfg {spec.cfg:g}" if spec.cfg > 1 else ""
    print(f"{machine['device']}{memory}; RAM {machine['ram_gib']} GiB; torch {machine['torch']}")
    free = "room for half of them" if spec.free_gib is None else f"{spec.free_gib:g} GiB free"
    print(f"{spec.family}, {spec.picture}{guided}: {weight_bytes / GIB:.2f} GiB of weights, {free} on the card")
    rate = machine["link_gib_s"]
    if rate is not None and spec.free_gib is not None:
        least_s = link_floor_s(weight_bytes, spec.free_gib, rate)
        print(f"link: {rate:.1f} GiB/s ({rate * GIB / 1e9:.1f} GB/s), so at least {least_s:.4f} s/step of raw copies")
    print(flush=True)


def print_share(rows: list[Row], floor_s: float | None) -> None:
    """Print the floor that LayerStream's residents allow, and how near each of the host's ways came to it."""
    if floor_s is None:
        return
    print(f"\nfloor of raw even-spread streaming with LayerStream's residents: {floor_s:.4f} s/step")
    for row in rows:
        if "error" not in row and "comfyui" in row:
            print(f"  {row['name']}: {floor_s / row['step_s_median']:.0%} of that speed")


def pack_version() -> str:
    """This pack's version as its project file states it."""
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    match = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return match.group(1) if match else "unreleased"
