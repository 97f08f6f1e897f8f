"""Guided runs: conditional and unconditional in one batch, or one walk for each, whichever moves fewer bytes."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import comfy.model_management
import comfy.sampler_helpers
import comfy_extras.nodes_custom_sampler
import pytest
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from layerstream.streaming.engine.forecast import Forecast
from layerstream.streaming.engine.plan import BudgetTooSmall, Packing, Plan
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.host.families import Family
from layerstream.streaming.host.passes import is_guided
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.planning import choose_plan
from layerstream.streaming.host.settings import GIB, MIB, StreamingSettings
from layerstream.streaming.host.streams import ModelStream, Way

from scripts.tiny_models import build_tiny_model
from streamed import believe_times, on_simulated_card

BLOCKS = 20
CARD_BYTES = 40 * MIB
SETTINGS = StreamingSettings(min_free_mib=0)
ASKS_PATCHER = hasattr(ModelPatcher, "get_free_memory")
"""Whether this ComfyUI asks a model's patcher whether a batch fits."""


@pytest.fixture
def planned(monkeypatch):
    """The stream of a model of 20 blocks of 1 MiB on a card of 40 MiB, of which ComfyUI leaves none free."""
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(BLOCKS)))
    device = SimulatedDevice(CARD_BYTES)
    device.holds_activations = True
    found = ModelStream(model, device, Family("any", list(model.named_children()), True), root="")
    found.open(is_dynamic=False)
    return found


def choose(stream: ModelStream, settings: StreamingSettings = SETTINGS, allowed_bytes: float = math.inf) -> Plan:
    return choose_plan(stream, settings, allowed_bytes, held_bytes=0, packing=Packing.NEVER, unpacked=())


def needing(both_mib: int, single_mib: int) -> tuple[Way, ...]:
    """The ways of a guided run whose batch of both needs one figure besides weights, and each half the other."""
    return Way(1, both_mib * MIB, is_batch=True), Way(2, single_mib * MIB)


def test_one_batch_where_two_walks_would_move_more(planned):
    planned.estimates = needing(both_mib=34, single_mib=27)  # 14 MiB streamed once, or about 9 twice
    assert choose(planned).streamed_bytes > 10 * MIB
    assert planned.budget_bytes == CARD_BYTES - 34 * MIB


def test_two_walks_where_one_batch_would_move_more(planned):
    planned.estimates = needing(both_mib=34, single_mib=24)  # 16 MiB streamed once, or about 6 twice
    assert choose(planned).streamed_bytes < 8 * MIB
    assert planned.budget_bytes == CARD_BYTES - 24 * MIB


def test_two_walks_where_one_batch_leaves_too_little_for_the_model(planned, caplog):
    planned.estimates = needing(both_mib=39, single_mib=30)
    assert choose(planned).device_bytes <= 10 * MIB
    assert planned.budget_bytes == CARD_BYTES - 30 * MIB
    assert not caplog.records


def test_where_no_way_leaves_enough_the_least_is_tried_and_said(planned, caplog):
    planned.estimates = needing(both_mib=40, single_mib=39)
    assert choose(planned) == planned.session.propose(None, prefetch=1, stream_all=True, packing=Packing.NEVER)
    assert "GiB: trying with that" in caplog.text


def test_the_least_is_no_news_where_comfyui_grants_nothing(monkeypatch, planned, caplog):
    monkeypatch.setattr(args, "novram", True)
    assert choose(planned, allowed_bytes=0.1).resident_bytes == 0
    assert not caplog.records


def test_a_figure_of_ones_own_is_taken_as_it_is_and_refused_where_it_is_too_small(planned):
    planned.estimates = needing(both_mib=40, single_mib=39)
    assert choose(planned, StreamingSettings(vram_gib=8 * MIB / GIB, min_free_mib=0)).device_bytes <= 8 * MIB
    assert planned.budget_bytes == 8 * MIB
    with pytest.raises(BudgetTooSmall, match="raise the budget"):
        choose(planned, StreamingSettings(vram_gib=1 * MIB / GIB, min_free_mib=0))


def test_what_comfyui_grants_bounds_every_way_until_a_run_has_shown_what_fits(planned):
    planned.estimates = needing(both_mib=30, single_mib=20)
    choose(planned, allowed_bytes=6 * MIB)
    assert planned.budget_bytes == 6 * MIB
    planned.fitting_bytes, planned.compute_bytes = 12 * MIB, 20 * MIB
    choose(planned, allowed_bytes=6 * MIB)
    assert planned.budget_bytes > 6 * MIB


def test_what_was_seen_to_fit_replaces_the_estimate_where_the_batch_is_not_split(planned):
    """ComfyUI 0.3.75 goes by its estimate alone, so a batch gets the room that it asks for."""
    planned.estimates = needing(both_mib=30, single_mib=29)
    planned.fitting_bytes, planned.compute_bytes = 15 * MIB, 20 * MIB
    planned.batch = planned.whole_batch = 2
    assert planned.is_batch_sure == ASKS_PATCHER
    choose(planned)
    assert planned.budget_bytes == (15 * MIB if ASKS_PATCHER else 10 * MIB)
    planned.batch = 1  # it was split then, so a batch is still ComfyUI's to decide by its estimate
    assert not planned.is_batch_sure
    choose(planned)
    assert planned.budget_bytes == 10 * MIB


def test_what_was_seen_to_fit_does_not_where_more_is_in_the_way_now(planned):
    planned.fitting_bytes, planned.compute_bytes = 15 * MIB, 20 * MIB
    neighbour = planned.device.allocate(8 * MIB)
    choose(planned)
    assert planned.budget_bytes == CARD_BYTES - neighbour.nbytes - 20 * MIB
    choose(planned, StreamingSettings(min_free_mib=3))
    assert planned.budget_bytes == CARD_BYTES - neighbour.nbytes - 20 * MIB - 3 * MIB


