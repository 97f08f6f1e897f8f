"""The Triton kernels give the bits of the plain twin; without a card, interpreted."""

from __future__ import annotations

import pytest
import torch

from apart import run_apart

pytest.importorskip("triton")

PREAMBLE = """
import torch
from scripts.pack import load_pack
load_pack()
from layerstream.streaming.formats import dequantise_triton
from layerstream.streaming.formats.dequantise import dequantise_plainly
from layerstream.streaming.formats.kinds import QUANTISED
"""

COMPARISON = """
device = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts values off on their way to bfloat16, where a card rounds them.
dtypes = (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16)
torch.manual_seed(0)
for name, kind in QUANTISED.items():
    # One block, less than a program's, exactly one program's and more than two.
    at_once = dequantise_triton.WAYS[name].tile.values // kind.elements
    for blocks in (0, 1, 3, at_once, 2 * at_once + 5):
        stored = torch.randint(0, 256, (blocks * kind.size_bytes,), dtype=torch.uint8, device=device)
        for dtype in dtypes:
            expected = dequantise_plainly(stored, kind, dtype)
            found = dequantise_triton.dequantise_on_card(stored, kind, dtype)
            assert found.dtype == dtype and found.shape == expected.shape, (name, blocks, dtype)
            number, bits = ~expected.isnan(), torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(found.isnan(), ~number), (name, blocks, dtype)
            assert torch.equal(found.view(bits)[number], expected.view(bits)[number]), (name, blocks, dtype)
try:
    dequantise_triton.dequantise_on_card(torch.zeros(35, dtype=torch.uint8)[1:], QUANTISED["Q8_0"], torch.float32)
except ValueError as error:
    assert "even address" in str(error)
    print("same bits")
"""

COMPILATION = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name, (kernel, what, tile) in dequantise_triton.WAYS.items():
    constants = {**what, "BLOCKS": tile.values // QUANTISED[name].elements}
    assert list(what) == [argument for argument in kernel.arg_names if argument.isupper()][:-1], name
    kinds = {"packed": "*u8", "out": "*bf16", "blocks": "i32", "values": "*fp32"}
    signature = {argument: kinds.get(argument, "constexpr") for argument in kernel.arg_names}
    # Memory begins at 16 bytes, which a launch finds out by itself.
    pointers = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert "fma.rn" not in compiled.asm["ptx"], name
    stores = set(re.findall(r"st\\.global\\S*", compiled.asm["ptx"]))
    assert stores == {"st.global.v4.b32"}, f"{name}: eight values do not leave in one store"
    assert compiled.metadata.shared == 0, f"{name}: threads wait for each other"
print("compiled")
"""


def test_kernels_compile_for_a_card_and_round_each_operation():
    finished = run_apart(PREAMBLE + COMPILATION, interprets=False)
    assert finished.stdout.strip().endswith("compiled"), finished.stderr[-2000:]


def test_kernels_equal_the_plain_twin():
    finished = run_apart(PREAMBLE + COMPARISON, interprets=not torch.cuda.is_available())
    assert finished.stdout.strip().endswith("same bits"), finished.stderr[-2000:]
