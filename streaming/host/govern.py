"""Puts the parts of a workflow under one Offload Policy.

In: what a person connected and set. Out: the same parts, those that the policy moves with a `StreamingModelPatcher`
that keeps page-locked copies, all of them telling when their stages begin. Under mode none they are the very objects.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher

from .budget import Budget
from .families import Family, text_family
from .gguf_patches import streaming_patcher_for
from .patcher import NothingToStream, StreamingModelPatcher
from .policy import Leave, Part, PolicyMode, PolicySettings
from .settings import Mode, StreamingSettings
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
    if model is not None:
        model = staged_model(*_take(Part.DIFFUSION, model, settings, budget), settings.estimation)
    if clip is not None:
        clip = staged_text(clip, *_take(Part.TEXT, clip.patcher, settings, budget), settings.estimation)
    if vae is not None:
        vae.throw_exception_if_invalid()
        vae = staged_vae(vae, *_take(Part.VAE, vae.patcher, settings, budget), settings.estimation)
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
    patcher.stream.shelve()
    return patcher, component_for(part, patcher.stream, settings)


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
