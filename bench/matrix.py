"""Many cases one after the other on one machine: each case as `bench.step` measures it, then one table and a picture.

    python -m bench.matrix --cases zimage:8,zimage:half,flux:12,sdxl:3:7

A case is family:free_gib[:cfg], where `half` in place of GiB leaves room for half of the model (`bench.half`). Every
result is written as soon as it is there, so that a run that is stopped loses one case. The machine is described once,
and each family's model file is written once. Ends with status 1 when a contender that was asked for gave no time,
other bits, or bits that prove nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import add_rounds, add_shared_arguments, make_spec, read_contenders
from bench.case import measure_case
from bench.child import saying_why
from bench.half import read_free
from bench.machine import Checkpoint, find_checkpoint, find_machine
from bench.results import brief, lacks
from bench.room import check_room
from bench.spec import FAMILIES, HALF, StepSpec

PICTURE = "matrix.svg"


class Case(NamedTuple):
    family: str
    free_gib: float | None
    cfg: float


def read_case(text: str) -> Case:
    """Read `family:free_gib[:cfg]`, None for half of the model. Raises ValueError when it is anything else."""
    family, *numbers = text.split(":")
    if family not in FAMILIES:
        raise ValueError(f"case `{text}` names no family: choose one of {', '.join(FAMILIES)}")
    if not 1 <= len(numbers) <= 2:
        raise ValueError(f"case `{text}` is not family:free_gib[:cfg]")
    free, cfg = [*numbers, "1"][:2]
    return Case(family, read_free(free), float(cfg))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.matrix", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", required=True, help="comma-separated family:free_gib[:cfg]; a family's stand together"
    )
    parser.add_argument("--delete-checkpoints", action="store_true", help="delete a family's file after its last case")
    parser.add_argument(
        "--stop-after-s",
        type=float,
        help="start no case that would end later than this, to judge by the longest yet; a case is all of its rounds",
    )
    add_shared_arguments(parser)
    add_rounds(parser)
    arguments = parser.parse_args()
    arguments.contenders = read_contenders(parser, arguments)
    return arguments


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases in order; give the results, fewer than cases when the time ran out."""
    begin, longest_s = time.monotonic(), 0.0
    cases = [read_case(text) for text in arguments.cases.split(",")]
    specs = [make_spec(arguments, *case) for case in cases]  # all are checked before the first is run
    check_room(arguments, [case.family for case in cases], are_deleted=arguments.delete_checkpoints)
    machine = find_machine(arguments)
    files: dict[str, Checkpoint] = {}
    results: list[dict[str, Any]] = []
    for index, spec in enumerate(specs):
        elapsed_s = time.monotonic() - begin
        if arguments.stop_after_s is not None and elapsed_s + longest_s > arguments.stop_after_s:
            left = [_name(spec) for spec in specs[index:]]
            print(f"stopped after {elapsed_s:.0f} s, not measured: {', '.join(left)}", file=sys.stderr, flush=True)
            break
        if spec.family not in files:
            files[spec.family] = find_checkpoint(arguments, spec.family)
        results.append(measure_case(spec, arguments, machine, files[spec.family]))
        longest_s = max(longest_s, time.monotonic() - begin - elapsed_s)
        if arguments.delete_checkpoints and spec.family not in {later.family for later in specs[index + 1 :]}:
            Path(files.pop(spec.family).path).unlink()
    return results


def _name(spec: StepSpec) -> str:
    guided = f":{spec.cfg:g}" if spec.cfg > 1 else ""
    return f"{spec.family}:{HALF if spec.free_gib is None else f'{spec.free_gib:g}'}{guided}"


def main() -> None:
    from scripts.measured import picture, table

    with saying_why("matrix"):
        arguments = parse_arguments()
        results = run(arguments)
        if not results:
            return
        print(table(results))
        (arguments.results / PICTURE).write_text(picture(results), encoding="utf-8")
        wanting = [f"{result['family']}:{result['free_asked']}: {lack}" for result in results for lack in lacks(result)]
        for line in wanting:
            print(line, file=sys.stderr, flush=True)
        print(json.dumps({"cases": [brief(result) for result in results], "wanting": wanting}), flush=True)
        if wanting:
            sys.exit(1)


if __name__ == "__main__":
    main()
