"""A run is measured, planned anew once between two steps, and keeps its bits whatever comes of it."""

from __future__ import annotations

import comfy.sampler_helpers
import pytest
import torch
from layerstream.streaming.engine.plan import Packing
from layerstream.streaming.host import patcher
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import Mode, StreamingSettings
from layerstream.streaming.host.streams import MOST_SHAPES

from streamed import believe_times, on_simulated_card

STEPS = 7


@pytest.fixture
def timed_card(monkeypatch):
    """A simulated card whose times are believed and whose link is slow, with room for a share of a model."""
    on_simulated_card(monkeypatch, is_packed=True)

    def give(model, share: float, packing: Packing) -> StreamingModelPatcher:
        settings = StreamingSettings(Mode.AUTO, min_free_mib=0, packing=packing)
        streamed = StreamingModelPatcher.from_patcher(model, settings)
        believe_times(monkeypatch, streamed, share)
        monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (0, 0))
        return streamed

    return give


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("family", ["zimage", "flux"])
def test_a_run_is_planned_anew_once_and_equal(monkeypatch, load, sample, timed_card, family, packing):
    model = load(family, size="tiny")
    expected = sample(model, steps=STEPS)
    streamed = timed_card(model, 0.6, packing)
    replan, replanned = StreamingModelPatcher.replan, []
    monkeypatch.setattr(StreamingModelPatcher, "replan", lambda self: (replanned.append(self), replan(self)))
    assert torch.equal(sample(streamed, steps=STEPS), expected)
    session = streamed.stream.session
    assert 1 <= len(replanned) <= 2 and session.expect(session.plan) is not None
    assert streamed.stream.fitting_bytes is not None
    assert session.device_bytes <= 0.6 * streamed.model_size()
    assert torch.equal(sample(streamed, steps=STEPS), expected)
    session.check()
    assert torch.equal(sample(model, steps=STEPS), expected)


@pytest.mark.parametrize("packing", [Packing.AUTO, Packing.ALWAYS])
def test_a_packer_that_does_not_work_is_found_out_when_it_is_wanted(monkeypatch, load, sample, timed_card, packing):
    model = load("flux", size="tiny")
    expected = sample(model, steps=STEPS)
    streamed = timed_card(model, 0.6, packing)
    stream, was_timed = streamed.stream, []
    monkeypatch.setattr(
        stream.device.packer, "works", lambda dtype: was_timed.append(stream.is_open and stream.session.is_timed)
    )
    assert torch.equal(sample(streamed, steps=STEPS), expected)
    assert was_timed == [False] if packing is Packing.ALWAYS else all(was_timed)
    assert not stream.session.is_packed and stream.fitting_bytes is not None
    asked = stream.settings
    sample(streamed, steps=1, pixels=64)  # of which no times are known
    assert stream.settings == asked


def test_what_fits_is_measured_for_each_shape(load, sample, timed_card):
    streamed = timed_card(load("zimage", size="tiny"), 0.6, Packing.NEVER)
    for pixels in (64, 128, 64):
        sample(streamed, steps=STEPS, pixels=pixels)
        assert streamed.stream.fitting_bytes is not None, pixels
        assert streamed.stream.session.expect(streamed.stream.session.plan) is not None


def test_what_a_shape_has_shown_is_known_when_it_comes_again(monkeypatch, load, sample, timed_card):
    model = load("zimage", size="tiny")
    streamed = timed_card(model, 0.6, Packing.NEVER)
    stream, known = streamed.stream, []
    choose = patcher.choose_plan

    def choose_and_note(stream, *args):
        known.append((stream.session.is_timed, stream.fitting_bytes))
        return choose(stream, *args)

    monkeypatch.setattr(patcher, "choose_plan", choose_and_note)
    shown = {}
    for pixels in (64, 128):
        known.clear()
        sample(streamed, steps=STEPS, pixels=pixels)
        assert known[0] == (False, None), "what the other shape has shown does not hold for this one"
        shown[pixels] = stream.session.times, stream.fitting_bytes
    assert shown[64][0] is not shown[128][0]
    for pixels in (64, 128):
        known.clear()
        sample(streamed, steps=1, pixels=pixels)  # too short to be measured
        assert known[0] == (True, shown[pixels][1])
        assert stream.session.times is shown[pixels][0]
    stream.forget_measured()
    for pixels in (64, 128):
        known.clear()
        sample(streamed, steps=1, pixels=pixels)
        assert known[0] == (False, None)


def test_no_more_shapes_are_remembered_than_a_person_may_use(load, sample, timed_card):
    streamed = timed_card(load("zimage", size="tiny"), 0.6, Packing.NEVER)
    sample(streamed, steps=STEPS, pixels=64)
    stream = streamed.stream
    first = stream.shape
    for shape in range(3 * MOST_SHAPES):
        stream.begin_run(shape)
        if shape % 2:
            stream.begin_run(first)
            assert stream.session.times is not None and stream.fitting_bytes is not None
        assert len(stream.measured) <= MOST_SHAPES
    for shape in range(MOST_SHAPES):
        stream.begin_run(-1 - shape)
    stream.begin_run(first)
    assert stream.session.times is not None, "the oldest one that is known does not make way as it comes"
    for shape in range(MOST_SHAPES + 1):
        stream.begin_run(-1 - shape)
    stream.begin_run(first)
    assert stream.session.times is None and stream.fitting_bytes is None


def test_a_plan_that_takes_more_than_thought_gives_it_back_at_once(monkeypatch, load, sample, timed_card):
    model = load("flux", size="tiny")
    expected = sample(model, steps=STEPS)
    streamed = timed_card(model, 0.6, Packing.NEVER)
    device, stream = streamed.stream.device, streamed.stream
    monkeypatch.setattr(device, "unused_bytes", lambda: device.free_bytes() - lost)
    lost = 0
    replan = StreamingModelPatcher.replan
    before = []

    def lose_and_replan(self):
        nonlocal lost
        lost = int(0.1 * streamed.model_size())  # as holes in the allocator would
        before.append(stream.session.plan.device_bytes)
        other = stream.session.propose(before[0], prefetch=2, packing=Packing.NEVER)
        monkeypatch.setattr(patcher, "choose_plan", lambda *_: other)
        replan(self)

    monkeypatch.setattr(StreamingModelPatcher, "replan", lose_and_replan)
    assert torch.equal(sample(streamed, steps=STEPS), expected)
    assert before and stream.session.device_bytes <= before[0] - lost / 2
