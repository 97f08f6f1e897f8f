"""What changes a streamed model's weights, or takes them: merging nodes, scheduled LoRAs, a model as a LoRA."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import comfy.model_management
import pytest
import torch
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import Patching

from loras import apply, make_lora, on_low_memory
from plugged import assert_equal_streamed, assert_streams_as, node, sample, stream_all, stream_half
from scripts.division import narrow_units
from scripts.family_matrix import simulated_card
from scripts.tiny_models import build_tiny_model


def merged(first, second, ratio: float = 0.3):
    return node("nodes_model_merging", "ModelMergeSimple", model1=first, model2=second, ratio=ratio)[0]


def merged_by_blocks(first, second):
    parts = {"input": 0.2, "middle": 0.5, "out": 0.8}
    return node("nodes_model_merging", "ModelMergeBlocks", model1=first, model2=second, **parts)[0]


def with_difference(first, second):
    difference = node("nodes_model_merging", "ModelSubtract", model1=second, model2=first, multiplier=0.5)[0]
    return node("nodes_model_merging", "ModelAdd", model1=first, model2=difference)[0]


@pytest.mark.parametrize(
    ("name", "merge", "how"),
    [
        ("sd15", merged_by_blocks, stream_all),
        ("flux", merged, stream_half),
        ("flux", with_difference, stream_all),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_merge_of_models_of_which_any_is_streamed(name, merge, how):
    """Also of one that was just run, some of whose weights are on the card."""
    with narrow_units(), torch.inference_mode():
        first, second = (build_tiny_model(name, seed=seed) for seed in (0, 1))
        expected, alone = sample(merge(first, second), name), sample(second, name)
        assert not torch.equal(expected, sample(first, name)) and not torch.equal(expected, alone)
        with simulated_card(0):
            streamed = how(second)
            assert_streams_as(merge(how(first), streamed), expected, name)
            assert_streams_as(streamed, alone, name)
            assert_streams_as(how(merge(first, streamed)), expected, name)


def test_a_merge_takes_packed_weights_as_they_were():
    with narrow_units(), torch.inference_mode():
        first, second = (build_tiny_model("flux", seed=seed) for seed in (0, 1))
        expected, alone = sample(merged(first, second), "flux"), sample(second, "flux")
        with simulated_card(1):
            streamed = stream_half(second)
        assert_streams_as(streamed, alone, "flux")
        assert streamed.stream.session.is_packed
        assert torch.equal(sample(merged(first, streamed), "flux"), expected)


def scheduled(hooks):
    """Conditioning with weight hooks of which the strength changes at each step."""
    keyframes = None
    for strength, start in ((1.0, 0.0), (0.4, 0.3), (0.0, 0.6), (-0.5, 0.8)):
        values = {"strength_mult": strength, "start_percent": start, "prev_hook_kf": keyframes}
        (keyframes,) = node("nodes_hooks", "CreateHookKeyframe", **values)
    (hooks,) = node("nodes_hooks", "SetHookKeyframes", hooks=hooks, hook_kf=keyframes)

    def change(positive, negative):
        plain = [[condition.flip(1), entries] for condition, entries in positive]
        hooked = node("nodes_hooks", "SetModelHooksOnCond", conditioning=positive, hooks=hooks)[0]
        return hooked + plain, negative

    return change


@pytest.mark.parametrize(("name", "is_packed"), [("sd15", False), ("flux", True)])
def test_scheduled_loras(name, is_packed):
    """One prompt with a LoRA whose strength changes with the steps, one without, and one more LoRA on the model."""
    with torch.inference_mode():
        model = build_tiny_model(name)
        lora, other = make_lora(model, seed=3), make_lora(model, seed=4)
    change = scheduled(comfy.hooks.create_hook_lora(lora, 1.0, 1.0))
    assert_equal_streamed(name, lambda model: apply(model, other, 0.8), change, steps=4, is_packed=is_packed)


def constant_hooks():
    """Conditioning with weight hooks that never change: ComfyUI changes weights when hooks do, not when they move."""
    with torch.inference_mode():
        hooks = comfy.hooks.create_hook_lora(make_lora(build_tiny_model("flux"), seed=3), 1.0, 1.0)

    def change(*both):
        return tuple(node("nodes_hooks", "SetModelHooksOnCond", conditioning=one, hooks=hooks)[0] for one in both)

    return change


def test_a_scheduled_lora_outlasts_a_plan_made_in_mid_run(monkeypatch):
    passing, freed = StreamingModelPatcher.passing, []

    def passing_under_pressure(self):
        if self.stream.session.meter.passes == 2:
            freed.append(self.partially_unload(self.offload_device, self.loaded_size() // 3))
        return passing(self)

    monkeypatch.setattr(StreamingModelPatcher, "passing", passing_under_pressure)
    assert_equal_streamed("flux", change=constant_hooks(), steps=4)
    assert max(freed) > 0


def test_a_scheduled_lora_comes_back_with_a_model_that_has_left_between_two_steps(monkeypatch):
    prepare_state, left = StreamingModelPatcher.prepare_state, []

    def prepare_after_leaving(self, *args, **kwargs):
        if self.stream.session.meter.passes == 2:
            comfy.model_management.unload_all_models()
            left.append(not self.stream.is_in_place)
        prepare_state(self, *args, **kwargs)

    monkeypatch.setattr(StreamingModelPatcher, "prepare_state", prepare_after_leaving)
    assert_equal_streamed("flux", change=constant_hooks(), steps=4)
    assert left and all(left)


def test_scheduled_loras_beside_one_at_run_time():
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model("flux")
        lora, other = make_lora(model, seed=3), make_lora(model, seed=4)
        change = scheduled(comfy.hooks.create_hook_lora(lora, 1.0, 1.0))
        expected = sample(on_low_memory(apply(model, other, 0.8)), "flux", change, steps=4)
        for how in (stream_all, stream_half):
            with simulated_card(0):
                streamed = how(model)
                streamed.settings = replace(streamed.settings, patching=Patching.RUN_TIME)
                assert_streams_as(apply(streamed, other, 0.8), expected, "flux", change, steps=4)


def test_a_model_as_a_scheduled_lora():
    with torch.inference_mode():
        weights = comfy.hooks.get_patch_weights_from_model(build_tiny_model("flux", seed=1))
    change = scheduled(comfy.hooks.create_hook_model_as_lora(weights, None, 0.6, 0.0))
    assert_equal_streamed("flux", change=change, steps=4)
