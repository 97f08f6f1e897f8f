"""The Triton kernels make the bytes of the plain twin and restore what it restores; without a card, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

# Triton decides when its module is imported whether it interprets, so the comparison has a process of its own.
COMPARISON = """
import torch
from scripts.pack import load_pack
load_pack()
from layerstream.streaming.engine.packing import CHUNK, pack, read_layout, worst_bytes
from layerstream.streaming.engine.packing_triton import TritonPacker

device = "cuda" if torch.cuda.is_available() else "cpu"
packer = TritonPacker()
torch.manual_seed(0)
patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
weights = {
    "normal": torch.randn(20000).bfloat16(),
    "patterns": patterns,
    "shuffled patterns": patterns[torch.randperm(65536)],
    "uneven rows": (torch.randn(64, 300) * torch.randn(64, 1).exp() * 3).bfloat16().reshape(-1),
    "a chunk and a quad": torch.randn(CHUNK + 4).bfloat16(),
    "one quad": torch.randn(4).bfloat16(),
    "zeros": torch.zeros(9000, dtype=torch.bfloat16),
    "empty": torch.empty(0, dtype=torch.bfloat16),
}
for name, weight in weights.items():
    weight = weight.to(device)
    raw = weight.view(torch.uint8)
    plain = pack(weight)
    room = torch.full((worst_bytes(weight.numel()),), 0xFF, dtype=torch.uint8, device=device)
    layout = packer.encode(raw, room)
    assert layout == read_layout(plain), name
    assert torch.equal(room[: layout.stored_bytes], plain), name
    out = torch.full((raw.numel() + 64,), 0xFF, dtype=torch.uint8, device=device)
    packer.decode(plain, layout, out)
    assert torch.equal(out[: raw.numel()], raw), name
    assert (out[raw.numel() :] == 0xFF).all(), f"{name}: written beyond the end"
    for broken in (plain.clone() for _ in range(3)):
        if layout.chunks:
            broken[256:] = torch.randint(0, 256, (broken.numel() - 256,), dtype=torch.uint8)
            packer.decode(broken, layout, out)
            assert (out[raw.numel() :] == 0xFF).all(), f"{name}: corrupt bytes made it write beyond the end"
print("same bytes")
"""


def test_kernels_equal_the_plain_twin():
    import torch

    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    finished = subprocess.run(
        [sys.executable, "-c", COMPARISON], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.stdout.strip().endswith("same bytes"), finished.stderr[-2000:]
