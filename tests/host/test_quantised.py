"""ComfyUI's quantised files stream as they are stored, and give the bits of the resident run by the same products."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.model_management
import pytest
import torch
from layerstream.streaming.engine.codec import align
from layerstream.streaming.engine.moving import cut_of

from loras import apply, make_lora
from opened import HOST
from products import DEQUANTISED, Products, counted_products, scaled_mm
from quantised import KINDS, File, is_in, load, parts_of, write
from scripts.division import divide, narrow_units
from scripts.family_matrix import ALL_STREAMED, HALF, stream
from scripts.model_configurations import OLDER
from scripts.tiny_models import sample_tiny
from streamed import on_simulated_card

# LTX Video finds its text's width in a quantised layer, which is half as wide in weights of four bits.
LTX_KINDS = ("metadata", "int8", "int8 by rows", "int8 rotated")
CASES = [
    *(("wan21-t2v", kind) for kind in KINDS if is_in(HOST, kind)),
    *(("ltxv", kind) for kind in LTX_KINDS if is_in(HOST, kind)),
]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
def test_matrices_of_fp8_multiply_as_torch_does(out_dtype, has_bias):
    torch.manual_seed(1)
    matrix, other = (torch.randn(16, 32).to(torch.float8_e4m3fn) for _ in range(2))
    scales = {"scale_a": torch.tensor(0.3), "scale_b": torch.tensor(1.7)}
    how = {**scales, "bias": torch.randn(16, dtype=out_dtype) if has_bias else None, "out_dtype": out_dtype}
    expected = torch._scaled_mm(matrix, other.t(), **how)
    torch.testing.assert_close(scaled_mm(matrix, other.t(), **how), expected, rtol=2**-7, atol=0.01)


class Loaded(NamedTuple):
    name: str
    kind: str
    file: File
    model: Any


@pytest.fixture
def loaded(request, monkeypatch, tmp_path) -> Iterator[Loaded]:
    name, kind = request.param
    on_simulated_card(monkeypatch, seed=4)
    if KINDS[kind].computes_in_fp8:
        monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        if HOST.version != OLDER:  # torch has its newer product of scaled matrices on cards alone
            monkeypatch.setattr(importlib.import_module("comfy_kitchen.scaled_mm_v2"), "has_scaled_mm_v2", bool)
    file, path = write(name, kind, tmp_path)
    with narrow_units():
        yield Loaded(name, kind, file, load(path, kind))
    comfy.model_management.unload_all_models()


def sampled(model: Any, name: str) -> tuple[torch.Tensor, Products]:
    with counted_products() as products:
        result = sample_tiny(model, name)
    assert result.isfinite().all()
    return result, products


def assert_samples_as(model: Any, name: str, expected: tuple[torch.Tensor, Products]) -> None:
    result, products = sampled(model, name)
    assert torch.equal(result, expected[0]) and products == expected[1]


def streamed_as(loaded: Loaded, kept: str) -> Any:
    return stream(loaded.model, kept, divide(loaded.model.model.diffusion_model))


def stored_weights(model: Any) -> dict[str, bytes]:
    """The bytes of each weight of a model's diffusion model, and of each of its scales."""
    return {
        f"{name} {part}": tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, weight in model.model.diffusion_model.named_parameters()
        for part, tensor in (parts_of(weight) or {"": weight}).items()
    }


def bytes_in_file(loaded: Loaded, streamed: Any) -> int:
    """What the file has of the weights that stream, each part of it from an aligned byte on."""
    dtype, total_bytes = KINDS[loaded.kind].options.get("dtype"), 0
    for block in streamed.stream.session.parts.blocks:
        for weight in block.weights[cut_of(block) :]:
            sizes = loaded.file.bytes_of(weight.keys[0].removesuffix(".weight"))
            if dtype is not None:  # converted when it is loaded
                sizes = [weight.home.numel() * dtype.itemsize]
            total_bytes += sum(map(align, sizes if parts_of(weight.home) else sizes[:1]))
    return total_bytes


@pytest.mark.parametrize("loaded", CASES, indirect=True, ids="-".join)
def test_a_file_streams_as_it_is_stored(loaded):
    before, expected = stored_weights(loaded.model), sampled(loaded.model, loaded.name)
    streamed = streamed_as(loaded, ALL_STREAMED)
    assert_samples_as(streamed, loaded.name, expected)
    report, session = streamed.streaming_report(), streamed.stream.session
    assert report["unplaced"] == report["broken_passes"] == 0
    assert report["hits"] + report["misses"] == report["passes"] * report["blocks"], "something is used without a call"
    assert session.link_bytes == bytes_in_file(loaded, streamed) > 0
    session.check()
    streamed = streamed_as(loaded, HALF)
    assert_samples_as(streamed, loaded.name, expected)
    assert 0 < session.link_bytes < bytes_in_file(loaded, streamed)
    session.check()
    assert_samples_as(loaded.model, loaded.name, expected)
    streamed.detach()
    assert stored_weights(loaded.model) == before


