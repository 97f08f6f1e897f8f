"""torch.compile on a streamed model: nothing is compiled while it streams, and the log says why; else it is."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._dynamo.utils
from comfy_api.torch_helpers import set_torch_compile_wrapper
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import StreamingSettings

from plugged import assert_streams_as, node, sample, stream_all, stream_half
from scripts.division import narrow_units
from scripts.family_matrix import simulated_card
from scripts.tiny_models import build_tiny_model

NAME = "flux"


def compiled(model):
    return node("nodes_torch_compile", "TorchCompileModel", model=model, backend="inductor")[0]


@pytest.mark.parametrize(
    "build",
    [lambda model: stream_half(compiled(model)), lambda model: compiled(stream_all(model))],
    ids=["compiled-then-streamed", "streamed-then-compiled"],
)
def test_a_streamed_model_runs_uncompiled_and_says_so_once(caplog, build):
    torch._dynamo.utils.counters.clear()
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model(NAME)
        expected = sample(model, NAME)
        with simulated_card(0), caplog.at_level(logging.WARNING, "layerstream"):
            streamed = build(model)
            for _ in range(2):
                assert_streams_as(streamed, expected, NAME)
            assert_streams_as(streamed.clone(), expected, NAME)
    assert not torch._dynamo.utils.counters["frames"], "something was compiled"
    said = [record.getMessage() for record in caplog.records if "uncompiled" in record.getMessage()]
    assert len(said) == 1 and "remove the node that compiles it" in said[0]


@pytest.mark.parametrize("order", ["compiled first", "streamed first"])
def test_a_model_that_fits_is_compiled(order):
    """Part of one, because compiling takes long."""
    graphs = []

    def compile_part(model):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        patched = model.clone()
        set_torch_compile_wrapper(patched, backend=backend, keys=["diffusion_model.final_layer"])
        return patched

    def give_streaming(model):
        return StreamingModelPatcher.from_patcher(model, StreamingSettings(min_free_mib=0))

    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model(NAME)
        expected = sample(model, NAME)
        if order == "compiled first":
            fitting = give_streaming(compile_part(model))
        else:
            fitting = compile_part(give_streaming(model))
        assert torch.equal(sample(fitting, NAME), expected)
        assert graphs and fitting.stream.session.plan.is_resident


@pytest.mark.parametrize("order", ["compiled first", "streamed first"])
def test_compiled_blocks_of_a_pack_are_left_out(caplog, order):
    def compile_block(model):
        patched = model.clone()
        place = "diffusion_model.single_blocks.1"
        patched.add_object_patch(place, torch.compile(patched.get_model_object(place)))
        return patched

    torch._dynamo.utils.counters.clear()
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model(NAME)
        expected = sample(model, NAME)
        with caplog.at_level(logging.WARNING, "layerstream"):
            first, then = (compile_block, stream_half) if order == "compiled first" else (stream_half, compile_block)
            streamed = then(first(model))
        assert "`diffusion_model.single_blocks.1` stays uncompiled" in caplog.text
        assert_streams_as(streamed, expected, NAME)
    assert not torch._dynamo.utils.counters["frames"], "something was compiled"
