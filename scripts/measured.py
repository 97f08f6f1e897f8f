"""The benchmark's results as one table and one picture.

In: the JSON objects that `bench.step` and `bench.matrix` write. Out: Markdown and SVG. Only what the results hold is
shown; a time is compared with the run beside it that had the whole card, of the same library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .chart import Bar, Group, bar_chart

Result = dict[str, Any]


class Way(NamedTuple):
    """A way to run a model as the table and the picture name it; `is_apart`: its reference is diffusers' own."""

    name: str
    title: str
    colour: str
    is_apart: bool = False


WAYS = (
    Way("resident", "everything on the card", "#8c959f"),
    Way("dynamic", "ComfyUI DynamicVRAM", "#bc4c00"),
    Way("lowvram", "ComfyUI low VRAM", "#d4a72c"),
    Way("layerstream", "LayerStream", "#1a7f37"),
    Way("layerstream-raw", "LayerStream, never packed", "#4ac26b"),
    Way("layerstream-packed", "LayerStream, all packed", "#2da44e"),
    Way("diffusers-group", "diffusers group offload", "#8250df", is_apart=True),
    Way("mmgp", "mmgp", "#bf3989", is_apart=True),
)
OWN = "layerstream"
NAMES = {
    "zimage": "Z-Image",
    "flux": "FLUX.1",
    "flux-fp8": "FLUX.1 fp8",
    "flux2": "FLUX.2 Klein 4B",
    "flux2-dev": "FLUX.2 dev",
    "qwen-image": "Qwen-Image",
    "sd35-large": "SD3.5 large",
    "ltx": "LTX Video 2B",
    "sdxl": "SDXL",
    "sd15": "SD1.5",
    "cascade-b": "Stable Cascade, stage B",
    "cascade-c": "Stable Cascade, stage C",
    "wan21-14b": "WAN 2.1 14B",
}
USUAL_RESOLUTION = "1024x1024"


def read_results(folder: Path) -> list[Result]:
    """All results in `folder`, oldest first."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(results, key=lambda result: (result["date"], result.get("time_utc", "")))


def newest(results: Sequence[Result]) -> list[Result]:
    """One result a case, the newest with LayerStream in it, with the ways that it lacks out of the newest others.

    `results` are oldest first. Cases are sorted by family and free memory.
    """
    cases: dict[tuple[Any, ...], Result] = {}
    for result in results:
        case = tuple(result[key] for key in ("family", "size", "cfg", "batch"))
        # What half of a model comes to differs a little from run to run.
        case += (result.get("free_asked", f"{result['free_gib']:g}"), _resolution(result), result["machine"]["device"])
        before = cases.get(case)
        newer, older = (before, result) if before and OWN not in _rows(result) else (result, before)
        assert newer is not None
        cases[case] = _with_ways_of(newer, older) if older else newer
    return sorted(cases.values(), key=lambda result: (result["weights_gib"], result["family"], -result["free_gib"]))


def table(results: Sequence[Result]) -> str:
    """Markdown: one row a case, seconds a step for each way and what multiple that is of its reference's."""
    shown = [way for way in WAYS if any(way.name in _rows(result) for result in results)]
    heads = ["model", "free", *(f"**{way.title}**" if way.name == OWN else way.title for way in shown), "date"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        cells = [_model(result), _free(result)]
        for way in shown:
            note = _note(way, _rows(result).get(way.name))
            cells.append(f"**{note}**" if way.name == OWN else note)
        lines.append("| " + " | ".join([*cells, result["date"]]) + " |")
    return "\n".join(lines)


def picture(results: Sequence[Result]) -> str:
    """SVG: the seconds a step of each way, case by case.

    Raises ValueError when a case has no time at all.
    """
    groups = []
    for result in results:
        rows = _rows(result)
        bars = [
            Bar(way.title, rows[way.name]["step_s_median"], _note(way, rows[way.name]), way.colour)
            for way in WAYS
            if way.name in rows and "error" not in rows[way.name]
        ]
        groups.append(Group(f"{_model(result)}, {_free(result)} free on the card", bars))
    return bar_chart("Seconds a denoising step, less is better (ratio to everything on the card)", groups)


def _rows(result: Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["contenders"]}


def _with_ways_of(newer: Result, older: Result) -> Result:
    present = _rows(newer)
    return {**newer, "contenders": [*newer["contenders"], *(r for n, r in _rows(older).items() if n not in present)]}


def _model(result: Result) -> str:
    said = [f"{result['weights_gib']:.1f} GiB"]
    if _resolution(result) != USUAL_RESOLUTION:
        said.append(_resolution(result))
    if result["cfg"] > 1:
        said.append(f"cfg {result['cfg']:g}")
    return f"{NAMES.get(result['family'], result['family'])} ({', '.join(said)})"


def _free(result: Result) -> str:
    is_half = result.get("free_asked") == "half"
    return f"{result['free_gib']:.1f} GiB (half)" if is_half else f"{result['free_gib']:g} GiB"


def _resolution(result: Result) -> str:
    """Width and height, and frames of a video; older results give one side."""
    resolution = result["resolution"]
    return resolution if isinstance(resolution, str) else f"{resolution}x{resolution}"


def _note(way: Way, row: dict[str, Any] | None) -> str:
    """A time, how often the reference's that is, and a warning where the output is another one."""
    if row is None or "error" in row:
        return "-"
    time = f"{row['step_s_median']:.3f} s"
    ratio = row["ratio_to_resident"]
    if ratio is not None and way.name != "resident":
        time += f" ({ratio:.2f} of diffusers' own)" if way.is_apart else f" ({ratio:.2f})"
    return time if row["bit_equal"] in (True, None) else f"{time}, other bits"
