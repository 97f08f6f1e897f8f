"""Models from GGUF files sample to the bits of the same models with every weight dequantised by the reference."""

from __future__ import annotations

import gc

import comfy.model_management
import pytest
import torch
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.host.gguf_loading import load_diffusion_model

from gguf_models import detect_narrow, load_resident, narrow_weights, write_gguf
from scripts.division import narrow_units
from scripts.tiny_models import sample_tiny
from streamed import on_simulated_card, stream

# Name of a narrow model -> the architecture that published files of it name.
ARCHITECTURES = {
    "flux": "flux",
    "sd35-medium": "sd3",
    "sdxl": "sdxl",
    "sd15": "sd1",
    "zimage": "lumina2",
    "qwen-image": "qwen_image",
    "ltxv": "ltxv",
    "wan21-t2v": "wan",
    "hidream-i1": "hidream",
    "auraflow": "aura",
    "cosmos-predict2": "cosmos",
}
UNETS = ("sdxl", "sd15")


@pytest.fixture
def forget():
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_samples_to_the_references_bits(name, monkeypatch, tmp_path, forget):
    """Resident, all streamed, and half of it streamed."""
    on_simulated_card(monkeypatch, seed=3)
    detect_narrow(monkeypatch, name)
    path = tmp_path / f"{name}.gguf"
    weights = write_gguf(path, narrow_weights(name), ARCHITECTURES[name], reshapes=name in UNETS)
    with narrow_units(), torch.inference_mode():
        expected = sample_tiny(load_resident(weights), name)
        assert expected.isfinite().all() and expected.std() > 0
        model = load_diffusion_model(path, dtype=torch.float32)
        held = [weight for weight in model.model.parameters() if isinstance(weight, GgufTensor)]
        assert len({weight.kind for weight in held}) >= 6
        assert model.model_size() < 1.15 * path.stat().st_size
        assert torch.equal(sample_tiny(model, name), expected)
        for kept in (0.0, 0.5):
            streamed = stream(model, kept)
            assert torch.equal(sample_tiny(streamed, name), expected)
            report = streamed.streaming_report()
            assert report["streamed_bytes_per_step"] > 0 and report["broken_passes"] == 0
        assert torch.equal(sample_tiny(model, name), expected)


def test_only_layers_that_hold_blocks_cast_where_the_model_computes_in_its_dtype(monkeypatch, tmp_path):
    detect_narrow(monkeypatch, "flux")
    path = tmp_path / "flux.gguf"
    write_gguf(path, narrow_weights("flux"), "flux")
    for dtype, casts in ((torch.float32, False), (torch.bfloat16, True)):  # a processor computes in float32
        model = load_diffusion_model(path, dtype=dtype).model.diffusion_model
        assert model.img_in.comfy_cast_weights and model.single_blocks[0].linear1.comfy_cast_weights
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert norms and all(norm.comfy_cast_weights == casts for norm in norms)