QUANTISED_PRODUCTS = [
    ("wan21-t2v", "fp8_e4m3fn_fast"),
    ("wan21-t2v", "scaled_fp8 with inputs"),
    ("wan21-t2v", "metadata with inputs"),
    ("wan21-t2v", "int8"),
    ("wan21-t2v", "convrot_w4a4"),
]


@pytest.mark.parametrize(
    "loaded", [case for case in QUANTISED_PRODUCTS if is_in(HOST, case[1])], indirect=True, ids="-".join
)
def test_quantised_matrices_are_multiplied_as_such(loaded):
    """What the comparison of products above would not show: that there are any of quantised matrices."""
    streamed = streamed_as(loaded, ALL_STREAMED)
    products = sampled(streamed, loaded.name)[1]
    assert sum(count for product, count in products.items() if "quantised" in product[1:]) >= 36
    assert products[DEQUANTISED] == 0


@pytest.mark.parametrize("loaded", [("wan21-t2v", "metadata with inputs")], indirect=True, ids="-".join)
def test_weights_are_dequantised_where_a_node_asks_for_a_dtype(loaded):
    """As the node Model Compute Dtype does; asked by one branch of a graph, and not by the other."""

    def asking(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_compute_dtype(torch.float32)
        return clone

    plain, asked = sampled(loaded.model, loaded.name), sampled(asking(loaded.model), loaded.name)
    assert plain[1][DEQUANTISED] == 0 < asked[1][DEQUANTISED]
    streamed = streamed_as(loaded, ALL_STREAMED)
    for _ in range(2):
        assert_samples_as(streamed, loaded.name, plain)
        assert_samples_as(asking(streamed), loaded.name, asked)
    assert_samples_as(loaded.model, loaded.name, plain)


def lora_with_biases(model: Any) -> dict[str, torch.Tensor]:
    """A LoRA that changes biases of half of its layers too."""
    lora = make_lora(model, seed=1)
    for key in [key for key in lora if key.endswith(".lora_B.weight")][::2]:
        lora[key.replace(".lora_B.weight", ".diff_b")] = 0.1 * lora[key][:, 0]
    return lora


@pytest.mark.parametrize("loaded", CASES, indirect=True, ids="-".join)
def test_a_lora_is_baked_as_for_a_full_load(loaded):
    """ComfyUI dequantises, patches and quantises anew, rounding by chance with the layer's own seed."""
    name, lora = loaded.name, lora_with_biases(loaded.model)
    before, plain = stored_weights(loaded.model), sampled(loaded.model, name)
    expected = {strength: sampled(apply(loaded.model, lora, strength), name) for strength in (0.8, -0.3)}
    only_weights = {key: values for key, values in lora.items() if not key.endswith(".diff_b")}
    without_biases = sampled(apply(loaded.model, only_weights, 0.8), name)
    results = [plain[0], without_biases[0], *(result for result, _ in expected.values())]
    assert not any(torch.equal(one, other) for one in results for other in results if one is not other)
    for kept in (ALL_STREAMED, HALF):
        streamed = streamed_as(loaded, kept)
        for strength, what in expected.items():
            assert_samples_as(apply(streamed, lora, strength), name, what)
        assert_samples_as(streamed, name, plain)
    streamed.detach()
    assert stored_weights(loaded.model) == before


@pytest.mark.parametrize(
    "loaded", [("wan21-t2v", kind) for kind in ("metadata", "nvfp4") if is_in(HOST, kind)], indirect=True, ids="-".join
)
def test_scales_lie_beside_their_codes_on_the_card(loaded):
    """A second copy of them would be memory that no plan counts."""
    streamed = streamed_as(loaded, ALL_STREAMED)
    places: list[set[int]] = []

    def note(layer: torch.nn.Module, inputs: Any) -> None:
        places.append({part.untyped_storage().data_ptr() for part in parts_of(layer.weight).values()})

    modules = loaded.model.model.diffusion_model.modules()
    layers = [module for module in modules if parts_of(getattr(module, "weight", None))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    sample_tiny(streamed, loaded.name)
    for handle in handles:
        handle.remove()
    assert len(places) >= 36 and all(len(place) == 1 for place in places)
