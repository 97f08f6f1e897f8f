"""The packed form keeps every bit of every pattern, is as small as it promises, and refuses nonsense."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.engine.packing import CHUNK, CorruptPacking, pack, unpack


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16).reshape(-1)


def assert_survives(weight: torch.Tensor) -> torch.Tensor:
    packed = pack(weight)
    assert torch.equal(bits(unpack(packed)), bits(weight))
    return packed


def every_pattern() -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_pattern_survives_alone_and_shuffled():
    assert_survives(every_pattern())
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0))
    assert_survives(every_pattern()[order].repeat(3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * CHUNK + 5), st.integers(0, 2**31), st.sampled_from([1e-30, 0.02, 1.0, 1e30]))
def test_any_size_survives(size, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    assert_survives((torch.randn(size, generator=generator) * scale).bfloat16())


@pytest.mark.parametrize("size", [0, 1, 31, CHUNK - 1, CHUNK, CHUNK + 1, 65 * CHUNK + 7])
def test_odd_sizes_and_constant_weights_survive(size):
    for value in (0.0, -0.0, 1.5, float("nan"), float("-inf")):
        assert_survives(torch.full((size,), value, dtype=torch.bfloat16))


def test_shapes_and_strides_do_not_matter():
    weight = torch.randn(130, 270).bfloat16()
    assert torch.equal(unpack(pack(weight.t())), weight.t().reshape(-1))


@pytest.mark.parametrize(
    ("name", "most"), [("normal", 0.71), ("student", 0.73), ("uneven rows", 0.73)], ids=lambda value: str(value)
)
def test_it_is_as_small_as_promised(name, most):
    torch.manual_seed(0)
    weight = {
        "normal": torch.randn(1024, 3840) * 0.02,
        "student": torch.distributions.StudentT(5.0).sample((1024, 3840)) * 0.02,
        "uneven rows": torch.randn(1024, 3840) * torch.randn(1024, 1).exp() * 0.02,
    }[name].bfloat16()
    packed = assert_survives(weight)
    assert packed.numel() <= most * weight.nbytes


def test_the_header_says_what_it_is():
    packed = pack(torch.randn(100).bfloat16())
    assert bytes(packed[:5].tolist()) == b"LSPK\x01"
    assert packed.numel() % 256 == 0


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        pack(torch.randn(4))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_corrupt_bytes_are_refused_or_decoded_but_never_read_beyond(data):
    packed = pack(torch.randn(CHUNK + 100, generator=torch.Generator().manual_seed(1)).bfloat16())
    broken = packed.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(st.integers(0, 63), st.integers(0, broken.numel() - 1)))
        broken[where] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, broken.numel()))]
    with contextlib.suppress(CorruptPacking):
        assert unpack(broken).numel() <= packed.numel()
