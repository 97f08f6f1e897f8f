"""A LoRA on model and text encoder under one Offload Policy and one VRAM Budget, prompt after prompt: equal bits."""

from __future__ import annotations

import itertools

import comfy.model_management
import comfy.sd
import pytest
import torch
from layerstream.nodes.offload_policy import OffloadPolicy
from layerstream.nodes.vram_budget import VramBudget
from layerstream.streaming.host.devices import device_for
from layerstream.streaming.host.govern import Parts
from layerstream.streaming.host.settings import GIB

from governed import Workflow, make_parts
from loras import make_lora, make_text_lora
from scripts.division import narrow_units
from streamed import assert_same_weights, on_simulated_card, weights_of
from test_offload_policy import DEFAULTS
from test_stages import equal

SEEDS = itertools.count(3000)


def with_lora(parts: Parts, lora: dict[str, torch.Tensor], strength: float, text_strength: float) -> Parts:
    """As the node LoraLoader does."""
    model, clip = comfy.sd.load_lora_for_models(parts.model, parts.clip, lora, strength, text_strength)
    return parts._replace(model=model, clip=clip)


@pytest.mark.parametrize(
    ("mode", "share"),
    [("auto", 1.2), ("aggressive", 1.2), ("auto", 0.85), ("cond_diffusion", 0.85), ("layer_streaming", 0.85)],
)
def test_prompts_with_one_lora_another_strength_and_none(monkeypatch, load, sample, mode, share):
    # A card of its own, for its peak.
    on_simulated_card(monkeypatch, seed=next(SEEDS))
    device = device_for(torch.device("cpu"))
    parts = make_parts(load)
    lora = make_lora(parts.model, seed=1) | make_text_lora(parts.clip, seed=1)
    patchers = (parts.model, parts.clip.patcher)
    before = [weights_of(patcher) for patcher in patchers]
    plain = Workflow(parts, sample).run()
    strengths = ((0.8, 0.5), (0.8, -0.5))
    expected = [Workflow(with_lora(parts, lora, *pair), sample).run() for pair in strengths]
    assert not any(torch.equal(*pair) for pair in zip(expected[0][:3], plain[:3], strict=True))
    assert not torch.equal(expected[0].positive, expected[1].positive)
    budget_gib = share * parts.model.model_size() / GIB
    budget = VramBudget.execute(vram_gb=budget_gib, min_free_mb=0, ram_gb=0.0, hard_limit=False).args[0]

    def govern(given: Parts) -> Parts:
        with narrow_units():
            return Parts(*OffloadPolicy.execute(**{**DEFAULTS, "mode": mode}, **given._asdict(), budget=budget).args)

    governed = govern(parts)
    first, changed = (Workflow(with_lora(governed, lora, *pair), sample) for pair in strengths)
    streams, is_resident = (first.model.stream, first.clip.patcher.stream), []
    watched = (parts.model.model.diffusion_model, parts.clip.cond_stage_model.clip_l)
    handles = [
        module.register_forward_pre_hook(lambda *_, it=stream: is_resident.append(it.session.plan.is_resident))
        for module, stream in zip(watched, streams, strict=True)
    ]
    assert equal(first.run(), expected[0]) and equal(first.run(), expected[0])
    for handle in handles:
        handle.remove()
    assert set(is_resident) == {share > 1} and len(is_resident) == 2 * (2 + 2)
    assert equal(changed.run(), expected[1]) and equal(first.run(), expected[0])
    assert equal(Workflow(governed, sample).run(), plain)
    assert equal(Workflow(govern(with_lora(parts, lora, *strengths[0])), sample).run(), expected[0])
    assert device.peak_bytes() <= budget_gib * GIB
    comfy.model_management.unload_all_models()
    for patcher, weights in zip(patchers, before, strict=True):
        assert_same_weights(patcher, weights)
