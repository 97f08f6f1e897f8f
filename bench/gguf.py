"""How fast GGUF weights are dequantised on this machine's card, kind by kind.

    python -m bench.gguf
    python -m bench.gguf --candidates

Prints the device and its memory bandwidth first, compares every kernel's values with the plain way's bit for bit, ends
with one line of JSON. With `--candidates` other tiles of the kernels run too, and each kind's row is its fastest one's,
named by values and warps of a program. Without a card it times the plain way on little, so that the command itself can
be tried.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bench.timing import memory_bytes_per_s, seconds
from scripts.pack import load_pack

load_pack()

from layerstream.streaming.formats.dequantise import dequantise, dequantise_plainly  # noqa: E402
from layerstream.streaming.formats.kinds import QUANTISED, Kind  # noqa: E402

if TYPE_CHECKING:
    from layerstream.streaming.formats.dequantise_triton import Tile

CARD_VALUES = 12288 * 3072 * 4  # four feed-forward matrices of FLUX: launching must not count
CPU_VALUES = 1 << 18
DTYPE = torch.bfloat16
# Several inputs in turn, so that none of them stays in the cache.
COPIES = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", action="store_true", help="try other tiles of the kernels as well")
    arguments = parser.parse_args()
    is_card = torch.cuda.is_available()
    if arguments.candidates and not is_card:
        parser.error("tiles are tried on a card: run it on a machine with one")
    device = torch.device("cuda" if is_card else "cpu")
    values = CARD_VALUES if is_card else CPU_VALUES
    name = torch.cuda.get_device_name() if is_card else "processor, plain way only"
    memory_gb_s = memory_bytes_per_s(device, 1 << 29 if is_card else 1 << 24) / 1e9
    print(f"{name}: copies move {memory_gb_s:.0f} GB/s, reads and writes counted; into {DTYPE}")
    rows = {}
    for kind in QUANTISED.values():
        found = [measure(kind, device, values, tile) for tile in tiles(kind, is_card, arguments.candidates)]
        for row in found:
            row["share_of_memory_bandwidth"] = row["gb_s"] / memory_gb_s
            texts = (
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
            print(f"{kind.name:7}", *texts, flush=True)
        rows[kind.name] = max(found, key=lambda row: row["gb_s"])
    print(json.dumps({"device": name, "memory_gb_s": memory_gb_s, "values": values, "kinds": rows}))


def tiles(kind: Kind, is_card: bool, with_candidates: bool) -> Sequence[Tile | None]:
    """What to measure of a kind: the tile that it has, then other sizes of programs and of a thread's part of them."""
    if not is_card:
        return [None]
    from layerstream.streaming.formats.dequantise_triton import WAYS, Tile

    own = WAYS[kind.name].tile
    if not with_candidates:
        return [own]
    sizes = [Tile(own.values * warps // own.warps, warps) for warps in (1, 2, 4, 8)]
    shares = [Tile(own.values // 2, own.warps), Tile(own.values * 2, own.warps)]
    return [own, *(tile for tile in (*sizes, *shares) if tile != own)]


def measure(kind: Kind, device: torch.device, values: int, tile: Tile | None) -> dict[str, Any]:
    """Median speed of one kind, bytes read and written; its values are compared with the plain way's."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (kind.stored_bytes(values),)
    inputs = [
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator) for _ in range(COPIES)
    ]
    work = way_of(kind, tile)
    for dtype in (DTYPE, torch.float16, torch.float32):
        compare(work(inputs[0], dtype), dequantise_plainly(inputs[0], kind, dtype))
    turns = itertools.cycle(inputs)
    times = seconds(lambda: work(next(turns), DTYPE), device)
    moved_bytes = inputs[0].nbytes + values * DTYPE.itemsize
    row: dict[str, Any] = {} if tile is None else {"values": tile.values, "warps": tile.warps}
    return row | {"gb_s": moved_bytes / statistics.median(times) / 1e9, "gb_s_min": moved_bytes / max(times) / 1e9}


def way_of(kind: Kind, tile: Tile | None) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    if tile is None:
        return lambda stored, dtype: dequantise(stored, kind, dtype)
    from layerstream.streaming.formats.dequantise_triton import dequantise_on_card

    return lambda stored, dtype: dequantise_on_card(stored, kind, dtype, tile)


def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    differ = (found.view(bits) != expected.view(bits)) & ~(found.isnan() & expected.isnan())
    if differ.any():
        raise SystemExit(f"{int(differ.sum())} of {differ.numel()} values differ from the plain way's")


if __name__ == "__main__":
    main()
