"""How long a person waits for the first step: from an opened host without a model to the end of the first step.

    python -m bench.startup --family zimage --free-gib 8

The model object is made from its file, which is in the page cache, then loaded and sampled; the second prompt finds it
loaded. Each contender starts in a process of its own, as often as `--repeats` says, in turns. Ends with one line of
JSON, which is written to `bench/results/startup/` too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.arguments import add_shared_arguments, make_spec, read_contenders
from bench.case import result_of
from bench.child import saying_why
from bench.contest import run_contenders
from bench.machine import find_checkpoint, find_machine
from bench.results import Row, write_result
from bench.room import check_room
from bench.spec import FAMILIES, GIB, WARMUP_STEPS

STARTED = ("dynamic", "lowvram", "layerstream")
COLUMNS = ("model object s", "load and step s", "first prompt s", "second prompt s", "usual step s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True)
    parser.add_argument("--free-gib", type=float, required=True, help="GiB that the card has free for a contender")
    parser.add_argument("--cfg", type=float, default=1.0, help="above 1 the model runs for a negative prompt too")
    parser.add_argument("--repeats", type=int, default=2, help="processes a contender; medians are given")
    add_shared_arguments(parser)
    parser.set_defaults(steps=WARMUP_STEPS + 1, runs=2, results=Path(__file__).parent / "results" / "startup")
    arguments = parser.parse_args()
    arguments.contenders = read_contenders(parser, arguments, STARTED)
    return arguments


def startup_row(rows: list[Row]) -> dict[str, Any]:
    """Medians over the processes of one contender, in seconds; its error where all of them failed."""
    finished = [row for row in rows if "error" not in row]
    if not finished:
        return rows[0]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in finished)

    return {
        "name": rows[0]["name"],
        "processes": len(finished),
        "prepare_s": median("prepare_s"),
        "first_step_s": median("first_step_s"),
        "first_prompt_s": statistics.median(row["prepare_s"] + row["first_step_s"] for row in finished),
        "first_prompt_s_max": max(row["prepare_s"] + row["first_step_s"] for row in finished),
        "second_prompt_s": median("next_first_step_s"),
        "step_s": median("step_s_median"),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line a contender: its parts, their sum, the second prompt's first step, and a usual step."""
    print(f"\n{'contender':<20}" + "".join(f"{head:>18}" for head in COLUMNS))
    for row in rows:
        if "error" in row:
            print(f"{row['name']:<20}  {row['error']}")
            continue
        keys = ("prepare_s", "first_step_s", "first_prompt_s", "second_prompt_s", "step_s")
        print(f"{row['name']:<20}" + "".join(f"{row[key]:>18.3f}" for key in keys))


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for."""
    spec = make_spec(arguments, arguments.family, arguments.free_gib, arguments.cfg)
    check_room(arguments, [arguments.family])
    machine = find_machine(arguments)
    checkpoint = find_checkpoint(arguments, arguments.family)
    spec = dataclasses.replace(spec, checkpoint_path=checkpoint.path)
    print(f"{machine['device']}: {spec.family}, {checkpoint.bytes / GIB:.2f} GiB, {spec.free_gib:g} GiB free")
    if machine["link_gib_s"] is not None:
        fill_s = min(checkpoint.bytes / GIB, arguments.free_gib) / machine["link_gib_s"]
        print(f"filling the free memory takes {fill_s:.2f} s at the link's {machine['link_gib_s']:.1f} GiB/s\n")
    with tempfile.TemporaryDirectory(prefix="layerstream-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        turns = run_contenders(arguments.contenders * arguments.repeats, spec, folder, arguments.timeout_s)
    rows = [startup_row([row for row in turns if row["name"] == name]) for name in arguments.contenders]
    print_rows(rows)
    result = {**result_of(spec, machine, checkpoint, turns), "startup": rows}
    print(f"written: {write_result(arguments.results, result).name}\n")
    print(json.dumps({key: value for key, value in result.items() if key != "contenders"}), flush=True)


def main() -> None:
    with saying_why("startup"):
        run(parse_arguments())


if __name__ == "__main__":
    main()
