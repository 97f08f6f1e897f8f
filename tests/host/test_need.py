"""What a stage needs beside weights is measured once, and then is what plans leave and what others make way for."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from layerstream.streaming.host import estimate, need
from layerstream.streaming.host.need import Need
from layerstream.streaming.host.settings import Mode, StreamingSettings
from layerstream.streaming.host.staged import streamed_text

from governed import ENCODER, governed, make_parts
from scripts.division import narrow_units
from scripts.tiny_components import tokens_for
from streamed import on_simulated_card

MIB = 1024**2


class Cache:
    """What an allocator holds unused on a simulated card that computing takes memory of, like a real one."""

    def __init__(self, monkeypatch, device) -> None:
        self.bytes = 0
        self.left: list[int] = []
        """What was on the card whenever the cache was given back."""
        self._device = device
        monkeypatch.setattr(device, "holds_activations", True, raising=False)
        monkeypatch.setattr(device, "unused_bytes", lambda: device.free_bytes() - self.bytes)
        monkeypatch.setattr(device, "trim", self._trim)

    def _trim(self) -> None:
        self.bytes = 0
        self.left.append(self._device.used_bytes)

    def grow_in(self, module: torch.nn.Module, size_bytes: int) -> None:
        """Have a module's forward leave `size_bytes` behind."""
        module.register_forward_hook(lambda *_: setattr(self, "bytes", max(self.bytes, size_bytes)))


@pytest.fixture
def parts(monkeypatch, load):
    on_simulated_card(monkeypatch, seed=81)
    yield make_parts(load)
    comfy.model_management.unload_all_models()


def test_it_is_measured_once_for_each_larger_amount(parts, sample, monkeypatch):
    patcher = governed(parts, sample, mode="auto").model
    cache = Cache(monkeypatch, patcher.stream.device)
    model = patcher.model
    first, smaller, larger = (Need(model, "work", lambda: 7, amount) for amount in (20, 10, 30))
    assert first.bytes() == 7 and not first.is_measured
    cache.bytes = 900  # what was there before is given back, and not counted
    with first.measuring(patcher):
        cache.bytes += 500
    assert cache.bytes == 0, "given back, for whoever comes next"
    assert first.bytes() == smaller.bytes() == larger.bytes() == 500
    assert first.is_measured and smaller.is_measured and not larger.is_measured
    trims = len(cache.left)
    with smaller.measuring(patcher):
        cache.bytes += 5000
    assert len(cache.left) == trims and smaller.bytes() == 500
    with pytest.raises(torch.OutOfMemoryError), larger.measuring(patcher):
        cache.bytes = 6000
        raise torch.OutOfMemoryError("no")
    assert not larger.is_measured and larger.bytes() == 500
    with larger.measuring(patcher):
        cache.bytes = 300
    assert larger.is_measured and larger.bytes() == 500, "never less than what a smaller amount took"
    assert Need(model, "other work", lambda: 7).bytes() == 7
    assert first.with_margin() == 550 + need.MARGIN_BYTES


def test_a_text_encoder_leaves_what_encoding_was_seen_to_need(parts, monkeypatch):
    clip, taken_bytes = parts.clip, 4 * MIB
    monkeypatch.setattr(need, "MARGIN_BYTES", 0)
    with torch.inference_mode():
        expected = clip.encode_from_tokens(tokens_for(ENCODER))
        with narrow_units():
            streamed = streamed_text(clip, StreamingSettings(Mode.AUTO, min_free_mib=0))
        stream = streamed.patcher.stream
        cache = Cache(monkeypatch, stream.device)
        cache.grow_in(clip.cond_stage_model.clip_l.transformer, taken_bytes)
        size_bytes = streamed.patcher.model_size()
        free_bytes = size_bytes + taken_bytes // 2
        monkeypatch.setattr(stream.device, "free_bytes", lambda: free_bytes - stream.device.used_bytes)
        assert torch.equal(streamed.encode_from_tokens(tokens_for(ENCODER)), expected)
        assert stream.held_bytes >= size_bytes, "nothing is known of the first one"
        for seed in (1, 2):
            cache.left.clear()
            streamed.encode_from_tokens(tokens_for(ENCODER, seed))
            assert (0 in cache.left) == (seed == 1), "what stays is brought anew where less stays, and only there"
            left_bytes = free_bytes - stream.session.plan.device_bytes
            assert left_bytes >= 1.1 * taken_bytes
            assert 0 < stream.held_bytes < size_bytes
        assert torch.equal(streamed.encode_from_tokens(tokens_for(ENCODER)), expected)


@pytest.mark.parametrize("images", [1, 2], ids=["one", "several"])
def test_comfyui_makes_room_for_what_one_image_was_seen_to_need(parts, sample, monkeypatch, images):
    samples = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    taken_bytes = 3 * MIB
    monkeypatch.setattr(need, "MARGIN_BYTES", MIB)
    asked = []
    load = comfy.model_management.load_models_gpu

    def note(models, memory_required=0, **how):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **how)

    with torch.inference_mode():
        expected = parts.vae.decode(samples)
        workflow = governed(parts, sample, mode="auto")
        cache = Cache(monkeypatch, workflow.vae.patcher.stream.device)
        cache.grow_in(parts.vae.first_stage_model.decoder, taken_bytes)
        formula = estimate.decode_bytes(workflow.vae, samples)
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
        assert torch.equal(workflow.vae.decode(samples), expected)
        assert set(map(int, asked)) == {formula}
        asked.clear()
        assert torch.equal(workflow.vae.decode(samples), expected)
        assert asked == [int(1.1 * taken_bytes) + MIB] if images == 1 else set(map(int, asked)) == {formula}
        assert int(workflow.vae.memory_used_decode(samples.shape, workflow.vae.vae_dtype)) == formula
