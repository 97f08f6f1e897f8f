"""A GGUF weight keeps its bytes wherever it is moved, and gives its values wherever it is computed with."""

from __future__ import annotations

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.codec import codec_for
from layerstream.streaming.formats.dequantise import dequantise
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED

Q8, Q4_K = QUANTISED["Q8_0"], QUANTISED["Q4_K"]


def a_weight(kind=Q8, shape=(6, 512), seed=0) -> GgufTensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.Size(shape).numel() // kind.elements
    stored = torch.randint(0, 256, (blocks, kind.size_bytes), dtype=torch.uint8, generator=generator)
    stored[:, 1] = stored[:, 3] = 0x2C  # ordinary scales
    return GgufTensor(stored.view(-1), kind, shape)


def test_casts_and_computation_give_values():
    weight = a_weight()
    exact = dequantise(weight.stored, Q8, torch.float32).view(6, 512)
    assert torch.equal(weight.values(torch.float32), exact)
    assert torch.equal(weight.to(torch.float32), exact) and type(weight.to(torch.float32)) is torch.Tensor
    assert torch.equal(weight.to(torch.bfloat16), exact.to(torch.bfloat16))
    assert torch.equal(weight.to(dtype=torch.float16, copy=True), exact.half())
    assert torch.equal(weight.half(), exact.half())
    x = torch.randn(3, 512)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, exact))
    assert torch.equal(weight[2:4], exact[2:4])
    assert torch.equal(torch.empty(6, 512, dtype=torch.bfloat16).copy_(weight), exact.to(torch.bfloat16))
    assert torch.equal(torch.empty_like(weight, dtype=torch.float16).copy_(weight), exact.half())


def test_moves_and_views_keep_the_bytes():
    weight = a_weight(Q4_K)
    for other in (weight.detach(), weight.data, weight.to("cpu"), weight.clone(), weight.to("cpu", copy=True)):
        assert isinstance(other, GgufTensor)
        assert torch.equal(other.stored, weight.stored) and other.kind == Q4_K and other.shape == weight.shape
    assert weight.to("cpu", copy=True).stored.data_ptr() != weight.stored.data_ptr()
    assert weight.nbytes == weight.numel() * weight.element_size() == 6 * 2 * 144 and weight.dtype == torch.float32


def test_a_parameter_of_a_module_moves_with_it():
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(a_weight(), requires_grad=False)
    assert isinstance(layer.weight, torch.nn.Parameter) and isinstance(layer.weight, GgufTensor)
    stored = layer.weight.stored
    layer.to("meta")
    assert isinstance(layer.weight, GgufTensor) and layer.weight.device.type == "meta"
    assert layer.weight.stored.is_meta
    layer.to("cpu")
    assert layer.weight.stored.data_ptr() == stored.data_ptr(), "what came from the host is still there"
    assert torch.equal(layer.state_dict()["weight"].stored, stored)


def test_rows_are_those_of_the_whole():
    weight = a_weight(Q4_K, (9, 256))
    index = torch.tensor([[0, 8], [3, 3]])
    assert torch.equal(weight.rows(index, torch.bfloat16), weight.values(torch.bfloat16)[index])


def test_nothing_writes_into_it():
    weight = a_weight()
    before = weight.stored.clone()
    with pytest.raises(RuntimeError, match="cast it first"):
        weight.add_(1)
    with pytest.raises(RuntimeError, match="cast it first"):
        weight.copy_(torch.zeros(6, 512))
    assert torch.equal(weight.stored, before)


def test_bytes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(ValueError, match=r"34 bytes of Q8_0 do not hold the shape \(3, 32\)"):
        GgufTensor(torch.zeros(34, dtype=torch.uint8), Q8, (3, 32))
    with pytest.raises(ValueError, match="do not hold"):
        GgufTensor(torch.zeros(34, dtype=torch.uint8), Q8, (33,))


def test_the_engine_stores_it_as_its_file_does():
    weight = a_weight(QUANTISED["Q6_K"], (5, 256))
    codec = codec_for(weight)
    assert codec.stored_bytes == 1280  # 5 x 210, aligned
    slab = torch.full((codec.stored_bytes,), 0xFF, dtype=torch.uint8)
    codec.encode(weight, slab)
    restored = codec.decode(slab)
    assert isinstance(restored, GgufTensor) and restored.stored.data_ptr() == slab.data_ptr()
    assert torch.equal(restored.stored, weight.stored) and restored.shape == weight.shape


def test_a_module_that_holds_one_is_taken_apart():
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    model.layer.weight = torch.nn.Parameter(a_weight(), requires_grad=False)
    parts = take_apart(model, [("layer", model.layer)])
    (weight,) = parts.blocks[0].weights
    assert isinstance(weight.home, GgufTensor) and weight.codec.stored_bytes == 3328 and not weight.dtype_changes
