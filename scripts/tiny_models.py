"""Builds models of every family that are too small for ComfyUI's file detection, with random weights, and samples them.

Real widths make one pass take seconds on a processor. These models are ComfyUI's own classes with a smaller
configuration, so a pass takes milliseconds; they serve tests of many cases, while narrow files test the loading. A
host must be open (`hosts.open_host`) before anything here is called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from .model_configurations import MODELS, OLDER, Model, Random, Values, Vision

Patcher = Any
"""A ComfyUI `ModelPatcher`; its class exists only while a host is open."""

# ComfyUI leaves these to the file. Other buffers are computed when the model is built.
EMPTY_BUFFERS = ("pos_embed",)

# How many values weights of up to that size are taken from.
DRAWN = 1 << 22


def is_in_host(name: str) -> bool:
    """Whether the open host has the model."""
    import comfy.supported_models

    model = MODELS[name]
    return hasattr(comfy.supported_models, model.supported) and (model.since == OLDER or is_newer_host())


def build_model(name: str, *, dtype: torch.dtype, device: str, narrow: bool) -> Any:
    """ComfyUI's model of `name` (its `BaseModel`) with no values in its weights; on "meta" the full size costs nothing.

    Computes in float32, as ComfyUI does with bfloat16 weights on a processor.
    """
    import comfy.supported_models

    model = MODELS[name]
    model_config = getattr(comfy.supported_models, model.supported)(
        model.settings(narrow=narrow, is_newer=is_newer_host())
    )
    model_config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    return model_config.get_model({}, "", device=torch.device(device))


def build_tiny_model(name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Patcher:
    """A model patcher around a narrow model of `name`, weights in `dtype`."""
    import comfy.model_management
    import comfy.model_patcher

    model = build_model(name, dtype=dtype, device="cpu", narrow=True)
    fill(model.diffusion_model, seed)
    # Newer versions choose between patcher classes at start and name the choice; older ones have only one.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def loads_from_file(name: str) -> bool:
    """Whether the open host finds the widths of a narrow model in its file; others it takes for known."""
    since = MODELS[name].loads_since
    return since == OLDER or (since is not None and is_newer_host())


def load_tiny_model(name: str, folder: Path) -> Patcher:
    """The narrow model of `name` out of a file, written into `folder` when it is not there, by ComfyUI's own loader.

    Where the loader cannot know the widths, the model is built without a file.
    """
    import comfy.sd

    if not loads_from_file(name):
        return build_tiny_model(name)
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        weights = build_tiny_model(name).model.diffusion_model.state_dict()
        save_file({key: weight.contiguous() for key, weight in weights.items()}, path)
    return comfy.sd.load_diffusion_model(str(path))


def sample_tiny(
    patcher: Patcher, name: str, *, steps: int = 2, cfg: float = 1.0, batch: int = 1, seed: int = 0
) -> torch.Tensor:
    """Sample as the KSampler node does, with everything but the weights depending only on `name`, `batch` and `seed`.

    Several latents (video and audio) come back as one row of values.
    """
    # By name: this pack has a `nodes` of its own.
    nodes = importlib.import_module("nodes")
    model = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (conditioning(model, generator) for _ in range(2))
    latent = {"samples": _empty_latent(model, batch)}
    with torch.inference_mode(), _one_thread():
        (result,) = nodes.common_ksampler(patcher, seed, steps, cfg, "euler", "simple", positive, negative, latent)
    samples = result["samples"]
    if samples.is_nested:
        return torch.cat([part.flatten() for part in samples.unbind()])
    return samples


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from more threads, which only wait for each other on a busy machine."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def conditioning(model: Model, generator: torch.Generator) -> list[Any]:
    """What a text encoder and the model's own nodes would give it, with random values."""
    text = torch.randn(1, *(model.text or (1, 1)), generator=generator)
    entries = {key: _input(value, generator) for key, value in model.inputs.items()}
    if model.pooled is not None:
        entries["pooled_output"] = torch.randn(1, model.pooled, generator=generator)
    return [[text, entries]]


def _input(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Random):
        return torch.randn(1, *value.shape, generator=generator)
    if isinstance(value, Values):
        return torch.tensor(value.values)
    if isinstance(value, Vision):
        states = torch.randn(1, *value.shape, generator=generator)
        return SimpleNamespace(
            penultimate_hidden_states=states, last_hidden_state=states.flip(-1), image_sizes=[value.image]
        )
    if isinstance(value, list):
        return [_input(item, generator) for item in value]
    return value


def _empty_latent(model: Model, batch: int) -> torch.Tensor:
    latents = [torch.zeros(batch, *shape) for shape in (model.latent, *model.more_latents)]
    if len(latents) == 1:
        return latents[0]
    from comfy.nested_tensor import NestedTensor

    return NestedTensor(latents)


def is_newer_host() -> bool:
    """Whether the open host knows what `Model.newer` sets."""
    import comfy.ldm.flux.model

    return "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__


def fill(module: torch.nn.Module, seed: int) -> None:
    """Give every weight random values that keep activations of order one; none is constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = _normal(parameter.shape, generator)
        if parameter.ndim > 1:
            values = values / math.sqrt(parameter[0].numel())
        elif "norm" in name:
            values = 1 + 0.1 * values
        else:
            values = values * 0.05
        parameter.data.copy_(values)
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] in EMPTY_BUFFERS:
            buffer.copy_(_normal(buffer.shape, generator))


def _normal(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal values, to be read only, from a place in DRAWN of them that `generator` draws: drawing each takes longer
    than most that tests do with it.
    """
    count = shape.numel()
    if count > DRAWN:
        return torch.randn(shape, generator=generator)
    begin = int(torch.randint(DRAWN, (), generator=generator))
    return _drawn()[begin : begin + count].view(shape)


@functools.cache
def _drawn() -> torch.Tensor:
    """DRAWN normal values twice over, so that as many follow on each."""
    return torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).repeat(2)
