"""Stages: who is on the card in each stage of each mode, with equal results and no move that was not needed."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from layerstream.streaming.engine.session import Session
from layerstream.streaming.host.budget import Budget
from layerstream.streaming.host.govern import govern
from layerstream.streaming.host.leaving import make_leave
from layerstream.streaming.host.policy import PolicySettings
from layerstream.streaming.host.settings import GIB

from governed import Results, Workflow, governed, held_bytes, make_parts
from streamed import on_simulated_card

MODES = ("cond_only", "cond_diffusion", "aggressive", "layer_streaming", "auto")
MODEL, CLIP, VAE = "model", "clip", "vae"

# What the policy has on the card after each stage of text encode, image encode, sampling, decode and text encode.
# A part that a mode does not move is ComfyUI's and not counted.
ON_CARD = {
    "cond_only": ({CLIP}, set(), set(), set(), {CLIP}),
    "cond_diffusion": ({CLIP}, set(), {MODEL}, set(), {CLIP}),
    "aggressive": ({CLIP}, set(), set(), set(), {CLIP}),
    "layer_streaming": ({CLIP}, set(), {MODEL}, set(), {CLIP}),
    "auto": ({CLIP}, {CLIP, VAE}, {MODEL, CLIP, VAE}, {MODEL, CLIP, VAE}, {MODEL, CLIP, VAE}),
}


def equal(first: Results, second: Results) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def parts(monkeypatch, load):
    on_simulated_card(monkeypatch, seed=5)
    return make_parts(load)


@pytest.fixture
def expected(parts, sample):
    """What the workflow makes when all of it is ComfyUI's."""
    return Workflow(parts, sample).run()


@pytest.mark.parametrize("mode", MODES)
def test_who_is_on_the_card_after_each_stage(parts, sample, mode):
    workflow = governed(parts, sample, mode=mode)
    stages = (workflow.encode, workflow.encode_image, workflow.sample, workflow.decode, workflow.encode)
    seen = []
    for stage in stages:
        stage()
        seen.append(workflow.on_card())
    assert tuple(seen) == ON_CARD[mode]


@pytest.mark.parametrize("mode", MODES)
def test_the_text_encoder_is_gone_before_the_first_step_and_results_are_equal(parts, expected, sample, mode):
    workflow = governed(parts, sample, mode=mode)
    seen = []
    handle = parts.model.model.diffusion_model.register_forward_pre_hook(lambda *_: seen.append(workflow.on_card()))
    first, second = workflow.run(), workflow.run()
    handle.remove()
    assert equal(first, expected) and equal(second, expected)
    assert seen and all((CLIP in names) == (mode == "auto") for names in seen)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_where_it_must_be_does_not_move(parts, sample, mode):
    workflow = governed(parts, sample, mode=mode)
    workflow.encode(0)
    moves = workflow.clip.patcher.stream.moves
    workflow.encode(1), workflow.encode(2)
    assert (moves.first.count, moves.returns.count, moves.departures.count) == (1, 0, 0)
    workflow.run()
    before = moves.returns.count, moves.departures.count
    workflow.sample()
    workflow.decode(), workflow.decode()
    workflow.sample()
    assert (moves.returns.count, moves.departures.count) == before, "the text encoder was not needed"


def test_each_departure_is_one_return(parts, sample):
    workflow = governed(parts, sample, mode="cond_diffusion")
    for _ in range(4):
        workflow.run()
    for patcher in (workflow.clip.patcher, workflow.model):
        moves = patcher.stream.moves
        assert (moves.first.count, moves.returns.count, moves.departures.count) == (1, 3, 4)
        assert moves.returns.bytes == 3 * moves.first.bytes == 3 / 4 * moves.departures.bytes


def test_what_left_keeps_its_pages_locked_and_is_in_memory_once(parts, sample):
    workflow = governed(parts, sample, mode="cond_diffusion")
    workflow.run()
    device = workflow.model.stream.device
    locked = device.locked_bytes
    assert locked >= 0.9 * (workflow.model.model_size() + workflow.clip.patcher.model_size())
    homes = {name: tensor.data_ptr() for name, tensor in parts.clip.cond_stage_model.state_dict().items()}
    workflow.run()
    assert device.locked_bytes == locked, "locked again"
    workflow.sample()
    assert held_bytes(workflow.clip.patcher) == 0
    assert {name: tensor.data_ptr() for name, tensor in parts.clip.cond_stage_model.state_dict().items()} == homes


