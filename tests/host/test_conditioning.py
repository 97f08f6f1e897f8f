"""What conditions a run goes to the card once: only while the model streams, only what would stand in line."""

from __future__ import annotations

import comfy.conds
import comfy.patcher_extension
import pytest
import torch
from layerstream.streaming.host import conditioning
from layerstream.streaming.host.conditioning import STANDING_IN_LINE_BYTES, on_device

from streamed import on_simulated_card, stream

META = torch.device("meta")
LARGE = torch.zeros(STANDING_IN_LINE_BYTES // 4)
SMALL = torch.zeros(STANDING_IN_LINE_BYTES // 4 - 1)


@pytest.mark.parametrize("kind", ["CONDRegular", "CONDCrossAttn", "CONDNoiseShape"])
def test_large_tensors_move_and_small_ones_stay(kind):
    wrap = getattr(comfy.conds, kind)
    cond = {"model_conds": {"large": wrap(LARGE), "small": wrap(SMALL)}, "strength": 0.5}
    moved = on_device(cond, META)
    assert type(moved["model_conds"]["large"]) is wrap
    assert moved["model_conds"]["large"].cond.device == META
    assert moved["model_conds"]["small"].cond is SMALL
    assert moved["strength"] == 0.5
    assert cond["model_conds"]["large"].cond is LARGE, "what a node may use again was changed"


def test_lists_move_and_what_is_no_tensor_stays():
    given = {"latents": comfy.conds.CONDList([LARGE, SMALL]), "count": comfy.conds.CONDConstant(3), "other": object()}
    moved = on_device({"model_conds": given}, META)["model_conds"]
    assert [tensor.device for tensor in moved["latents"].cond] == [META, torch.device("cpu")]
    assert moved["count"].cond == 3
    assert moved["other"] is given["other"]


def test_a_conditioning_that_gives_the_model_nothing_is_left_alone():
    cond = {"control": object()}
    assert on_device(cond, META) is cond


class Seen:
    """The tensors that were brought, and those that the passes of a run were given."""

    def __init__(self, monkeypatch) -> None:
        self.brought: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []
        monkeypatch.setattr(conditioning, "_tensor_on", self._bring)

    def _bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.brought.append(tensor.clone())
        return self.brought[-1]

    def note_pass(self, executor, model, conds, *args):
        for cond in (cond for entries in conds if entries is not None for cond in entries):
            self.given.append(cond["model_conds"]["c_crossattn"].cond)
        return executor(model, conds, *args)

    def watch(self, model):
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "seen", self.note_pass)
        return model


def test_a_streamed_run_brings_it_once_for_all_passes(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    seen, model = Seen(monkeypatch), load("flux", size="tiny")
    expected = sample(load("flux", size="tiny"), steps=3, cfg=2.0)
    assert torch.equal(sample(seen.watch(stream(model, 0.0)), steps=3, cfg=2.0), expected)
    brought = {id(tensor) for tensor in seen.brought}
    assert len(seen.given) == 2 * 3
    assert {id(tensor) for tensor in seen.given} <= brought
    assert len({id(tensor) for tensor in seen.given}) == 2, "it was brought again between passes"


def test_a_model_that_is_on_the_card_leaves_it_to_comfyui(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    seen = Seen(monkeypatch)
    sample(seen.watch(stream(load("flux", size="tiny"), 2.0)))
    assert seen.given
    assert not seen.brought
