"""The packed form keeps every bit of every pattern, is as small as it promises, and refuses nonsense."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.engine.packing import (
    PACKABLE,
    CorruptPacking,
    PlainPacker,
    expected_share,
    pack,
    read_layout,
    unpack,
    worst_bytes,
)
from layerstream.streaming.engine.packing_format import CHUNK

each_dtype = pytest.mark.parametrize("dtype", PACKABLE, ids=str)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16).reshape(-1)


def assert_survives(weight: torch.Tensor) -> torch.Tensor:
    packed = pack(weight)
    restored = unpack(packed)
    assert restored.dtype is weight.dtype
    assert torch.equal(bits(restored), bits(weight))
    assert packed.numel() <= worst_bytes(weight.numel(), weight.dtype)
    return packed


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


@each_dtype
def test_every_pattern_survives_alone_and_shuffled(dtype):
    assert_survives(every_pattern(dtype))
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0))
    assert_survives(every_pattern(dtype)[order].repeat(3))


@each_dtype
def test_every_pattern_survives_among_those_of_like_size(dtype):
    patterns = every_pattern(dtype)
    order = patterns.abs().view(torch.int16).sort(stable=True).indices
    packed = assert_survives(patterns[order])
    assert packed.numel() < patterns.nbytes  # so few escapes that codes of all levels are there


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 3 * CHUNK + 5),
    st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e30]),
    st.sampled_from(PACKABLE),
)
def test_any_size_survives(size, seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    assert_survives((torch.randn(size, generator=generator) * scale).to(dtype))


@each_dtype
@pytest.mark.parametrize("size", [0, 1, 31, CHUNK - 1, CHUNK, CHUNK + 1, 65 * CHUNK + 7])
def test_odd_sizes_and_constant_weights_survive(size, dtype):
    for value in (0.0, -0.0, 1.5, float("nan"), float("-inf")):
        assert_survives(torch.full((size,), value, dtype=dtype))


@each_dtype
def test_subnormals_and_payloads_of_nan_survive_among_ordinary_weights(dtype):
    patterns = every_pattern(dtype)
    tiny = patterns[(patterns.abs() < torch.finfo(dtype).tiny) | patterns.isnan()]
    weight = (torch.randn(3 * CHUNK, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype)
    weight[:: 3 * CHUNK // 1024] = tiny[torch.arange(weight[:: 3 * CHUNK // 1024].numel()) * 7 % tiny.numel()]
    assert_survives(weight)
    assert_survives(tiny)


@each_dtype
def test_shapes_and_strides_do_not_matter(dtype):
    weight = torch.randn(130, 270).to(dtype)
    assert torch.equal(unpack(pack(weight.t())), weight.t().reshape(-1))


@each_dtype
def test_packing_into_room_and_out_of_it_keeps_to_the_bytes_of_the_weight(dtype):
    weight = torch.randn(CHUNK + 4).to(dtype)
    room = torch.full((worst_bytes(weight.numel(), dtype) + 64,), 0xFF, dtype=torch.uint8)
    layout = PlainPacker().encode(weight.view(torch.uint8), room, dtype)
    assert layout == read_layout(room) and layout.dtype is dtype
    assert (room[layout.stored_bytes :] == 0xFF).all()
    out = torch.full((weight.nbytes + 64,), 0xFF, dtype=torch.uint8)
    PlainPacker().decoder(room, layout, out)(None)
    assert torch.equal(out[: weight.nbytes], weight.view(torch.uint8))
    assert (out[weight.nbytes :] == 0xFF).all()


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("normal", {torch.bfloat16: 0.68, torch.float16: 0.865}),
        ("student", {torch.bfloat16: 0.69, torch.float16: 0.88}),
        ("uneven rows", {torch.bfloat16: 0.69, torch.float16: 0.88}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@each_dtype
def test_it_is_as_small_as_promised(name, most, dtype):
    torch.manual_seed(0)
    weight = {
        "normal": torch.randn(256, 3840) * 0.02,
        "student": torch.distributions.StudentT(5.0).sample((256, 3840)) * 0.02,
        "uneven rows": torch.randn(256, 3840) * torch.randn(256, 1).exp() * 0.02,
    }[name].to(dtype)
    packed = assert_survives(weight)
    assert packed.numel() <= most[dtype] * weight.nbytes
    if name == "normal":
        assert packed.numel() / weight.nbytes == pytest.approx(expected_share(dtype), abs=0.003)


def test_the_header_says_what_it_is():
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        packed = pack(torch.randn(100).to(dtype))
        assert bytes(packed[:6].tolist()) == b"LSPK\x01" + bytes([number])
        assert packed.numel() % 256 == 0


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        pack(torch.randn(4))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(PACKABLE))
def test_corrupt_bytes_are_refused_or_decoded_but_never_read_beyond(data, dtype):
    weight = torch.randn(CHUNK + 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[::500] = 0.0  # escapes
    packed = pack(weight)
    layout = read_layout(packed)
    parts = ((0, 32), (layout.table, 24), (layout.planes, layout.plane_bytes), (layout.runs, 4 * layout.words))
    broken = packed.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        start, length = data.draw(st.sampled_from(parts))
        where = start + data.draw(st.integers(0, length - 1))
        broken[where] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, broken.numel()))]
    with contextlib.suppress(CorruptPacking):
        assert unpack(broken).numel() <= packed.numel()