def test_parts_that_have_room_beside_each_other_lock_no_pages_until_one_leaves(parts, expected, sample):
    workflow = governed(parts, sample, mode="auto")
    device = workflow.model.stream.device
    assert equal(workflow.run(), expected)
    assert workflow.on_card() == {MODEL, CLIP, VAE}
    assert device.locked_bytes == 0
    clip_bytes = held_bytes(workflow.clip.patcher)
    assert make_leave(workflow.clip.patcher.stream, None) == clip_bytes
    assert equal(workflow.run(), expected)
    locked = device.locked_bytes
    assert 0.9 * clip_bytes <= locked <= workflow.clip.patcher.model_size(), "of another part too, or of none"
    make_leave(workflow.clip.patcher.stream, None)
    assert equal(workflow.run(), expected)
    assert device.locked_bytes == locked, "locked again"


def test_parts_that_stay_are_neither_planned_for_nor_loaded_again(monkeypatch, parts, expected, sample):
    workflow = governed(parts, sample, mode="auto")
    workflow.run()
    for name in ("propose", "_load_blocks"):
        monkeypatch.setattr(Session, name, lambda *args, **kwargs: pytest.fail("not needed"))
    assert equal(workflow.run(), expected)


@pytest.mark.parametrize("bound", ["card", "budget"])
@pytest.mark.parametrize(("share", "is_shelved"), [(1.1, False), (0.9, True)], ids=["room for all", "not for all"])
def test_parts_that_have_no_room_beside_each_other_keep_copies_at_once(
    monkeypatch, parts, sample, bound, share, is_shelved
):
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 0)
    patchers = (parts.model, parts.clip.patcher, parts.vae.patcher)
    room_gib = share * sum(patcher.model_size() for patcher in patchers) / GIB
    if bound == "card":
        on_simulated_card(monkeypatch, size_gib=room_gib)
    budget = Budget(vram_gib=room_gib) if bound == "budget" else None
    workflow = Workflow(govern(parts, PolicySettings(mode="auto"), budget), sample)
    streams = [patcher.stream for patcher in (workflow.model, workflow.clip.patcher, workflow.vae.patcher)]
    assert [stream.is_shelved for stream in streams] == [is_shelved] * 3


def test_two_sampler_passes_and_a_second_model(parts, load, sample):
    with torch.inference_mode():
        second = load("zimage", size="tiny")
    expected = sample(second)
    workflow = governed(parts, sample, mode="cond_diffusion")
    refiner = governed(parts._replace(model=second), sample, mode="cond_diffusion")
    workflow.encode()
    first = workflow.sample()
    assert torch.equal(workflow.sample(), first)
    moves = workflow.model.stream.moves
    assert (moves.first.count, moves.returns.count, moves.departures.count) == (1, 0, 0)
    assert torch.equal(refiner.sample(), expected)
    assert refiner.on_card() == {MODEL} and held_bytes(workflow.model) == 0


def test_a_lora_after_the_policy_stays_governed(parts, expected, sample):
    workflow = governed(parts, sample, mode="cond_diffusion")
    clip, model = workflow.clip.clone(), workflow.model.clone()
    key = next(name for name in clip.get_key_patches() if name.endswith("layers.0.mlp.fc1.weight"))
    shape = parts.clip.cond_stage_model.state_dict()[key].shape
    clip.add_patches({key: ("diff", (torch.full(shape, 0.5),))}, 1.0)
    patched = Workflow(parts._replace(clip=clip, model=model), sample)
    first = patched.encode()
    assert not torch.equal(first, expected.positive)
    patched.sample()
    assert patched.on_card() == {MODEL}
    assert torch.equal(patched.encode(), first)
    assert patched.clip.patcher.stream.moves.returns.bytes == patched.clip.patcher.stream.moves.first.bytes
    assert torch.equal(workflow.encode(), expected.positive)
