"""How small packed weights are and how fast they are packed and restored on this machine's card.

    python -m bench.codec

Prints the device and its memory bandwidth first, verifies every output bit for bit, ends with one line of JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Iterator

import torch

from bench.timing import memory_bytes_per_s, seconds
from scripts.pack import load_pack

load_pack()

from layerstream.streaming.engine.packing import PACKABLE, Decoder, pack, read_layout, unpack, worst_bytes  # noqa: E402

ROWS, WIDTH = 61440, 3840  # as many weights as six feed-forward matrices of Z-Image: launching must not count


def weights(device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices [ROWS, WIDTH] of the kinds that trained weights come in, in each dtype that is packed, one at a time."""
    torch.manual_seed(0)
    shape = (ROWS, WIDTH)
    kinds = {
        "normal": lambda: torch.randn(shape, device=device),
        "heavy": lambda: torch.distributions.StudentT(torch.tensor(5.0, device=device)).sample(shape),
        "uneven": lambda: torch.randn(shape, device=device) * torch.randn(ROWS, 1, device=device).exp(),
    }
    for dtype in PACKABLE:
        for name, make in kinds.items():
            yield f"{str(dtype).removeprefix('torch.')} {name}", (make() * 0.02).to(dtype)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.codec measures a CUDA device, and there is none here")
    from layerstream.streaming.engine.packing_triton import TritonPacker

    device = torch.device("cuda")
    packer = TritonPacker(device)
    encode, stream = packer.encode, torch.cuda.current_stream()

    def decode_next(decoders: Iterator[Decoder]) -> None:
        next(decoders)(stream)

    memory_tb_s = memory_bytes_per_s(device, 1 << 29) / 1e12
    print(f"{torch.cuda.get_device_name()}: device copies move {memory_tb_s:.2f} TB/s, reads and writes counted")
    rows = {}
    for name, weight in weights("cuda"):
        packed = pack(weight)
        layout = read_layout(packed)
        room = torch.empty(worst_bytes(weight.numel(), weight.dtype), dtype=torch.uint8, device="cuda")
        assert encode(weight.view(torch.uint8), room, weight.dtype) == layout
        assert torch.equal(room[: packed.numel()], packed)
        # Several outputs in turn, so that none of it stays in the cache.
        outputs = [torch.full((weight.nbytes,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        decoders = [packer.decoder(packed, layout, out) for out in outputs]
        for decode in decoders * 2:  # the first of all compiles the kernel
            decode(stream)
        equal = all(torch.equal(out.view(torch.int16), weight.view(torch.int16).reshape(-1)) for out in outputs)
        assert equal and torch.equal(unpack(packed).view(torch.int16), weight.view(torch.int16).reshape(-1))
        times = seconds(functools.partial(decode_next, itertools.cycle(decoders)), device)
        encode_it = functools.partial(encode, weight.view(torch.uint8), room, weight.dtype)
        encode_s = statistics.median(seconds(encode_it, device, repeats=5))
        moved = packed.numel() + weight.nbytes
        rows[name] = {
            "ratio": packed.numel() / weight.nbytes,
            "decode_tb_s": weight.nbytes / statistics.median(times) / 1e12,
            "decode_tb_s_min": weight.nbytes / max(times) / 1e12,
            "share_of_memory_bandwidth": moved / statistics.median(times) / 1e12 / memory_tb_s,
            "encode_gb_s": weight.nbytes / encode_s / 1e9,
            "bit_equal": equal,
        }
        print(name, *(f"{key}={value:.3f}" for key, value in rows[name].items()))
    print(json.dumps({"device": torch.cuda.get_device_name(), "memory_tb_s": memory_tb_s, "weights": rows}))


if __name__ == "__main__":
    main()
