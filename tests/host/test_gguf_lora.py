"""LoRAs on GGUF weights give what ComfyUI gives on the same weights dequantised, and are never lost."""

from __future__ import annotations

import gc

import comfy.hooks
import comfy.model_management
import pytest
import torch
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED
from layerstream.streaming.host.budget import host_memory
from layerstream.streaming.host.gguf_loading import load_diffusion_model

from gguf_models import detect_narrow, load_resident, narrow_weights, write_gguf
from loras import apply, assert_survives_a_retry, assert_survives_faults, make_lora
from scripts.division import narrow_units
from scripts.tiny_models import sample_tiny
from streamed import on_simulated_card, stream

FAMILIES = ("flux", "sd35-medium")


@pytest.fixture
def pair(request, monkeypatch, tmp_path):
    """A model from a GGUF file and the same one of dequantised weights, with a function that samples either."""
    name = request.param
    on_simulated_card(monkeypatch, seed=7)
    detect_narrow(monkeypatch, name)
    path = tmp_path / f"{name}.gguf"
    # Of 16-bit weights ComfyUI rounds patched values to 16 bits, which the reference in float32 does not do.
    weights = write_gguf(path, narrow_weights(name), name, kinds=(*QUANTISED, "F32"))
    with narrow_units(), torch.inference_mode():
        yield load_diffusion_model(path, dtype=torch.float32), load_resident(weights), lambda m: sample_tiny(m, name)
    comfy.model_management.unload_all_models()
    gc.collect()


def quantised_weights(model) -> set[str]:
    return {name for name, weight in model.model.named_parameters() if isinstance(weight, GgufTensor)}


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_resident_before_and_after_the_node(pair):
    model, reference, sample = pair
    plain, lora = sample(reference), make_lora(reference, seed=1)
    expected = sample(apply(reference, lora, 0.8))
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(apply(model, lora, 0.8)), expected)
    for kept in (0.0, 0.5):
        assert torch.equal(sample(stream(apply(model, lora, 0.8), kept)), expected)
        assert torch.equal(sample(apply(stream(model, kept), lora, 0.8)), expected)
        assert torch.equal(sample(stream(model, kept)), plain)
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_two_loras_a_changed_strength_and_other_branches(pair):
    model, reference, sample = pair
    first, second = make_lora(reference, seed=1), make_lora(reference, seed=2)
    before = quantised_weights(model)
    streamed = stream(model, 0.4)
    results = []
    for strengths in ((1.0, 0.5), (0.3, 0.5), (0.3, -1.0)):
        expected = sample(apply(apply(reference, first, strengths[0]), second, strengths[1]))
        results.append(expected)
        for base in (streamed, model):
            assert torch.equal(sample(apply(apply(base, first, strengths[0]), second, strengths[1])), expected)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert torch.equal(sample(streamed), sample(reference))
    assert quantised_weights(model) == before


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_a_lora_survives_out_of_memory_interrupt_and_clones(pair):
    model, reference, sample = pair
    lora = make_lora(reference, seed=1)
    expected = sample(apply(reference, lora, 1.0))
    streamed = apply(stream(model, 0.5), lora, 1.0).clone()
    assert_survives_a_retry(streamed, sample, expected)
    for patched in (streamed, apply(model, lora, 1.0).clone()):
        assert_survives_faults(patched, sample, expected)


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_a_streamed_models_loras_are_in_page_locked_memory_until_they_go(pair):
    model, reference, sample = pair
    streamed = stream(model, 0.5)
    sample(streamed)

    def locked_bytes() -> int:
        session = streamed.stream.session
        return host_memory().locked_bytes - session.page_locked_bytes - session.spare_bytes

    without = locked_bytes()
    lora = {name: tensor.t().contiguous().t() for name, tensor in make_lora(reference, seed=1).items()}
    expected = sample(apply(reference, lora, 0.7))
    patched = apply(streamed, lora, 0.7)
    assert torch.equal(sample(patched), expected)
    at_run_time = tuple(name.removesuffix("weight") for name in quantised_weights(model))
    lora_bytes = sum(tensor.nbytes for name, tensor in lora.items() if name.startswith(at_run_time))
    assert lora_bytes
    assert locked_bytes() >= without + lora_bytes
    # A clone shares them, and what comes to it locks its own.
    again = apply(patched.clone(), lora, -0.7)
    assert torch.equal(sample(again), sample(apply(apply(reference, lora, 0.7), lora, -0.7)))
    assert without + 2 * lora_bytes <= locked_bytes() < without + 3 * lora_bytes
    del patched, again
    assert torch.equal(sample(streamed), sample(reference))
    comfy.model_management.unload_all_models()
    gc.collect()
    assert locked_bytes() <= without


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_a_lora_that_may_not_be_locked_is_applied_all_the_same(pair, monkeypatch):
    model, reference, sample = pair
    lora = make_lora(reference, seed=1)
    patched = apply(stream(model, 0.5), lora, 1.0)
    monkeypatch.setattr(type(patched.stream.device), "page_lock", lambda self, memory, is_file: False)
    assert torch.equal(sample(patched), sample(apply(reference, lora, 1.0)))


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_a_model_merged_from_one_with_a_lora_has_it(pair):
    """As the node ModelMergeSimple does, the GGUF model being the second."""
    model, reference, sample = pair
    lora = make_lora(reference, seed=1)

    def merge(first, second):
        merged = first.clone()
        for key, value in second.get_key_patches("diffusion_model.").items():
            merged.add_patches({key: value}, 0.5, 0.5)
        return merged

    expected = sample(merge(reference, apply(reference, lora, 1.0)))
    assert not torch.equal(expected, sample(merge(reference, reference)))
    assert torch.equal(sample(merge(reference, apply(model, lora, 1.0))), expected)


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_a_scheduled_lora_is_refused_with_a_remedy(pair):
    model, _, _ = pair
    with pytest.raises(ValueError, match=r"GGUF weights.*Load LoRA"):
        model.clone().add_hook_patches(
            comfy.hooks.WeightHook(), {"diffusion_model.single_blocks.0.linear1.weight": ("diff", (torch.zeros(1),))}
        )
