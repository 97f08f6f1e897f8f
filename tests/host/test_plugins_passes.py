"""Packs that wrap or skip passes of a streamed model, and those that clone it and write into its options."""

from __future__ import annotations

import copy

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch

from plugged import assert_equal_streamed, assert_streams_as, sample, stream_all, stream_half
from scripts.division import narrow_units
from scripts.family_matrix import simulated_card
from scripts.tiny_models import build_tiny_model


class EverySecondPass:
    """Gives the last result again at every second call, as caches of TeaCache's kind do."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.calls = 0

    def __call__(self, run):
        self.calls += 1
        if self.last is None or self.calls % 2:
            self.last = run()
            return self.last
        return self.last * 0.9


def cached_by_function_wrapper(model):
    cache = EverySecondPass()

    def wrap(apply_model, args):
        return cache(lambda: apply_model(args["input"], args["timestep"], **args["c"]))

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrap)
    return patched


def cached_by_wrapper(model):
    """Inside a pass: the engine's scope is entered, and no block runs."""
    cache = EverySecondPass()

    def wrap(executor, *args, **kwargs):
        return cache(lambda: executor(*args, **kwargs))

    patched = model.clone()
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "cache", wrap)
    return patched


def cached_by_options(model):
    """A pack that copies the options deeply and writes the wrapper into them by hand."""
    cache = EverySecondPass()

    def wrap(executor, *args, **kwargs):
        return cache(lambda: executor(*args, **kwargs))

    patched = model.clone()
    patched.model_options = copy.deepcopy(patched.model_options)
    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL, "cache", wrap, patched.model_options, is_model_options=True
    )
    return patched


@pytest.mark.parametrize("patch", [cached_by_function_wrapper, cached_by_wrapper, cached_by_options])
def test_skipped_passes(patch):
    assert_equal_streamed("flux", patch, steps=3)


def guided_by_hand(model):
    """A pack that runs the model once more in each step, through ComfyUI's own function, after the guidance."""

    def after(args):
        options = copy.deepcopy(args["model_options"])
        options["transformer_options"]["seen"] = True
        (again,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 0.5 * (args["denoised"] - again)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(after, disable_cfg1_optimization=True)
    return patched


def with_options_of_its_own(model):
    """A pack that writes into the options of a clone what blocks read."""
    patched = model.clone()
    options = copy.deepcopy(patched.model_options)
    options["transformer_options"]["patches"] = {"attn1_output_patch": [lambda states, extra: states * 1.1]}
    patched.model_options = options
    return patched


@pytest.mark.parametrize("patch", [guided_by_hand, with_options_of_its_own])
def test_clones_with_options_of_their_own(patch):
    assert_equal_streamed("sd15", patch)


def test_a_clone_leaves_the_streamed_model_as_it_was():
    """Clones of clones, sampled in turn; none has what was given to another."""
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model("sd15")
        plain = sample(model, "sd15")
        changed = sample(with_options_of_its_own(model), "sd15")
        with simulated_card(0):
            streamed = stream_half(model)
        clone = with_options_of_its_own(streamed.clone())
        for _ in range(2):
            assert_streams_as(clone, changed, "sd15")
            assert_streams_as(streamed, plain, "sd15")
            clone, streamed = clone.clone(), streamed.clone()


def test_a_pass_that_a_wrapper_breaks_off_leaves_the_next_one_right():
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model("flux")
        expected = sample(model, "flux")
        with simulated_card(0):
            streamed = stream_all(model)

        def fail(executor, *args, **kwargs):
            executor(*args, **kwargs)
            raise RuntimeError("by a pack")

        faulty = streamed.clone()
        faulty.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "faulty", fail)
        with pytest.raises(RuntimeError, match="by a pack"):
            sample(faulty, "flux")
        streamed.stream.session.check()
        assert torch.equal(sample(streamed, "flux"), expected)
