"""Models that the ComfyUI-GGUF pack has loaded stream too, and lose no LoRA silently."""

from __future__ import annotations

import gc

import comfy.model_management
import pytest
import torch
from layerstream.nodes.layer_stream_model import LayerStreamModel
from layerstream.streaming.host.patcher import NothingToStream

from gguf_models import detect_narrow, load_resident, narrow_weights, write_gguf
from loras import apply, make_lora
from scripts.division import narrow_units
from scripts.tiny_models import sample_tiny
from streamed import on_simulated_card, stream
from tagged_pack import TaggedTensor, load


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """A model of tagged weights, and the same one of dequantised weights."""
    on_simulated_card(monkeypatch, seed=9)
    detect_narrow(monkeypatch, "flux")
    weights = write_gguf(tmp_path / "flux.gguf", narrow_weights("flux"), "flux")
    with narrow_units(), torch.inference_mode():
        yield load(tmp_path / "flux.gguf"), load_resident(weights)
    comfy.model_management.unload_all_models()
    gc.collect()


def test_streamed_as_its_pack_holds_it(pair):
    model, reference = pair
    assert sum(isinstance(weight, TaggedTensor) for weight in model.model.parameters()) > 20
    expected = sample_tiny(reference, "flux")
    assert torch.equal(sample_tiny(model, "flux"), expected)
    for kept in (0.0, 0.5):
        streamed = stream(model, kept)
        for _ in range(2):
            assert torch.equal(sample_tiny(streamed, "flux"), expected)
        assert streamed.streaming_report()["streamed_bytes_per_step"] > 0
    assert torch.equal(sample_tiny(model, "flux"), expected)


def test_a_lora_after_the_node_is_refused_with_a_remedy(pair):
    model, reference = pair
    with pytest.raises(ValueError, match=r"would be lost: load the file with Load Diffusion Model \(GGUF, streamed\)"):
        apply(stream(model, 0.5), make_lora(reference, seed=1), 1.0)


def test_a_model_with_a_lora_passes_through_as_it_is(pair, caplog):
    model, _ = pair
    patched = model.clone()
    patched.add_patches({"diffusion_model.single_blocks.0.linear1.weight": ("diff", (torch.ones(1),))})
    with pytest.raises(NothingToStream, match="another pack's GGUF loader"):
        stream(patched, 0.0)
    inputs = {"mode": "always", "prefetch_blocks": 0, "vram_gb": 0.0, "min_free_mb": 0}
    assert LayerStreamModel.execute(patched, **inputs).args[0] is patched
    assert "passes through unchanged: it has LoRAs" in caplog.text
