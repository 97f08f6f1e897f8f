"""Packs that bring patchers of their own: before the streamed model, after it, and in place of ComfyUI's for all."""

from __future__ import annotations

import importlib
import sys

import comfy.model_patcher
import pytest
import torch

from plugged import assert_streams_as, sample, stream_half
from scripts.division import narrow_units
from scripts.family_matrix import simulated_card
from scripts.pack import load_pack
from scripts.tiny_models import build_tiny_model
from streamed import on_simulated_card

NAME = "sd15"
OTHER_NAME = "layerstream_loaded_later"


class OtherPatcher(comfy.model_patcher.ModelPatcher):
    """Of a pack: knows something that its clones know too, and turns patchers into its own by cloning them."""

    told = "nothing"
    loads = 0

    def clone(self, *args, **kwargs):
        own = self.__class__
        self.__class__ = OtherPatcher
        try:
            clone = super().clone(*args, **kwargs)
        finally:
            self.__class__ = own
        clone.told = getattr(self, "told", "nothing")
        return clone

    def load(self, *args, **kwargs):
        OtherPatcher.loads += 1
        return super().load(*args, **kwargs)


def taken_over(patcher):
    other = OtherPatcher.clone(patcher)
    other.told = "all"
    return other


def test_a_patcher_of_another_pack_is_streamed_and_keeps_what_it_knows():
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = taken_over(build_tiny_model(NAME))
        expected = sample(model, NAME)
        streamed = stream_half(model)
        assert streamed.told == "all"
        for _ in range(2):
            assert_streams_as(streamed, expected, NAME)
            assert torch.equal(sample(model, NAME), expected)


def test_a_pack_that_takes_a_streamed_model_over_runs_it_its_own_way():
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model(NAME)
        expected = sample(model, NAME)
        streamed = stream_half(model)
        other = taken_over(streamed)
        for _ in range(2):
            assert_streams_as(streamed, expected, NAME)
            before = OtherPatcher.loads
            assert torch.equal(sample(other, NAME), expected)
            assert OtherPatcher.loads > before, "it did not load the model itself"


def test_a_subclass_of_the_streamed_patcher_streams():
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model(NAME)
        expected = sample(model, NAME)
        streamed = stream_half(model)
        streamed.__class__ = type("Derived", (type(streamed),), {})
        clone = streamed.clone()
        assert type(clone) is type(streamed)
        assert_streams_as(clone, expected, NAME)


@pytest.mark.parametrize("comes_first", [False, True])
def test_a_pack_that_replaces_comfyuis_patcher_may_be_loaded_before_or_after(monkeypatch, comes_first):
    """Before: our patcher derives from theirs. After: it derives from ComfyUI's and is given theirs."""

    class Replacement(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "ModelPatcher", Replacement)
    name = "layerstream"
    if comes_first:
        name = load_pack(OTHER_NAME).__name__
    try:
        patchers = importlib.import_module(f"{name}.streaming.host.patcher")
        settings = importlib.import_module(f"{name}.streaming.host.settings")
        assert issubclass(patchers.StreamingModelPatcher, Replacement) == comes_first
        on_simulated_card(monkeypatch)
        with narrow_units(), torch.inference_mode():
            model = build_tiny_model(NAME)
            model = Replacement(model.model, model.load_device, model.offload_device)
            expected = sample(model, NAME)
            chosen = settings.StreamingSettings(settings.Mode.ALWAYS, min_free_mib=0)
            assert_streams_as(patchers.StreamingModelPatcher.from_patcher(model, chosen), expected, NAME)
    finally:
        if comes_first:
            for module in [module for module in sys.modules if module.split(".")[0] == OTHER_NAME]:
                del sys.modules[module]
