"""How tests of plug-ins compare: the same narrow model with the same plug-in, resident and streamed, bit for bit.

A plug-in is a function of the model, of the conditioning, or of both; see `assert_equal_streamed`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from scripts.division import divide, narrow_units
from scripts.family_matrix import ALL_STREAMED, HALF, simulated_card, stream
from scripts.model_configurations import MODELS
from scripts.tiny_models import build_tiny_model, conditioning

Model = Any
"""A ComfyUI `ModelPatcher`."""
Conditioning = list[Any]

Patch = Callable[[Model], Model]
Change = Callable[[Conditioning, Conditioning], tuple[Conditioning, Conditioning]]


def node(module: str, name: str, **values: Any) -> Any:
    """What a node of ComfyUI's `comfy_extras`, or of its own `nodes`, gives for these values; a tuple."""
    found = getattr(importlib.import_module(module if module == "nodes" else f"comfy_extras.{module}"), name)
    # Nodes of the older kind name their function and are made before they are called.
    result = getattr(found(), found.FUNCTION)(**values) if "FUNCTION" in dir(found) else found.execute(**values)
    return getattr(result, "args", result)


def unchanged_model(model: Model) -> Model:
    return model


def unchanged_conditioning(positive: Conditioning, negative: Conditioning) -> tuple[Conditioning, Conditioning]:
    return positive, negative


def sample(
    model: Model,
    name: str,
    change: Change = unchanged_conditioning,
    *,
    steps: int = 2,
    cfg: float = 4.0,
    latent: dict[str, torch.Tensor] | None = None,
    **sampling: Any,
) -> torch.Tensor:
    """Sample as the KSampler node does, with the conditioning of `name` as `change` makes it."""
    nodes = importlib.import_module("nodes")
    generator = torch.Generator().manual_seed(0)
    positive, negative = (conditioning(MODELS[name], generator) for _ in range(2))
    positive, negative = change(positive, negative)
    if latent is None:
        latent = {"samples": torch.zeros(1, *MODELS[name].latent)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            (result,) = nodes.common_ksampler(
                model, 0, steps, cfg, "euler", "simple", positive, negative, latent, **sampling
            )
    finally:
        torch.set_num_threads(threads)
    return result["samples"]


def stream_all(model: Model) -> Model:
    return stream(model, ALL_STREAMED, divide(model.model.diffusion_model))


def stream_half(model: Model) -> Model:
    return stream(model, HALF, divide(model.model.diffusion_model))


def assert_streams_as(streamed: Model, expected: torch.Tensor, name: str, *args: Any, **sampling: Any) -> None:
    """Sampling `streamed` gives `expected`, and something did stream, in whole passes."""
    result = sample(streamed, name, *args, **sampling)
    assert torch.equal(result, expected), f"{(result != expected).sum()} of {result.numel()} values differ"
    report = streamed.streaming_report()
    assert report["passes"] > 0 and report["broken_passes"] == 0 and report["streamed_bytes_per_step"] > 0
    streamed.stream.session.check()


def assert_equal_streamed(
    name: str,
    patch: Patch = unchanged_model,
    change: Change = unchanged_conditioning,
    *,
    dtype: torch.dtype = torch.bfloat16,
    is_packed: bool = False,
    **sampling: Any,
) -> None:
    """The model of `name` gives the same bits resident and streamed, whole and by half, plugged in before and after.

    What streams by half travels packed if told to, which is slow. Fails also when the plug-in changes nothing at all.
    """
    with narrow_units(), torch.inference_mode():
        model = build_tiny_model(name, dtype=dtype)
        plain = sample(model, name, **sampling)
        expected = sample(patch(model), name, change, **sampling)
        assert expected.isfinite().all()
        assert not torch.equal(expected, plain), "the plug-in did nothing"
        with simulated_card(0):
            assert_streams_as(stream_all(patch(model)), expected, name, change, **sampling)
        # A stream keeps the card it began with, so another card takes another model.
        with simulated_card(1 if is_packed else 2):
            streamed = stream_half(build_tiny_model(name, dtype=dtype))
            assert_streams_as(patch(streamed), expected, name, change, **sampling)
