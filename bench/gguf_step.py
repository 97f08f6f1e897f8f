"""Seconds a denoising step of a GGUF model takes on a card that is too small: `bench.step` of a quantised FLUX.1.

    python -m bench.gguf_step --type Q8_0 --free-gib 6
    python -m bench.gguf_step --type Q4_K --free-gib 4 --pack custom_nodes/ComfyUI-GGUF

The contenders: `resident`, our loader with everything on the card; `layerstream`; and `gguf-pack`, the ComfyUI-GGUF
pack under the host's own offloading, which runs where its folder is given. The file is random blocks of the type.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

from bench.arguments import add_rounds, add_shared_arguments, make_spec, model_size, read_contenders
from bench.case import measure_case
from bench.checkpoint import SEED
from bench.child import saying_why
from bench.gguf_pack import PACK_VARIABLE
from bench.machine import find_checkpoint, find_machine
from bench.results import brief

FAMILY: Literal["flux"] = "flux"
STANDARD = ("resident", "layerstream", "gguf-pack")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gguf_step", description=__doc__.splitlines()[0])
    parser.add_argument("--type", required=True, help="the kind of blocks: Q8_0, Q4_K and so on")
    parser.add_argument("--free-gib", type=float, required=True, help="GiB that the card has free for a contender")
    parser.add_argument("--pack", type=Path, help=f"folder of the ComfyUI-GGUF pack; {PACK_VARIABLE} names it too")
    add_shared_arguments(parser)
    add_rounds(parser)
    parser.set_defaults(contenders=",".join(STANDARD), results=Path(__file__).parent / "results" / "gguf")
    arguments = parser.parse_args()
    arguments.contenders = read_contenders(parser, arguments)
    if arguments.pack is not None:
        os.environ[PACK_VARIABLE] = str(arguments.pack.resolve())
    return arguments


def ensure_file(kind: str, size: str, cache: Path) -> Path:
    """Return the path of the random file of `kind` in `cache`, written first when it is missing."""
    from scripts.checkpoints import diffusion_model_layout
    from scripts.random_gguf import FLUX_EXACT, write_random_gguf

    path = cache / f"{FAMILY}-{size}-{kind.lower()}-seed{SEED}.gguf"
    if not path.exists():
        tensors = diffusion_model_layout(FAMILY, "narrow" if size == "narrow" else "full")
        write_random_gguf(path, tensors, kind, architecture=FAMILY, exact=FLUX_EXACT, seed=SEED)
    return path


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for."""
    kind, size = arguments.type.upper(), model_size(arguments)
    path = ensure_file(kind, size, arguments.cache)
    spec = make_spec(arguments, FAMILY, arguments.free_gib, cfg=1.0)
    spec = dataclasses.replace(spec, size=kind if size == "full" else f"{kind} {size}")
    machine = find_machine(arguments)
    result = measure_case(spec, arguments, machine, find_checkpoint(arguments, FAMILY, path))
    print(json.dumps({"type": kind, **brief(result)}), flush=True)


def main() -> None:
    with saying_why("gguf_step"):
        run(parse_arguments())


if __name__ == "__main__":
    main()
