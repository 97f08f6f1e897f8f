"""Patches with weights of their own, as IP-Adapter packs make them: called between the layers of a streamed block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from plugged import assert_equal_streamed, node
from scripts.model_configurations import MODELS

IMAGE_TOKENS = 4
IMAGE_WIDTH = 32


class ImageTokens:
    """Image tokens with a projection to each width that a model's blocks have."""

    def __init__(self) -> None:
        self.tokens = self._values((IMAGE_TOKENS, IMAGE_WIDTH))
        self.projections: dict[int, torch.Tensor] = {}

    def _values(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) / math.sqrt(shape[-1])

    def like(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens as wide as `states`, once a batch item."""
        width = states.shape[-1]
        if width not in self.projections:
            self.projections[width] = self._values((width, IMAGE_WIDTH))
        tokens = torch.nn.functional.linear(self.tokens, self.projections[width])
        return tokens.to(states).expand(states.shape[0], -1, -1)


class Patch:
    """What packs give ComfyUI: a callable with a `to`, through which ComfyUI moves its weights to the card."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.tokens = ImageTokens()
        self.call = call
        self.moved = 0

    def __call__(self, *args: Any) -> Any:
        return self.call(self.tokens, *args)

    def to(self, device_or_dtype: Any) -> Patch:
        self.moved += 1
        if isinstance(device_or_dtype, torch.device):
            self.tokens.tokens = self.tokens.tokens.to(device_or_dtype)
        return self


def attend_to_both(tokens, query, key, value, options):
    image, heads = tokens.like(query), options["n_heads"]
    return optimized_attention(query, key, value, heads) + optimized_attention(query, image, image, heads)


def lengthen(tokens, query, key, value, options):
    image = tokens.like(key)
    return query, torch.cat((key, image), dim=1), torch.cat((value, image), dim=1)


def add_to_output(tokens, states, options):
    return states + tokens.like(states).mean(1, keepdim=True)


def test_replaced_attention():
    replacement = Patch(attend_to_both)

    def patch(model):
        patched = model.clone()
        for block, number in (("input", 4), ("input", 7), ("middle", 0), ("output", 3), ("output", 5)):
            patched.set_model_attn2_replace(replacement, block, number)
        patched.set_model_attn1_replace(replacement, "input", 5, 0)
        return patched

    assert_equal_streamed("sd15", patch)
    assert replacement.moved > 0


def test_patched_attention():
    def patch(model):
        patched = model.clone()
        patched.set_model_attn1_patch(Patch(lengthen))
        patched.set_model_attn2_patch(Patch(lengthen))
        patched.set_model_attn2_output_patch(Patch(add_to_output))
        return patched

    assert_equal_streamed("sdxl", patch)


def add_image(tokens, args, original):
    out = original["original_block"](args)
    return {**out, "img": out["img"] + tokens.like(out["img"]).mean(1, keepdim=True)}


def leave_out(tokens, args, original):
    return {key: args[key] for key in ("img", "txt") if key in args}


def run_twice(tokens, args, original):
    return original["original_block"]({**args, **original["original_block"](args)})


@pytest.mark.parametrize(
    ("name", "single_blocks"),
    [("flux", 4), ("flux2", 2), ("sd3", 0), ("wan21-t2v", 0)],
)
def test_replaced_blocks(name, single_blocks):
    """Blocks with something added, left out and run twice; a departure from the order is no fault."""
    calls = [add_image, run_twice] if name == "flux2" else [add_image, leave_out, run_twice]

    def patch(model):
        patched = model.clone()
        for index, call in enumerate(calls):
            patched.set_model_patch_replace(Patch(call), "dit", "double_block", index)
        for index in range(min(single_blocks, len(calls))):
            patched.set_model_patch_replace(Patch(calls[index]), "dit", "single_block", index)
        return patched

    assert_equal_streamed(name, patch)


def test_patches_between_blocks():
    def between(tokens, args):
        return {**args, "img": args["img"] + 0.1 * tokens.like(args["img"]).mean(1, keepdim=True)}

    def patch(model):
        patched = model.clone()
        patched.set_model_double_block_patch(Patch(between))
        return patched

    assert_equal_streamed("qwen-image", patch)


def test_hypernetwork(tmp_path, monkeypatch):
    """ComfyUI's own node, with a file of the published form."""
    import folder_paths

    generator = torch.Generator().manual_seed(2)
    widths = {MODELS["sd15"].narrow["model_channels"] * factor for factor in (1, 2, 4)}
    layers = {
        width: [
            {
                f"linear.{index}.{kind}": torch.randn(*shape, generator=generator) * 0.05
                for index, shapes in enumerate((((2 * width, width), (2 * width,)), ((width, 2 * width), (width,))))
                for kind, shape in zip(("weight", "bias"), shapes, strict=True)
            }
            for _ in range(2)
        ]
        for width in widths
    }
    path = tmp_path / "hyper.pt"
    torch.save({**layers, "activation_func": "relu"}, path)
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: str(path))

    def patch(model):
        return node("nodes_hypernetwork", "HypernetworkLoader", model=model, hypernetwork_name="x", strength=0.7)[0]

    assert_equal_streamed("sd15", patch, dtype=torch.float32)  # ComfyUI gives it the type of the weights
