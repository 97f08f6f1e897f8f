"""Whole prompts on a small card: how the parts of a workflow make way for each other, in each mode and without.

`python -m bench.stages --free-gib 12,8,6` runs text encoder, diffusion model and VAE of the sizes that a 12 GB card
struggles with (6.8, 3.7 and 0.16 GiB) once for each case and each free memory, each in a process of its own, and
compares every image with one that was made with the whole card free. Prints a table, and last a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.arguments import find_host_path
from bench.child import ChildError, run_child
from bench.holder import CardHolder
from bench.spec import GIB
from bench.stage_cases import CASES, REFERENCE, StageSpec

LINK_TIMEOUT_S = 180.0
WRITE_TIMEOUT_S = 900.0

COLUMNS = ("case", "free", "result", "s/prompt", "first", "text", "sample", "decode", "peak", "moved", "return")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--free-gib", default="12,8,6", help="comma-separated GiB that the card has free")
    add("--cases", default=",".join(CASES), help=f"comma-separated, of: {', '.join(CASES)}")
    add("--resolution", type=int, default=1024)
    add("--steps", type=int, default=9)
    add("--prompts", type=int, default=3, help="in a row, each with new texts; the quickest but the first counts")
    add("--host", help="a ComfyUI folder or version; the newest that is found otherwise")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that all runs, its times mean nothing")
    add("--timeout-s", type=float, default=300.0, help="longest run of one case")
    add("--keep", type=Path, help="keep logs and images in this folder")
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}: choose of {', '.join(CASES)}")
    spec = make_spec(arguments)
    machine = run_child("link", ["--device", arguments.device], timeout_s=LINK_TIMEOUT_S)
    print(f"{machine['device']}; link {machine['link_gib_s'] or 0:.1f} GiB/s", flush=True)
    with tempfile.TemporaryDirectory(prefix="layerstream-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [run_case(REFERENCE, None, spec, folder, arguments.timeout_s)]
        for free_gib in map(float, arguments.free_gib.split(",")):
            for name in names:
                if not CASES[name].on_whole_card:
                    rows.append(run_case(name, free_gib, spec, folder, arguments.timeout_s))
                    print(format_row(rows[-1]), flush=True)  # a run that is stopped has said what it found
    print("\n" + format_table(rows))
    print(json.dumps({"machine": machine, "rows": [{k: v for k, v in row.items() if k != "error"} for row in rows]}))


def make_spec(arguments: argparse.Namespace) -> StageSpec:
    """What is asked for, with the model files, which are written where they are not there yet."""
    files = run_child("stage_files", ["--device", arguments.device], timeout_s=WRITE_TIMEOUT_S)
    print("; ".join(f"{name.removesuffix('_path')} {size / GIB:.2f} GiB" for name, (_, size) in files.items()))
    return StageSpec(
        device=arguments.device,
        host_path=str(find_host_path(arguments.host)),
        resolution=arguments.resolution,
        steps=arguments.steps,
        prompts=arguments.prompts,
        **{name: path for name, (path, _) in files.items()},
    )


def run_case(name: str, free_gib: float | None, spec: StageSpec, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run one case with `free_gib` of the card free, all of it for None, and compare its image with the reference."""
    stem = f"{name}-{free_gib:g}" if free_gib is not None else name
    spec.write(folder / "spec.json")
    options = [name, "--spec", str(folder / "spec.json"), "--image", str(folder / f"{stem}.safetensors")]
    environment = {"LAYERSTREAM_SIMULATE_GIB": str(free_gib or 64)} if spec.device == "cpu" else {}
    holder = CardHolder(free_gib) if spec.device == "cuda" else None
    row: dict[str, Any] = {"name": name, "free_gib": free_gib}
    try:
        before = holder.wait_for_return() if holder is not None else None
        log = folder / f"{stem}.log"
        row |= run_child("stage_worker", options, timeout_s=timeout_s, environment=environment, log_path=log)
        row["result"] = _compare(folder / f"{stem}.safetensors", folder / f"{REFERENCE}.safetensors")
        if holder is not None and before is not None:
            row["peak_gib"] = (before.free_bytes - holder.use().lowest_free_bytes) / GIB
    except ChildError as error:
        row |= {"result": "out of memory" if "out of memory" in str(error).lower() else "failed", "error": str(error)}
    finally:
        if holder is not None:
            holder.close()
    return row


def _compare(image: Path, reference: Path) -> str:
    import torch
    from safetensors.torch import load_file

    one, other = load_file(image)["image"], load_file(reference)["image"]
    if torch.equal(one, other):
        return "equal"
    return f"differs by {(one - other).abs().max().item():.4f} at most"


def format_table(rows: list[dict[str, Any]]) -> str:
    """One line a case; seconds, GiB, and GiB a second for the text encoder's way back."""
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(format_row, rows)])


def format_row(row: dict[str, Any]) -> str:
    """A case's line of the table."""
    stages, moves = row.get("stages_s", {}), [move for move in row.get("moves", {}).values() if move]
    text = (row.get("moves") or {}).get("clip")
    cells = [
        row["name"],
        f"{row['free_gib']:g}" if row["free_gib"] is not None else "all",
        row["result"],
        *(_number(value) for value in (row.get("prompt_s"), row.get("first_prompt_s"))),
        *(_number(stages.get(stage)) for stage in ("text", "sampling", "decode")),
        _number(row.get("peak_gib")),
        _number(sum(move["returned_gib"] for move in moves) if moves else None),
        _number(text["return_gib_s"] if text and text["returns"] else None),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
