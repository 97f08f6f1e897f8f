"""Dequantised weights are the reference's, bit for bit, whatever bytes a file has."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.formats import dequantise as module
from layerstream.streaming.formats.dequantise import dequantise
from layerstream.streaming.formats.kinds import IQ4_VALUES, PLAIN, QUANTISED, Kind
from torch._subclasses.fake_tensor import FakeTensorMode

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
ROUNDED = [name for name in PLAIN if name in ("F32", "F16", "BF16")]
BY_PACKAGE = ["TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"]


def kind_of(name: str) -> Kind:
    return Kind(name, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]])


def reference(stored: torch.Tensor, kind: Kind) -> torch.Tensor:
    rows = stored.numpy().reshape(1, -1)
    with numpy.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.name])).reshape(-1)


def random_blocks(kind: Kind, blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (blocks * kind.size_bytes,), dtype=torch.uint8, generator=generator)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; which of the many NaNs it is does not matter."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits)[is_number], expected.view(bits)[is_number])


def test_the_table_is_the_packages():
    assert {name: kind_of(name) for name in QUANTISED} == QUANTISED
    assert gguf.quants.IQ4_NL.kvalues == IQ4_VALUES


@pytest.mark.parametrize("name", [*QUANTISED, *ROUNDED])
@settings(max_examples=25, deadline=None)
@given(blocks=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_every_byte_pattern_gives_the_references_values(name, blocks, seed):
    """Random bytes make scales that are NaN or infinite too, which must come through as such."""
    kind = kind_of(name)
    stored = random_blocks(kind, blocks, seed)
    exact = reference(stored, kind)
    for dtype in COMPUTED:
        assert_same_bits(dequantise(stored, kind, dtype), exact.to(dtype))


@pytest.mark.parametrize("name", QUANTISED)
def test_scales_at_their_limits(name):
    """NaN, infinity, the largest, the smallest, zeros of either sign, in every place where a scale can be."""
    kind = QUANTISED[name]
    scales = torch.tensor([0x7E00, 0x7C00, -0x400, 0x7BFF, 1, 0, -0x8000], dtype=torch.int16).view(torch.uint8)
    stored = random_blocks(kind, 7 * (kind.size_bytes - 1), 0).view(-1, 7, kind.size_bytes)
    for place in range(kind.size_bytes - 1):
        stored[place, :, place : place + 2] = scales.view(7, 2)
    stored = stored.view(-1)
    assert_same_bits(dequantise(stored, kind, torch.float32), reference(stored, kind))


@pytest.mark.parametrize("name", QUANTISED)
def test_batches_join_without_a_seam(name, monkeypatch):
    kind = QUANTISED[name]
    stored = random_blocks(kind, 21, 1)
    monkeypatch.setattr(module, "BATCH_ELEMENTS", 4 * kind.elements)
    assert_same_bits(dequantise(stored, kind, torch.float32), reference(stored, kind))


@pytest.mark.parametrize("name", BY_PACKAGE)
def test_other_kinds_go_through_the_package_and_the_log_says_so_once(name, caplog):
    kind = kind_of(name)
    stored = random_blocks(kind, 5, 2)
    module._warn_of_package.cache_clear()
    for _ in range(2):
        assert_same_bits(dequantise(stored, kind, torch.bfloat16), reference(stored, kind).to(torch.bfloat16))
    assert [name in record.getMessage() for record in caplog.records] == [True]


def test_a_card_for_which_triton_makes_no_kernel_dequantises_without(monkeypatch):
    """On tensors without values, which need no card to be on one."""
    triton_launch = pytest.importorskip("layerstream.streaming.engine.triton_launch")
    monkeypatch.setattr(triton_launch, "can_launch", lambda: False)
    module._kernels.cache_clear()
    with FakeTensorMode():
        found = dequantise(torch.empty(68, dtype=torch.uint8, device="cuda"), QUANTISED["Q8_0"], torch.float16)
    module._kernels.cache_clear()
    assert found.device.type == "cuda" and found.shape == (64,) and found.dtype == torch.float16


def test_no_bytes_are_no_values():
    for kind in QUANTISED.values():
        assert dequantise(torch.empty(0, dtype=torch.uint8), kind, torch.bfloat16).shape == (0,)


def test_what_nothing_can_read_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"Q8_1.*another quantisation"):
        dequantise(torch.zeros(40, dtype=torch.uint8), kind_of("Q8_1"), torch.float32)
    with pytest.raises(ValueError, match="35 bytes are no whole blocks of Q8_0, of 34 each"):
        dequantise(torch.zeros(35, dtype=torch.uint8), QUANTISED["Q8_0"], torch.float32)
