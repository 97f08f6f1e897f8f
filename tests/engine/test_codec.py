"""Codecs give back what they were given, bit for bit, in the memory format it had."""

from __future__ import annotations

import pytest
import torch
from layerstream.streaming.engine.block import as_home, as_parameter
from layerstream.streaming.engine.codec import codec_for

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]


def stored(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What the codec gives back after the bytes have been moved to other memory."""
    codec = codec_for(weight, dtype)
    slab = torch.full((256 + codec.stored_bytes,), 0xFF, dtype=torch.uint8)
    codec.encode(weight, slab[256:])
    return codec.decode(slab.clone()[256:])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else bits(tensor.reshape(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_raw_bytes_survive(dtype, shape):
    size = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    weight = torch.randint(0, high, (size,), dtype=torch.uint8).view(dtype).view(shape)
    assert bits(stored(weight)) == bits(weight)
    assert stored(weight).shape == weight.shape and stored(weight).dtype == dtype


def test_special_values_survive():
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert bits(stored(patterns)) == bits(patterns)


def test_a_dense_memory_format_is_kept():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert stored(weight).stride() == weight.stride()
    assert torch.equal(stored(weight), weight)


def test_a_strided_view_is_stored_without_its_gaps():
    weight = torch.randn(10, 10)[:, ::2]
    assert codec_for(weight).stored_bytes == weight.numel() * 4
    assert torch.equal(stored(weight), weight)


def test_a_weight_is_converted_once_on_its_way_in():
    weight = torch.randn(33)
    assert torch.equal(stored(weight, torch.bfloat16), weight.to(torch.bfloat16))


class Scaled(torch.Tensor):
    """A quantised tensor as ComfyUI has them: small integers and a scale that pose as a float tensor."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} would have computed with it instead of moving its bytes")


def test_a_wrapper_subclass_goes_by_its_own_protocol():
    weight = Scaled(torch.randint(-128, 127, (5, 3), dtype=torch.int8), torch.rand(5))
    assert codec_for(weight).stored_bytes == 256 + 256
    back = stored(weight)
    assert isinstance(back, Scaled)
    assert torch.equal(back.data_, weight.data_) and torch.equal(back.scale, weight.scale)


class Tagged(torch.Tensor):
    """As the ComfyUI-GGUF pack has quantised tensors: bytes that say in attributes what they stand for."""

    def __new__(cls, *arguments, tensor_type, tensor_shape, patches=(), **options):
        return super().__new__(cls, *arguments, **options)

    def __init__(self, *arguments, tensor_type, tensor_shape, patches=(), **options):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, patches

    def detach(self):
        return self

    @property
    def shape(self):
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


def test_a_tensor_that_says_in_attributes_what_it_is_says_so_afterwards():
    data = torch.randint(0, 256, (4, 34), dtype=torch.uint8)
    weight = torch.nn.Parameter(
        Tagged(data, tensor_type="Q8_0", tensor_shape=torch.Size((4, 32)), patches=["a LoRA"]), requires_grad=False
    )
    restored = stored(weight)
    assert codec_for(weight).stored_bytes == data.nbytes
    assert type(restored) is Tagged and restored.tensor_type == "Q8_0" and restored.shape == (4, 32)
    assert restored.patches == [] and torch.equal(restored.as_subclass(torch.Tensor), data)


def test_patched_values_for_such_a_tensor_are_refused_with_a_remedy():
    data = torch.zeros(4, 34, dtype=torch.uint8)
    codec = codec_for(Tagged(data, tensor_type="Q8_0", tensor_shape=torch.Size((4, 32))))
    with pytest.raises(TypeError, match="patched values have no place in a Tagged: apply LoRAs"):
        codec.encode(torch.zeros(4, 32), torch.zeros(256, dtype=torch.uint8))


def test_a_wrapper_becomes_a_parameter_over_the_same_memory():
    """`torch.nn.Parameter` would detach it, in which ComfyUI's quantised tensors copy their scales."""
    weight = Scaled(torch.zeros(5, 3, dtype=torch.int8), torch.rand(5))
    parameter = as_parameter(weight)
    assert isinstance(parameter, torch.nn.Parameter) and isinstance(parameter, Scaled)
    assert not isinstance(weight, torch.nn.Parameter)
    for part in ("data_", "scale"):
        assert getattr(parameter, part) is getattr(weight, part) is getattr(as_home(parameter), part)


def test_patched_values_of_another_form_are_refused_with_a_remedy():
    codec = codec_for(Scaled(torch.zeros(5, 3, dtype=torch.int8), torch.rand(1)))
    stored = torch.zeros(codec.stored_bytes, dtype=torch.uint8)
    for patched in (torch.zeros(5, 3), Scaled(torch.zeros(5, 3, dtype=torch.int8), torch.rand(5))):
        with pytest.raises(TypeError, match=r"do not keep the form that Scaled had in its file .*: apply"):
            codec.encode(patched, stored)


def test_a_patched_scale_may_have_an_axis_more():
    weight, patched = (Scaled(torch.zeros(5, 3, dtype=torch.int8), torch.rand(shape)) for shape in ((5,), (5, 1)))
    codec = codec_for(weight)
    memory = torch.zeros(codec.stored_bytes, dtype=torch.uint8)
    codec.encode(patched, memory)
    assert torch.equal(codec.decode(memory).scale, patched.scale.view(5))