@pytest.mark.parametrize(("system", "left_mib"), [("linux", 3), ("win32", 5)])
def test_on_windows_as_much_stays_free_as_comfyui_leaves(monkeypatch, planned, system, left_mib):
    planned.fitting_bytes = 15 * MIB
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 5 * MIB)
    choose(planned, StreamingSettings(min_free_mib=3))
    assert planned.budget_bytes == (15 - left_mib) * MIB
    choose(planned, StreamingSettings(min_free_mib=6))
    assert planned.budget_bytes == 9 * MIB


def without_shortcut(model):
    """As nodes have it that need the result of the negative prompt whatever the scale."""
    model.set_model_sampler_post_cfg_function(lambda values: values["denoised"], disable_cfg1_optimization=True)
    return model


@pytest.mark.parametrize(("cfg", "change", "walks"), [(1.0, None, 1), (4.0, None, 2), (1.0, without_shortcut, 2)])
def test_a_run_is_estimated_in_the_ways_that_it_can_go(monkeypatch, load, sample, cfg, change, walks):
    on_simulated_card(monkeypatch, seed=17)
    streamed = StreamingModelPatcher.from_patcher(load("flux", size="tiny"), SETTINGS)
    monkeypatch.setattr(streamed.stream.device, "holds_activations", True, raising=False)
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (40.0, 25.0))
    sample(change(streamed) if change else streamed, cfg=cfg, steps=1)
    split = (Way(walks, 25),)
    assert streamed.stream.estimates == ((Way(1, 60, is_batch=True), *split) if walks > 1 else split)
    assert streamed.stream.whole_batch == walks


def test_a_run_of_three_prompts_is_guided_whatever_its_scales():
    guider = comfy_extras.nodes_custom_sampler.Guider_DualCFG(build_tiny_model("flux"))
    prompt = [[torch.zeros(1, 1, 1), {}]]
    guider.set_conds(prompt, prompt, prompt)
    guider.set_cfg(3.0, 2.0)
    guider.conds = guider.original_conds  # as it is when sampling begins
    assert is_guided(guider)
    basic = comfy_extras.nodes_custom_sampler.Guider_Basic(build_tiny_model("flux"))
    basic.set_conds(prompt)
    basic.conds = basic.original_conds
    assert not is_guided(basic)


@pytest.mark.skipif(not ASKS_PATCHER, reason="this ComfyUI does not ask the patcher")
def test_halves_that_ran_in_one_batch_do_again_whatever_is_free_and_others_do_not(monkeypatch, load, sample):
    """A plan fills the card beside what compute took, so that by the estimate no batch fits any more."""
    on_simulated_card(monkeypatch, seed=18)
    streamed = StreamingModelPatcher.from_patcher(load("flux", size="tiny"), SETTINGS)
    believe_times(monkeypatch, streamed, 0.7)
    free_bytes = 0.0
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: free_bytes)
    batches: list[int] = []
    streamed.model.diffusion_model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))

    def run(pixels: int) -> list[int]:
        batches.clear()
        sample(streamed, cfg=4.0, steps=4, pixels=pixels)
        assert streamed.stream.fitting_bytes is not None
        return list(batches)

    assert run(96) == [1] * 8 and run(96) == [1] * 8
    free_bytes = math.inf
    assert run(64) == [2] * 4
    free_bytes = 0.0
    assert run(64) == [2] * 4
    assert run(96) == [1] * 8, "another kind of run is estimated for itself"


@pytest.mark.skipif(not ASKS_PATCHER, reason="this ComfyUI does not ask the patcher")
def test_a_batch_that_ran_out_of_memory_is_not_taken_for_one_that_fits(monkeypatch, load, sample):
    on_simulated_card(monkeypatch, seed=19)
    streamed = StreamingModelPatcher.from_patcher(load("flux", size="tiny"), SETTINGS)
    believe_times(monkeypatch, streamed, 0.7)
    free_bytes = itertools.chain([0.0] * 12, [math.inf], itertools.repeat(0.0))
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: next(free_bytes))
    batches: list[int] = []

    def compute(_, args):
        batches.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    streamed.model.diffusion_model.register_forward_pre_hook(compute)
    for _ in range(2):
        sample(streamed, cfg=4.0, steps=4)
    assert streamed.stream.fitting_bytes is not None
    assert batches == [1] * 8 + [1] * 4 + [2] + [1] * 8
    assert streamed.streaming_report()["rungs"] == ["evict"]


@pytest.mark.parametrize(
    ("was_measured", "gain", "is_kept"),
    [(was_measured, *case) for was_measured in (False, True) for case in ((0.01, True), (0.02, False))],
)
def test_a_plan_is_given_up_for_one_that_takes_less_time(monkeypatch, planned, was_measured, gain, is_kept):
    planned.estimates = needing(both_mib=34, single_mib=27)
    present = choose(planned)
    planned.session.load(present)
    planned.load_id = planned.model.current_weight_patches_uuid = object()
    planned.tell_loaded()
    plan = replace(present, link_bytes=present.link_bytes + 1, expected=Forecast(100 * (1 - gain), 50, 0, 60))
    monkeypatch.setattr(planned.session, "propose", lambda *_, **options: plan)
    monkeypatch.setattr(planned.session, "expect", lambda _: Forecast(100, 50, 0, 60))
    planned.session.plan = present = replace(present, expected=Forecast(99, 50, 0, 60) if was_measured else None)
    assert planned.is_in_place
    assert choose(planned) is (present if is_kept else plan)
