"""What a benchmark found: the floor, how a contender compares with the resident run, and the JSON file.

In: the rows that workers reported and what the holder saw. Out: rows and files whose keys carry their units.
It measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.spec import GIB, HALF, StepSpec

Row = dict[str, Any]
"""One contender: what `bench.worker` returns and what is added here, or its name, whether it `ran`, and its `error`."""


def link_floor_s(weight_bytes: int, free_gib: float, link_gib_s: float | None) -> float | None:
    """Seconds a step that raw copies need at the very least: all of the free memory holds weights, nothing else."""
    if link_gib_s is None:
        return None
    return max(0.0, weight_bytes / GIB - free_gib) / link_gib_s


def even_spread_floor_s(rows: Sequence[Row], link_gib_s: float | None) -> float | None:
    """Seconds a step that no schedule of raw copies beats, given how much LayerStream kept on the card.

    max(compute, streamed bytes / link), where compute is the resident run's step. None when either is unknown.
    """
    by_name = {row["name"]: row for row in rows if "error" not in row}
    resident, streamed = by_name.get("resident"), by_name.get("layerstream")
    if link_gib_s is None or resident is None or streamed is None:
        return None
    return max(resident["step_s_median"], streamed["streamed_gib_per_step"] / link_gib_s)


def add_peak(row: Row, *, free_before_bytes: int, lowest_free_bytes: int) -> None:
    """Add to `row` the largest use of the card by the contender's process, as seen from outside it."""
    row["free_before_gib"] = free_before_bytes / GIB
    row["peak_gib"] = (free_before_bytes - lowest_free_bytes) / GIB
    row["peak_margin_gib"] = lowest_free_bytes / GIB


def add_comparison(row: Row, reference: Row | None, latent: Path, reference_latent: Path) -> None:
    """Add to `row` how it compares with its library's resident run: its time as a ratio, its output bit by bit."""
    if reference is None or "error" in reference:
        row.update(ratio_to_resident=None, bit_equal=None)
        return
    row["ratio_to_resident"] = row["step_s_median"] / reference["step_s_median"]
    row["bit_equal"] = row["latent_sha256"] == reference["latent_sha256"]
    if not row["bit_equal"]:
        row["max_abs_difference"] = max_abs_difference(latent, reference_latent)


def max_abs_difference(path: Path, reference_path: Path) -> float:
    """Largest absolute difference of two latents of equal shape; NaN when either has one."""
    from safetensors.torch import load_file

    latent, reference = load_file(path)["latent"], load_file(reference_path)["latent"]
    return (latent.double() - reference.double()).abs().max().item()


def make_result(spec: StepSpec, machine: Mapping[str, Any], **entries: Any) -> dict[str, Any]:
    """One JSON object for the whole benchmark: the machine, what was asked for, and `entries`."""
    return {
        "machine": {key: value for key, value in machine.items() if key not in ("link_gib_s", "torch", "cuda")},
        "family": spec.family,
        "size": spec.size,
        "free_gib": spec.free_gib,
        "free_asked": HALF if spec.is_half else f"{spec.free_gib:g}",
        "resolution": str(spec.picture),
        "batch": spec.batch,
        "cfg": spec.cfg,
        "steps": spec.steps,
        "runs": spec.runs,
        "synchronize": spec.synchronize,
        "layerstream": {
            "mode": spec.layerstream_mode,
            "dynamic_vram": spec.layerstream_dynamic,
            "prefetch_blocks": spec.prefetch_blocks,
            "vram_gib": spec.vram_gib,
            "ram_gib": spec.ram_gib,
            "patching": spec.patching,
        },
        "lora_rank": spec.lora_rank,
        "link_gib_s": machine["link_gib_s"],
        **entries,
    }


def lacks(result: Mapping[str, Any]) -> list[str]:
    """What keeps `result` from showing what it was made for: each contender without a time or without equal bits."""
    found = []
    for row in result["contenders"]:
        if "error" in row:
            found.append(f"{row['name']} has no time: {row['error'].splitlines()[-1]}")
        elif row["bit_equal"] is False:
            found.append(f"{row['name']} has other bits than its reference")
        elif not row["latent_is_finite"]:
            found.append(f"{row['name']} gives NaN or infinity")
    return found


BRIEF_KEYS = (
    *("name", "error", "step_s_median", "step_s_min", "step_s_max", "ratio_to_resident", "bit_equal"),
    *(
        "loop_ms",
        "first_step_s",
        "changed_strength_first_step_s",
        "peak_margin_gib",
        "resident_gib",
        "streamed_gib_per_step",
        "moved_gib_per_step",
    ),
)


def brief(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of `result` is worth a line of a log; its file has all of it."""
    keys = ("family", "free_gib", "cfg", "resolution", "batch", "weights_gib", "link_gib_s", "floor_s", "versions")
    rows = [{key: row[key] for key in BRIEF_KEYS if key in row} for row in result["contenders"]]
    return {"device": result["machine"]["device"], **{key: result[key] for key in keys}, "contenders": rows}


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write `result` to a new file in `folder`, named by what was measured, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    guided = f"-cfg{result['cfg']:g}" if result["cfg"] > 1 else ""
    stem = f"{result['family']}-{result['free_gib']:g}gib{guided}-{device}-{result['date']}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
