"""The Triton kernels make the bytes of the plain twin and restore what it restores; without a card, interpreted."""

from __future__ import annotations

import signal

import pytest
import torch

from apart import run_apart

pytest.importorskip("triton")

from layerstream.streaming.engine.packing import PACKABLE, pack, read_layout
from layerstream.streaming.engine.packing_format import CHUNK
from layerstream.streaming.engine.packing_triton import trial

PREAMBLE = """
import torch
from scripts.pack import load_pack
load_pack()
from layerstream.streaming.engine.packing import PACKABLE, pack, read_layout, worst_bytes
from layerstream.streaming.engine.packing_format import CHUNK
from layerstream.streaming.engine.packing_triton import TritonPacker

packer = TritonPacker(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
torch.manual_seed(0)
patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
"""

COMPARISON = """
device = "cuda" if torch.cuda.is_available() else "cpu"


def compare(name, weight):
    raw = weight.view(torch.uint8)
    plain = pack(weight)
    room = torch.full((worst_bytes(weight.numel(), weight.dtype),), 0xFF, dtype=torch.uint8, device=device)
    layout = packer.encode(raw, room, weight.dtype)
    assert layout == read_layout(plain), name
    assert torch.equal(room[: layout.stored_bytes], plain), name
    out = torch.full((raw.numel() + 64,), 0xFF, dtype=torch.uint8, device=device)
    packer.decoder(plain, layout, out)(stream)
    assert torch.equal(out[: raw.numel()], raw), name
    assert (out[raw.numel() :] == 0xFF).all(), f"{name}: written beyond the end"


for dtype in PACKABLE:
    # All patterns with the same exponent, then those with the next: every level of codes, and escapes.
    by_exponent = patterns.view(dtype)[patterns.view(dtype).abs().view(torch.int16).sort(stable=True).indices]
    weights = {
        "normal": torch.randn(9000).to(dtype),
        "patterns by exponent": by_exponent,
        "shuffled patterns": patterns[torch.randperm(65536)][: CHUNK + 100].view(dtype),
        "uneven rows": (torch.randn(24, 300) * torch.randn(24, 1).exp() * 3).to(dtype).reshape(-1),
        "a chunk and a quad": torch.randn(CHUNK + 4).to(dtype),
        "one quad": torch.randn(4).to(dtype),
        "zeros": torch.zeros(5000, dtype=dtype),
        "not a number": torch.full((5000,), -1, dtype=torch.int16).view(dtype),
        "empty": torch.empty(0, dtype=dtype),
    }
    for name, weight in weights.items():
        compare(f"{dtype} {name}", weight.to(device))
print("same bytes")
"""

# The packed bytes lie between two unreadable ranges, which any 32-bit offset beyond the bytes would hit.
FENCE = """
import ctypes
import mmap

MARGIN = 1 << 34
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(size_bytes, at_end):
    pages = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    unreadable, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    address = libc.mmap(None, pages + 2 * MARGIN, unreadable, flags, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    assert libc.mprotect(address + MARGIN, pages, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    start = address + MARGIN + (pages - size_bytes if at_end else 0)
    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(start), dtype=torch.uint8)


def damageable(dtype):
    weight = (torch.randn(2 * CHUNK + 8) * 0.02).to(dtype)
    weight[:CHUNK] = patterns[torch.randperm(65536)][:CHUNK].view(dtype)
    weight[CHUNK::16] = patterns[torch.randperm(65536)][: CHUNK // 16 + 1].view(dtype)
    return pack(weight), weight.nbytes
"""

FUZZ = """
for dtype in PACKABLE:
    plain, raw_bytes = damageable(dtype)
    layout = read_layout(plain)
    for at_end in (False, True):
        packed, out = fenced(plain.numel(), at_end), fenced(raw_bytes, at_end)
        for section in (layout.table, layout.fractions, layout.planes, layout.runs, plain.numel()):
            for damage in ("noise", "ones", "zeros"):
                packed.copy_(plain)
                broken = packed[section - 256 : section + 4096] if section < plain.numel() else packed[256:]
                if damage == "noise":
                    broken.random_(0, 256)
                else:
                    broken.fill_(0xFF if damage == "ones" else 0)
                packer.decoder(packed, layout, out)(stream)
print("nothing beyond")
"""

# With a wrong count of words damage is fatal, so the fence holds.
UNBOUND = """
from layerstream.streaming.engine.packing_triton import decode_kernel

plain, raw_bytes = damageable(torch.bfloat16)
layout = read_layout(plain)
packed, out = fenced(plain.numel(), True), fenced(raw_bytes, True)
packed.copy_(plain)
packed[layout.table + 3] = 0x20  # the first word is half a billion words on
print("fenced", flush=True)
decode_kernel[(1,)](
    packed, layout.fractions, layout.planes, layout.runs, out, 1024, 1 << 30,
    TABLE_START=layout.table, COLUMNS=128, LOW_BITS=0,
)
"""


COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layerstream.streaming.engine import packing_encode, packing_triton

POINTERS = {"bits": "*i16", "fractions": "*i8", "packed": "*i8", "out": "*i8"}
POINTERS |= dict.fromkeys(("table", "planes", "runs"), "*i32")
SIZES = {"CHUNK": CHUNK, "COLUMNS": 128, "TABLE_START": 256}
for kernel in (packing_triton.decode_kernel, packing_encode.measure_kernel, packing_encode.encode_kernel):
    for low_bits in (0, 3):
        constants = {name: {**SIZES, "LOW_BITS": low_bits}[name] for name in kernel.arg_names if name.isupper()}
        kinds = {name: POINTERS.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
print("compiled")
"""


# Kernels that a compiler got wrong: restoring leaves a bit of one element out; packing fails.
WRONG = """
import logging
from layerstream.streaming.engine import packing_triton

said = []
logging.getLogger("layerstream").addFilter(lambda record: said.append(record.getMessage()))
print("works", [packer.works(dtype) for dtype in PACKABLE], said, flush=True)
decoder = TritonPacker.decoder


def careless(self, packed, layout, out):
    decode = decoder(self, packed, layout, out)
    return lambda stream: (decode(stream), out[70001:70002].bitwise_xor_(4))


TritonPacker.decoder = careless
wrong = TritonPacker(packer._device)
print("wrong", [wrong.works(dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float16)], flush=True)


def fails(*arguments):
    raise RuntimeError(problem)


packing_triton.encode = fails
problem = "no such instruction\\nin line 7"
print("fails", TritonPacker(packer._device).works(torch.bfloat16))
problem = "CUDA out of memory"
full = TritonPacker(packer._device)
try:
    full.works(torch.bfloat16)
except RuntimeError as error:
    print("full", error)
print(*said, sep="\\n")
"""


def has_card() -> bool:
    return torch.cuda.is_available()


def test_kernels_compile_for_a_card():
    """The interpreter takes what the compiler refuses."""
    finished = run_apart(PREAMBLE + COMPILATION, interprets=False)
    assert finished.stdout.strip().endswith("compiled"), finished.stderr[-2000:]


def test_kernels_equal_the_plain_twin():
    finished = run_apart(PREAMBLE + COMPARISON, interprets=not has_card())
    assert finished.stdout.strip().endswith("same bytes"), finished.stderr[-2000:]


def test_corrupt_bytes_make_the_decoder_read_and_write_nothing_beyond_them():
    finished = run_apart(PREAMBLE + FENCE + FUZZ, interprets=True)
    assert finished.stdout.strip().endswith("nothing beyond"), finished.stderr[-2000:]


def test_a_read_beyond_them_would_be_noticed():
    finished = run_apart(PREAMBLE + FENCE + UNBOUND, interprets=True)
    assert finished.stdout.strip().endswith("fenced")
    assert finished.returncode == -signal.SIGSEGV


def test_kernels_that_do_not_restore_what_was_packed_are_not_used_and_the_log_says_so():
    finished = run_apart(PREAMBLE + WRONG, interprets=not has_card())
    cannot = "weights cannot be packed here, so they travel raw"
    assert finished.stdout.splitlines() == [
        "works [True, True] []",
        "wrong [False, False, False]",
        "fails False",
        "full CUDA out of memory",
        f"LayerStream: torch.bfloat16 {cannot}: what was packed came back as something else",
        f"LayerStream: torch.float16 {cannot}: what was packed came back as something else",
        f"LayerStream: torch.bfloat16 {cannot}: RuntimeError: no such instruction",
    ], finished.stderr[-2000:]


def test_what_kernels_are_tried_with_takes_every_kind_of_code():
    """Otherwise a kernel that gets one kind wrong would pass, and half of all weights would come back wrong."""
    for dtype in PACKABLE:
        values, state = trial(dtype), torch.get_rng_state()
        assert torch.equal(trial(dtype).view(torch.int16), values.view(torch.int16))
        assert torch.equal(torch.get_rng_state(), state), "noise that samplers draw has changed"
        assert len(values.view(torch.int16).unique()) == 1 << 16
        packed = pack(values)
        layout = read_layout(packed)
        table = packed[layout.table :][: layout.table_bytes].clone().view(torch.int32).view(-1, 3)
        second, third, escapes = table[:, 1] & 0xFFFF, table[:, 1] >> 16, table[:, 2] & 0xFFFF
        assert (second[-2:] > 0).all() and (third[-2:] > 0).all()
        assert (escapes[-2:] > 0).all() and (escapes[-2:] < 10).all()
        assert CHUNK in escapes, "a chunk without codes"
