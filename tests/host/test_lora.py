"""LoRAs on a streamed model give what ComfyUI gives with the same LoRAs on the resident one, and are never lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfy.utils import get_attr
from layerstream.streaming.host.locked_patches import FERRY_BYTES
from layerstream.streaming.host.patcher import StreamingModelPatcher

from loras import apply, assert_survives_a_retry, assert_survives_faults, make_lora
from scripts.tiny_models import build_tiny_model
from streamed import assert_same_weights, locks_of, on_simulated_card, stream, weights_of

FAMILIES = ("flux", "zimage")


@pytest.fixture
def card(monkeypatch):
    on_simulated_card(monkeypatch, seed=5)


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_the_node(card, load, sample, family, kept):
    model = load(family, size="tiny")
    plain = sample(model)
    lora = make_lora(model, seed=1)
    expected = sample(apply(model, lora, 0.8))
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(apply(stream(model, kept), lora, 0.8)), expected)
    assert torch.equal(sample(stream(apply(model, lora, 0.8), kept)), expected)
    assert torch.equal(sample(stream(model, kept)), plain)


def growing(layer: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A LoRA that makes a layer take more inputs, so that an image comes in beside the noise."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    return {
        f"diffusion_model.{layer}.lora_up.weight": torch.randn(rows, 4, generator=generator) * 0.1,
        f"diffusion_model.{layer}.lora_down.weight": torch.randn(4, columns, generator=generator) * 0.1,
        f"diffusion_model.{layer}.reshape_weight": torch.tensor(shape),
    }


@pytest.mark.parametrize("is_shelved", [False, True], ids=["", "shelved"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_lora_that_enlarges_the_first_layer(card, load, sample, kept, is_shelved):
    model = load("flux", size="tiny")
    plain, (rows, columns) = sample(model), model.model.diffusion_model.img_in.weight.shape
    lora = growing("img_in", (rows, 2 * columns))
    expected = sample(apply(model, lora, 1.0))
    assert not torch.equal(expected, plain)
    streamed = stream(model, kept)
    if is_shelved:
        streamed.stream.shelve()
    for _ in range(2):
        assert torch.equal(sample(apply(streamed, lora, 1.0)), expected)
        assert torch.equal(sample(streamed), plain)


def test_a_lora_that_enlarges_a_layer_that_streams_is_refused_with_a_remedy(card, load, sample):
    model = load("flux", size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.0)
    with pytest.raises(ValueError, match=r"single_blocks\.1\.linear1\.weight.*set mode to off"):
        sample(apply(streamed, growing("single_blocks.1.linear1", (2048, 512)), 1.0))
    assert torch.equal(sample(streamed), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_that_comes_to_a_model_already_packed(monkeypatch, load, sample, family):
    on_simulated_card(monkeypatch, seed=5, is_packed=True)
    model = load(family, size="tiny")
    plain, lora = sample(model), make_lora(model, seed=1)
    expected = sample(apply(model, lora, 0.8))
    streamed = stream(model, 0.5)
    assert torch.equal(sample(streamed), plain) and streamed.stream.session.is_packed
    assert torch.equal(sample(apply(streamed, lora, 0.8)), expected)
    assert torch.equal(sample(streamed), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_loras_and_a_changed_strength(card, load, sample, family):
    model = load(family, size="tiny")
    before = weights_of(model)
    first, second = make_lora(model, seed=1), make_lora(model, seed=2)
    results = []
    streamed = stream(model, 0.4)
    for strengths in ((1.0, 0.5), (0.3, 0.5), (0.3, -1.0)):
        expected = sample(apply(apply(model, first, strengths[0]), second, strengths[1]))
        results.append(expected)
        patched = apply(apply(streamed, first, strengths[0]), second, strengths[1])
        assert torch.equal(sample(patched), expected)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    patched.detach()
    assert_same_weights(model, before)


def test_two_samplers_with_different_loras_on_one_model(card, load, sample):
    model = load("flux", size="tiny")
    first, second = make_lora(model, seed=1), make_lora(model, seed=2)
    expected = [sample(model), sample(apply(model, first, 1.0)), sample(apply(model, second, 1.0))]
    streamed = stream(model, 0.5)
    branches = [streamed, apply(streamed, first, 1.0), apply(streamed, second, 1.0)]
    for _ in range(2):
        for branch, result in zip(branches, expected, strict=True):
            assert torch.equal(sample(branch), result)


def test_only_blocks_that_a_lora_touches_are_loaded_again(card, load, sample):
    model = load("flux", size="tiny")
    lora = {k: v for k, v in make_lora(model, seed=1).items() if "single_blocks.3." in k}
    assert lora
    streamed = stream(model, 0.5)
    sample(streamed)
    # Held, so that nothing new can lie where something old was.
    before = model.model.diffusion_model.state_dict()
    sample(apply(streamed, lora, 1.0))
    weights = model.model.diffusion_model.state_dict()
    moved = {name for name, tensor in weights.items() if tensor.data_ptr() != before[name].data_ptr()}
    assert moved and all(name.startswith("single_blocks.3.") for name in moved)


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_changed_strength_bakes_what_the_lora_touches_and_locks_buffers_only(load, sample, monkeypatch, is_packed):
    on_simulated_card(monkeypatch, seed=5, is_packed=is_packed)
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = [sample(apply(model, lora, strength)) for strength in (0.5, -0.5)]
    streamed = stream(model, 0.2)
    sample(apply(streamed, lora, 1.0))
    assert streamed.stream.session.is_packed == is_packed
    patcher = StreamingModelPatcher
    baked, locked = [], locks_of(monkeypatch, streamed)
    bake = patcher.patch_weight_to_device
    monkeypatch.setattr(
        patcher, "patch_weight_to_device", lambda *args, **to: (baked.append(args[1]), bake(*args, **to))
    )
    for strength, result in zip((0.5, -0.5), expected, strict=True):
        changed = apply(streamed, lora, strength)
        for _ in range(2):
            assert torch.equal(sample(changed), result)
        assert sorted(baked) == sorted(changed.patches) and set(locked) == {FERRY_BYTES}
        baked.clear()
        locked.clear()
    sample(streamed)
    assert not baked and not locked


def test_weights_are_on_the_card_before_they_are_patched_and_their_backups_are_not(card, load, sample, monkeypatch):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(apply(model, lora, 1.0))
    streamed = stream(model, 0.4)
    plain, before = sample(streamed), weights_of(model)
    session = streamed.stream.session
    homes = {streamed.stream.key(weight.keys[0]): weight for block in session.parts.blocks for weight in block.weights}
    used, bake = [], StreamingModelPatcher.patch_weight_to_device
    held = {tensor.data_ptr() for tensor in lora.values()}

    def holds(patcher, key):
        return {tensor.data_ptr() for tensor in patcher.patches[key][0][1].weights[:2]}

    def note_and_bake(self, key, *args, **options):
        given = get_attr(self.model, key)
        if key in homes:
            assert given.data_ptr() != homes[key].home.data_ptr() == self.backup[key].weight.data_ptr()
            assert holds(self, key).isdisjoint(held), "what the patch holds is on the card too"
            used.append(session.device.used_bytes)
        return bake(self, key, *args, **options)

    monkeypatch.setattr(StreamingModelPatcher, "patch_weight_to_device", note_and_bake)
    patched = apply(streamed, lora, 1.0)
    assert torch.equal(sample(patched), expected) and used
    assert all(holds(patched, key) <= held for key in patched.patches), "but not for good"
    assert torch.equal(sample(streamed), plain)
    streamed.detach()
    assert_same_weights(model, before)


def test_a_lora_survives_out_of_memory_and_interrupt(card, load, sample):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(apply(model, lora, 1.0))
    assert not torch.equal(expected, sample(model))
    patched = apply(stream(model, 0.5), lora, 1.0)
    assert_survives_a_retry(patched, sample, expected)
    assert_survives_faults(patched, sample, expected)


def test_a_lora_survives_running_out_of_memory_while_it_is_baked(card, load, sample, monkeypatch):
    """Anywhere: what is in host memory of a block by then is not all of it."""
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    plain, expected = sample(model), sample(apply(model, lora, 1.0))
    bake, bakes = StreamingModelPatcher.patch_weight_to_device, itertools.count()
    failing: set[int] = set()

    def bake_or_fail(self, *args, **options):
        if next(bakes) in failing:
            raise torch.OutOfMemoryError("while baking")
        return bake(self, *args, **options)

    monkeypatch.setattr(StreamingModelPatcher, "patch_weight_to_device", bake_or_fail)
    gave_up = []
    for turn, number in enumerate(range(1, len(lora) // 2, 5)):
        streamed = stream(build_tiny_model("flux"), 0.2)
        assert torch.equal(sample(streamed), plain)
        at, is_again = next(bakes) + number, turn % 2 == 0
        failing = {at, at + 1} if is_again else {at}
        assert torch.equal(sample(apply(streamed, lora, 1.0)), expected)
        assert next(bakes) > at + 1, "it did not run out of memory"
        gave_up.append((is_again, bool(streamed.streaming_report()["rungs"])))
    assert (True, False) not in gave_up, "it did not run out of memory again"
    assert (False, False) in gave_up, "once is not answered within the load"
