"""Layer-Stream CLIP: every kind of text encoder streams with equal bits, and all that streams is fetched in time."""

from __future__ import annotations

import logging

import comfy.hooks
import comfy.model_management
import pytest
import torch
from layerstream.nodes.layer_stream_clip import LayerStreamClip
from layerstream.streaming.engine.plan import BudgetTooSmall
from layerstream.streaming.host.devices import SIMULATE_VARIABLE
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import GIB, Mode

from scripts.division import narrow_units
from scripts.tiny_components import ENCODERS, tiny_clip, tokens_for
from streamed import on_simulated_card

DEFAULTS = {"mode": "always", "prefetch_blocks": 0, "vram_gb": 0.0, "min_free_mb": 0}


def run(clip, **inputs):
    with narrow_units():
        return LayerStreamClip.execute(clip, **{**DEFAULTS, **inputs}).args[0]


def encode(clip, name: str, seed: int = 0) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = clip.encode_from_tokens(tokens_for(name, seed), return_pooled=True, return_dict=True)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def clip_of(monkeypatch):
    on_simulated_card(monkeypatch, seed=9)

    def make(name: str, **how):
        with torch.inference_mode():
            return tiny_clip(name, **how)

    yield make
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_streams_with_equal_bits(monkeypatch, clip_of, name, is_packed):
    clip = clip_of(name)
    expected = [encode(clip, name, seed) for seed in (0, 1)]
    on_simulated_card(monkeypatch, seed=9, is_packed=is_packed)
    streamed = run(clip)
    for seed in (0, 1, 0):
        assert equal(encode(streamed, name, seed), expected[seed])
    report = streamed.patcher.streaming_report()
    assert report["blocks"] >= 6 and report["is_packed"] == is_packed
    assert report["unplaced"] == 0 and report["broken_passes"] == 0
    assert report["ring_bytes"] and report["passes"] == 3
    if name != "qwen25_7b":  # has a vision model, which text does not run
        assert report["hits"] + report["misses"] == 3 * report["blocks"], "something that streams is never called"
    assert equal(encode(clip, name), expected[0]), "the encoder without the node works as ever"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes(clip_of, dtype):
    clip = clip_of("t5xxl", dtype=dtype)
    expected = encode(clip, "t5xxl")
    assert equal(encode(run(clip), "t5xxl"), expected)


def test_a_budget_is_kept_and_one_too_small_names_one_that_works(monkeypatch, clip_of):
    on_simulated_card(monkeypatch, seed=77)  # a card of its own, for its peak
    clip = clip_of("qwen3_4b")
    expected = encode(clip, "qwen3_4b")
    size_gib = clip.patcher.model_size() / GIB
    streamed = run(clip, mode="auto", vram_gb=0.98 * size_gib)
    device = streamed.patcher.stream.device
    assert equal(encode(streamed, "qwen3_4b"), expected)
    assert not streamed.patcher.stream.session.plan.is_resident
    assert device.peak_bytes() <= 0.98 * size_gib * GIB
    with pytest.raises(BudgetTooSmall, match="raise the budget to"):
        encode(run(clip, mode="auto", vram_gb=0.1 * size_gib), "qwen3_4b")
    assert equal(encode(streamed, "qwen3_4b"), expected)


def test_the_ring_is_gone_when_encoding_is_done(clip_of):
    clip = clip_of("clip_l")
    streamed = run(clip)
    encode(streamed, "clip_l")
    assert streamed.patcher.stream.session.ring_bytes == 0
    assert streamed.patcher.loaded_size() == streamed.patcher.stream.device.used_bytes


def test_scheduled_hooks_change_streamed_weights(clip_of):
    """As Create Hook LoRA and Set CLIP Hooks do, with one keyframe at half strength."""
    clip = clip_of("clip_l")
    key = next(name for name in clip.get_key_patches() if name.endswith("layers.2.mlp.fc1.weight"))
    change = {key: ("diff", (torch.full(clip.cond_stage_model.state_dict()[key].shape, 0.5),))}

    def hooked(source):
        result = source.clone()
        hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
        hook.need_weight_init = False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        keyframes = comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0))
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.5))
        group.set_keyframes_on_hooks(keyframes)
        result.patcher.add_hook_patches(hook, change)
        result.apply_hooks_to_conds = group
        result.patcher.forced_hooks = group.clone()
        result.use_clip_schedule = True
        result.patcher.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
        result.patcher.register_all_hook_patches(
            group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
        )
        return result

    def schedule(source) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [cond for cond, _ in source.encode_from_tokens_scheduled(tokens_for("clip_l"), show_pbar=False)]

    plain = encode(clip, "clip_l")
    expected = schedule(hooked(clip))
    assert len(expected) == 2 and not torch.equal(*expected)
    streamed = run(clip)
    assert equal(schedule(hooked(streamed)), expected)
    assert equal(encode(streamed, "clip_l"), plain)


def test_a_fault_inside_leaves_the_next_run_right(clip_of):
    clip = clip_of("t5xxl")
    expected = encode(clip, "t5xxl")
    streamed = run(clip)
    encode(streamed, "t5xxl")
    device = streamed.patcher.stream.device
    held = device.used_bytes

    def fail(*_):
        raise torch.OutOfMemoryError("here")

    handle = clip.cond_stage_model.t5xxl.transformer.encoder.block[2].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        encode(streamed, "t5xxl")
    handle.remove()
    assert device.used_bytes == held
    streamed.patcher.stream.session.check()
    assert equal(encode(streamed, "t5xxl"), expected)


def test_a_clone_and_a_set_layer_stream_too(clip_of):
    clip = clip_of("clip_l")
    plain, streamed = clip.clone(), run(clip).clone()
    for one in (plain, streamed):
        one.clip_layer(-2)
    assert isinstance(streamed.patcher, StreamingModelPatcher)
    assert equal(encode(streamed, "clip_l"), encode(plain, "clip_l"))
    again = run(streamed, mode="auto")
    assert again.patcher.settings.mode is Mode.AUTO and again.layer_idx == -2


def test_off_and_bad_input(clip_of):
    clip = clip_of("clip_l")
    assert run(clip, mode="off") is clip
    with pytest.raises(ValueError, match="CLIP loader"):
        run(None)
    with pytest.raises(ValueError, match="between 0 and 8"):
        run(clip, prefetch_blocks=99)


def test_without_a_card_it_passes_through_and_says_so(monkeypatch, clip_of, caplog):
    clip = clip_of("clip_l")
    monkeypatch.delenv(SIMULATE_VARIABLE)
    with caplog.at_level(logging.WARNING, "layerstream"):
        assert run(clip) is clip
    assert "passes through unchanged" in caplog.text


def test_the_schema_is_complete():
    schema = LayerStreamClip.define_schema()
    assert schema.node_id == "LayerStreamClip"
    assert [item.id for item in schema.inputs][:5] == ["clip", "mode", "prefetch_blocks", "vram_gb", "min_free_mb"]
    assert all(item.tooltip for item in schema.inputs)
