"""What plugs into models works on a streamed one: blocks left out, models called twice a step, passes skipped.

Each is ComfyUI's own node, before the streaming node and behind it.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch

from scripts.division import divide, narrow_units
from scripts.family_matrix import ALL_STREAMED, simulated_card, stream
from scripts.tiny_models import build_tiny_model, sample_tiny


class Plugin(NamedTuple):
    """A node of ComfyUI's `comfy_extras` and the model it is tried on."""

    module: str
    node: str
    model: str
    values: dict[str, Any]
    steps: int = 2

    def apply(self, model: Any) -> Any:
        node = getattr(importlib.import_module(f"comfy_extras.{self.module}"), self.node)
        # Nodes of the older kind name their function and are made before they are called.
        run = getattr(node(), node.FUNCTION) if "FUNCTION" in vars(node) else node.execute
        return run(model=model, **self.values)[0]


SKIPPED = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
PLUGINS = (
    Plugin("nodes_slg", "SkipLayerGuidanceDiT", "sd35-medium", {**SKIPPED, "double_layers": "1, 2"}),
    Plugin("nodes_slg", "SkipLayerGuidanceDiT", "flux", {**SKIPPED, "double_layers": "1", "single_layers": "2, 3"}),
    Plugin("nodes_slg", "SkipLayerGuidanceDiT", "wan21-t2v", {**SKIPPED, "double_layers": "1"}),
    Plugin("nodes_pag", "PerturbedAttentionGuidance", "sdxl", {"scale": 3.0}),
    Plugin("nodes_sag", "SelfAttentionGuidance", "sd15", {"scale": 0.5, "blur_sigma": 2.0}),
    Plugin("nodes_freelunch", "FreeU_V2", "sdxl", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    Plugin(
        "nodes_model_downscale",
        "PatchModelAddDownscale",
        "sd15",
        {
            "block_number": 3,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 0.6,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
    ),
    Plugin("nodes_tomesd", "TomePatchModel", "sd15", {"ratio": 0.5}),
    Plugin("nodes_model_advanced", "ModelSamplingSD3", "sd3", {"shift": 5.0}),
    Plugin("nodes_model_advanced", "RescaleCFG", "sdxl", {"multiplier": 0.7}),
    Plugin(
        "nodes_easycache",
        "EasyCacheNode",
        "qwen-image",
        {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
        steps=6,
    ),
)


def stream_all(model: Any) -> Any:
    return stream(model, ALL_STREAMED, divide(model.model.diffusion_model))


@pytest.mark.parametrize("plugin", PLUGINS, ids=[f"{plugin.node}-{plugin.model}" for plugin in PLUGINS])
def test_a_plugin_gives_the_same_bits_on_a_streamed_model(plugin):
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model(plugin.model)
        plain = sample_tiny(model, plugin.model, cfg=4.0, steps=plugin.steps)
        expected = sample_tiny(plugin.apply(model), plugin.model, cfg=4.0, steps=plugin.steps)
        assert expected.isfinite().all()
        assert not torch.equal(expected, plain), "the node did nothing"
        with simulated_card(0):
            for patched in (stream_all(plugin.apply(model)), plugin.apply(stream_all(model))):
                assert torch.equal(sample_tiny(patched, plugin.model, cfg=4.0, steps=plugin.steps), expected)
                assert patched.streaming_report()["broken_passes"] == 0
                patched.stream.session.check()


def test_blocks_left_out_of_some_runs_are_departures_and_no_fault():
    """Chroma's own lists of blocks to leave out; the order is learned anew each time it changes."""
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model("chroma")
        diffusion_model = model.model.diffusion_model
        with simulated_card(1):
            streamed = stream_all(model)
        for double, single in (([], []), ([1], [0, 2]), ([], []), ([0], [])):
            diffusion_model.skip_mmdit, diffusion_model.skip_dit = double, single
            expected = sample_tiny(model, "chroma", steps=3)
            assert torch.equal(sample_tiny(streamed, "chroma", steps=3), expected)
            streamed.stream.session.check()
        assert streamed.streaming_report()["departures"] > 0
