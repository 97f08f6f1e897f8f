"""Layers with GGUF weights compute what ComfyUI's layers compute with the same weights in the compute dtype."""

from __future__ import annotations

import weakref

import comfy.ops
import pytest
import torch
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED
from layerstream.streaming.host.gguf_layers import LARGE_ELEMENTS, GgufOperations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(shape, name="Q4_K", seed=0) -> GgufTensor:
    kind = QUANTISED[name]
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (torch.Size(shape).numel() // kind.elements, kind.size_bytes), generator=generator)
    stored = stored.to(torch.uint8)
    stored[:, [1, 3]] = 0x18  # scales of about 0.002
    return GgufTensor(stored.view(-1), kind, shape)


def make(kind: str, dtype: torch.dtype):
    """A layer, the same of ComfyUI's with dequantised weights, and an input."""
    arguments, shape, input_ = {
        "Linear": ((512, 24), (24, 512), torch.randn(2, 5, 512)),
        "Conv1d": ((64, 8, 4), (8, 64, 4), torch.randn(2, 64, 9)),
        "Conv2d": ((16, 8, 4), (8, 16, 4, 4), torch.randn(2, 16, 7, 7)),
        "Conv3d": ((8, 4, 4), (4, 8, 4, 4, 4), torch.randn(1, 8, 5, 5, 5)),
        "Embedding": ((40, 256), (40, 256), torch.randint(0, 40, (3, 7))),
    }[kind]
    ours, theirs = (getattr(ops, kind)(*arguments, dtype=dtype) for ops in (GgufOperations, comfy.ops.manual_cast))
    weight = random_weight(shape)
    state = {"weight": weight} | ({} if kind == "Embedding" else {"bias": torch.randn(shape[0])})
    ours.load_state_dict(state)
    theirs.load_state_dict(state | {"weight": weight.values(dtype)})
    return ours, theirs, input_ if kind == "Embedding" else input_.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"])
def test_a_layer_rounds_its_weights_once_to_the_dtype_of_its_input(kind, dtype):
    torch.manual_seed(0)
    ours, theirs, input_ = make(kind, dtype)
    options = {"out_dtype": dtype} if kind == "Embedding" else {}
    with torch.inference_mode():
        assert torch.equal(ours(input_, **options), theirs(input_, **options))
        assert isinstance(ours.weight, GgufTensor)
        function = lambda weight: weight * 2  # noqa: E731
        ours.weight_function, theirs.weight_function = [function], [function]
        assert torch.equal(ours(input_, **options), theirs(input_, **options))


def test_loading_says_what_is_missing_unexpected_or_of_another_shape():
    layer = GgufOperations.Linear(256, 8)
    state = {"weight": random_weight((8, 256)), "more": torch.zeros(1)}
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["bias"], ["more"])
    with pytest.raises(RuntimeError, match=r"`weight` has the shape \(4, 256\), the model wants \(8, 256\)"):
        layer.load_state_dict({"weight": random_weight((4, 256)), "bias": torch.zeros(8)})


def test_large_weights_get_no_memory_before_the_files():
    wide = LARGE_ELEMENTS // 1024
    model = torch.nn.Sequential(GgufOperations.Linear(1024, wide), GgufOperations.Linear(8, 8))
    assert model[0].weight.is_meta and not model[1].weight.is_meta and not model[0].bias.is_meta
    model.to("cpu")
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(8))  # as ComfyUI does for a projection that files may lack
    missing, _ = model.load_state_dict({"1.bias": torch.zeros(8)}, strict=False)
    assert set(missing) == {"0.weight", "0.bias", "1.weight"}
    assert torch.equal(model[0].weight, torch.zeros(wide, 1024)) and torch.equal(model[1].weight, torch.eye(8))


def test_weights_of_other_layers_are_dequantised_when_they_load():
    layer = GgufOperations.LayerNorm(256)
    weight = random_weight((256,))
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(256)})
    assert type(layer.weight) is torch.nn.Parameter and torch.equal(layer.weight.data, weight.values(torch.float32))


@pytest.mark.parametrize("is_inference", [False, True])
def test_moving_a_layer_moves_the_bytes_and_bringing_it_back_costs_nothing(is_inference):
    with torch.inference_mode(is_inference):
        layer = GgufOperations.Linear(256, 8)
        layer.load_state_dict({"weight": random_weight((8, 256)), "bias": torch.randn(8)})
        place, reference = layer.weight.stored.data_ptr(), weakref.ref(layer.weight)
        layer.to("meta")
        assert isinstance(layer.weight, GgufTensor) and layer.weight.stored.is_meta and layer.bias.is_meta
    assert reference() is not layer.weight
    assert layer.weight.to("cpu").stored.data_ptr() == place
