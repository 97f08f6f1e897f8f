"""Models that take turns on one card that does not hold them together: each leaves for the next, none reads again."""

from __future__ import annotations

import importlib

import comfy.model_management
import comfy.sd
import pytest
import torch
from layerstream.streaming.host.budget import Budget
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import StreamingSettings

from plugged import node, sample
from scripts.division import narrow_units
from scripts.model_configurations import MODELS
from scripts.tiny_models import build_tiny_model, conditioning, fill
from shared_card import SharedCard, host_addresses
from streamed import GIB


@pytest.fixture
def narrow():
    with narrow_units(), torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


def automatic(model) -> StreamingModelPatcher:
    return StreamingModelPatcher.from_patcher(model, StreamingSettings(min_free_mib=0))


def stage_a() -> comfy.sd.VAE:
    from comfy.ldm.cascade.stage_a import StageA

    autoencoder = StageA()
    fill(autoencoder, seed=5)
    return comfy.sd.VAE(sd=autoencoder.state_dict())


def cascade(stage_c, stage_b) -> torch.Tensor:
    """Stage C, then stage B with what C gave, as ComfyUI's nodes do it."""
    prior = {"samples": sample(stage_c, "cascade-c")}

    def with_prior(positive, negative):
        values = {"conditioning": positive, "stage_c": prior}
        return node("nodes_stable_cascade", "StableCascade_StageB_Conditioning", **values)[0], negative

    return sample(stage_b, "cascade-b", with_prior)


def experts(high, low) -> torch.Tensor:
    """A high-noise model for the first steps and a low-noise model for the others, as in workflows of WAN 2.2."""
    name = "wan21-t2v"
    generator = torch.Generator().manual_seed(0)
    positive, negative = (conditioning(MODELS[name], generator) for _ in range(2))
    latent = {"samples": torch.zeros(1, *MODELS[name].latent)}
    for model, start, is_first in ((high, 0, True), (low, 2, False)):
        (latent,) = importlib.import_module("nodes").KSamplerAdvanced().sample(
            model, "enable" if is_first else "disable", 0, 4, 4.0, "euler", "simple", positive, negative, latent,
            start, 2 if is_first else 4, "enable" if is_first else "disable",
        )  # fmt: skip
    return latent["samples"]


TURNS = {
    "cascade": (("cascade-c", "cascade-b"), cascade),
    "experts": (("wan21-t2v", "wan21-t2v"), experts),
}


def build(names) -> list:
    return [build_tiny_model(name, seed=seed) for seed, name in enumerate(names)]


@pytest.mark.parametrize(("turn", "share"), [("cascade", 0.8), ("experts", 0.8), ("experts", 1.2)])
def test_two_models_take_turns_on_a_card_that_holds_one(monkeypatch, narrow, turn, share):
    """With less than the smaller one needs, so that both stream, and with more, so that none needs to."""
    names, run = TURNS[turn]
    expected = run(*build(names))
    sizes = [model.model_size() for model in build(names)]
    card = SharedCard(monkeypatch, int(share * (min(sizes) if share < 1 else max(sizes))))
    first, second = (automatic(model) for model in build(names))
    copied_bytes = card.device.copied_bytes
    for prompt in range(3):
        assert torch.equal(run(first, second), expected)
        assert first.loaded_size() + second.loaded_size() == card.used_bytes <= card.size_bytes
        assert second.loaded_size() > 0.5 * min(card.size_bytes, sizes[1]), "the second has not got the card"
        if prompt == 1:
            kept = host_addresses(first), host_addresses(second), card.device.locked_bytes
    assert card.most_bytes <= card.size_bytes
    assert (host_addresses(first), host_addresses(second), card.device.locked_bytes) == kept
    assert (card.device.copied_bytes > copied_bytes) == (share < 1)
    for streamed in (first, second):
        streamed.stream.session.check()


def test_both_stages_are_gone_before_stage_a_decodes(monkeypatch, narrow):
    names, run = TURNS["cascade"]
    card = SharedCard(monkeypatch, 12 * 1024**2)
    first, second = (automatic(model) for model in build(names))
    latent = run(first, second)
    assert second.loaded_size() > 0
    vae = stage_a()
    vae.decode(latent)
    assert first.loaded_size() == second.loaded_size() == card.device.used_bytes == 0
    assert torch.equal(run(first, second), latent)


@pytest.mark.parametrize("turn", TURNS)
def test_one_budget_is_for_both(monkeypatch, narrow, turn):
    """Together they never take more, though the card has room for both."""
    names, run = TURNS[turn]
    expected = run(*build(names))
    card = SharedCard(monkeypatch, 1024**3)
    budget_bytes = int(0.7 * min(model.model_size() for model in build(names)))
    settings = StreamingSettings(min_free_mib=0, budget=Budget(vram_gib=budget_bytes / GIB, min_free_mib=0))
    first, second = (StreamingModelPatcher.from_patcher(model, settings) for model in build(names))
    for _ in range(2):
        assert torch.equal(run(first, second), expected)
        assert card.most_bytes <= budget_bytes
        assert second.loaded_size() > 0.8 * budget_bytes, "the second has not got the budget"
