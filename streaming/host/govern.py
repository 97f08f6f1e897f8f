"""Puts the parts of a workflow under one Offload Policy.

In: what a person connected and set. Out: the same parts, those that the policy moves with a `StreamingModelPatcher`
that keeps page-locked copies once it leaves the card, all of them telling when their stages begin. Under mode none they
are the very objects.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from .budget import Budget
from .families import Family, text_family
from .gguf_patches import streaming_patcher_for
from .patcher import NothingToStream, StreamingModelPatcher
from .policy import Leave, Part, PolicyMode, PolicySettings
from .settings import GIB, Mode, StreamingSettings
from .staged import staged_model, staged_text, staged_vae
from .stages import Component, component_for

logger = logging.getLogger("layerstream")


class Parts(NamedTuple):
    """What takes part in a workflow, each None where it is not connected."""

    model: Any
    clip: Any
    vae: Any


def govern(parts: Parts, settings: PolicySettings, budget: Budget | None = None) -> Parts:
    """Give the parts as the policy has them, what it moves under `budget`.

    Raises ValueError when nothing is connected, or a text encoder without the model that it makes room for.
    """
    model, clip, vae = parts
    if all(part is None for part in parts):
        raise ValueError("nothing is connected: connect model, clip or vae to the Offload Policy node")
    if settings.mode is PolicyMode.NONE:
        return parts
    if model is None and clip is not None and settings.departure(Part.TEXT) is not Leave.NEVER:
        raise ValueError(
            "clip is connected without model, so it is not known when sampling begins and the text encoder has to "
            "leave: connect the model to the same Offload Policy node"
        )
    taken = []
    if model is not None:
        taken.append(_take(Part.DIFFUSION, model, settings, budget))
        model = staged_model(*taken[-1], settings.estimation)
    if clip is not None:
        taken.append(_take(Part.TEXT, clip.patcher, settings, budget))
        clip = staged_text(clip, *taken[-1], settings.estimation)
    if vae is not None:
        vae.throw_exception_if_invalid()
        taken.append(_take(Part.VAE, vae.patcher, settings, budget))
        vae = staged_vae(vae, *taken[-1], settings.estimation)
    _keep_copies(taken, settings, budget)
    return Parts(model, clip, vae)


def _take(
    part: Part, source: ModelPatcher, settings: PolicySettings, budget: Budget | None
) -> tuple[ModelPatcher, Component | None]:
    """The patcher with which the policy moves a part, and its component; None for one that stays ComfyUI's."""
    if not settings.moves(part):
        return source, None
    try:
        patcher = _streamed(part, source, settings, budget)
    except NothingToStream as reason:
        logger.warning("LayerStream: the %s stays where ComfyUI puts it: %s", part.value, reason)
        return source, None
    return patcher, component_for(part, patcher.stream, settings)


def _keep_copies(
    taken: list[tuple[ModelPatcher, Component | None]], settings: PolicySettings, budget: Budget | None
) -> None:
    """Have those that will leave the card keep page-locked copies from their first load on.

    Locking the pages takes seconds then, for nothing where all stay. One that need not leave and does all the same has
    copies when it is loaded again.
    """
    wanted_bytes = sum(patcher.model_size() for patcher, _ in taken)
    wanted_bytes += comfy.model_management.minimum_inference_memory()
    for component in (component for _, component in taken if component is not None):
        stream, device = component.stream, component.stream.device
        stream.keeps_copies = True
        reach_bytes = device.free_bytes() + device.taken_bytes()
        if budget is not None and budget.vram_gib > 0:
            reach_bytes = min(reach_bytes, int(budget.vram_gib * GIB))
        if settings.departure(component.part) is not Leave.IF_SHORT or wanted_bytes > reach_bytes:
            stream.shelve()


def _streamed(
    part: Part, source: ModelPatcher, settings: PolicySettings, budget: Budget | None
) -> StreamingModelPatcher:
    if isinstance(source, StreamingModelPatcher) and not settings.streams(part):
        own = source.settings  # what a Layer-Stream node has set stands
        return streaming_patcher_for(source).from_patcher(source, replace(own, budget=own.budget or budget))
    streaming = StreamingSettings(Mode.ALWAYS if settings.streams(part) else Mode.AUTO, budget=budget)
    return streaming_patcher_for(source).from_patcher(source, streaming, _family(part, source.model))


def _family(part: Part, model: Any) -> Family | None:
    """What the units are; an autoencoder has none, since many use weights outside the forward of their module."""
    if part is Part.DIFFUSION:
        return None
    return Family(type(model).__name__, [], is_listed=False) if part is Part.VAE else text_family(model)
