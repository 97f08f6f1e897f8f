"""A control model comes to a streamed one that has the whole card: it gets its place, and both keep within the card."""

from __future__ import annotations

import comfy.model_management
import comfy.sampler_helpers
import torch
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import StreamingSettings

from plugged import sample
from scripts.division import narrow_units
from scripts.tiny_models import build_tiny_model
from shared_card import SharedCard
from test_plugins_control import control_of_unet, controlled_by

COMPUTE_BYTES = 4 * 1024**2
IMAGE = (64, 64, 3)


def test_a_control_model_gets_its_place(monkeypatch):
    """Several times, with a new one each time: the older ComfyUI loads a run's models in no order at all."""
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model("sd15")
        plain = sample(model, "sd15", cfg=1.0)
        expected = sample(model, "sd15", controlled_by(control_of_unet("sd15"), IMAGE), cfg=1.0)
        card = SharedCard(monkeypatch, COMPUTE_BYTES + int(0.8 * model.model_size()))
        monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (COMPUTE_BYTES, COMPUTE_BYTES))
        streamed = StreamingModelPatcher.from_patcher(build_tiny_model("sd15"), StreamingSettings(min_free_mib=0))
        for _ in range(3):
            assert torch.equal(sample(streamed, "sd15", cfg=1.0), plain)
            alone = streamed.loaded_size()
            assert alone > 0.7 * model.model_size(), "it has not got the card back"
            control = control_of_unet("sd15")
            controlled = controlled_by(control, IMAGE)
            assert torch.equal(sample(streamed, "sd15", controlled, cfg=1.0), expected)
            patcher = control.control_model_wrapped
            assert patcher.loaded_size() == patcher.model_size() > 0.3 * model.model_size()
            assert 0.4 * alone < streamed.loaded_size() <= card.size_bytes - COMPUTE_BYTES - patcher.model_size()
            assert card.most_bytes <= card.size_bytes - COMPUTE_BYTES
            streamed.stream.session.check()
    comfy.model_management.unload_all_models()
