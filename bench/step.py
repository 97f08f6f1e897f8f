"""Seconds a denoising step takes on a card that is too small, for LayerStream and for the host's own ways.

    python -m bench.step --family zimage --free-gib 8

`--free-gib half` leaves room for half of the model, as `bench.half` says. `--lora-rank 64` puts a LoRA on every block,
and tells how long a changed strength takes; `--ram-gb 8` gives LayerStream so much RAM and no more.
Prints the machine and the floor first, then a table, and ends with one line of JSON; the whole result is written to
`bench/results/`. Contenders and inputs are in `bench.contenders` and `bench.sampling`; `bench.matrix` runs many cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from bench.arguments import add_rounds, add_shared_arguments, make_spec, read_contenders
from bench.case import measure_case
from bench.child import saying_why
from bench.half import read_free
from bench.machine import find_checkpoint, find_machine
from bench.results import brief
from bench.room import check_room
from bench.spec import FAMILIES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True)
    parser.add_argument(
        "--free-gib", type=read_free, required=True, help="GiB that the card has free for a contender, or `half`"
    )
    parser.add_argument("--cfg", type=float, default=1.0, help="above 1 the model runs for a negative prompt too")
    parser.add_argument("--checkpoint", type=Path, help="a model file of the family instead of random weights")
    add_shared_arguments(parser)
    add_rounds(parser)
    arguments = parser.parse_args()
    arguments.contenders = read_contenders(parser, arguments)
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for."""
    spec = make_spec(arguments, arguments.family, arguments.free_gib, arguments.cfg)
    # The README's table is of models as they are, with all of RAM.
    folder = "lora" if spec.lora_rank else "ram" if spec.ram_gib else ""
    arguments.results = arguments.results / folder
    if arguments.checkpoint is not None:
        spec = dataclasses.replace(spec, size=arguments.checkpoint.name)
    else:
        check_room(arguments, [arguments.family])
    machine = find_machine(arguments)
    checkpoint = find_checkpoint(arguments, arguments.family, arguments.checkpoint)
    result = measure_case(spec, arguments, machine, checkpoint)
    print(json.dumps(brief(result)), flush=True)


def main() -> None:
    with saying_why("step"):
        run(parse_arguments())


if __name__ == "__main__":
    main()
