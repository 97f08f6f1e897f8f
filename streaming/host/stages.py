"""Stages: text encoder, diffusion model and VAE out of each other's way.

In: the moment a stage begins or ends, and how much of the card its own work needs. Out: idle components have left the
card, or given up as much of it as was short, and those that a person wants back have come back.

A component leaves as ComfyUI would have it leave, and ComfyUI is told; that its patcher is a `StreamingModelPatcher`
whose weights have page-locked copies is what makes leaving free and coming back as fast as the link. ComfyUI's memory
manager brings a component back when its stage begins, and only what is missing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from ..engine.host_memory import HostMemoryFull
from ..engine.plan import BudgetTooSmall
from .leaving import make_leave
from .need import MARGIN_BYTES, Need
from .policy import Leave, Part, PolicySettings, Stage, Switch
from .settings import MIB, Mode
from .streams import ModelStream

logger = logging.getLogger("layerstream")

# Which idle component gives way first: the one that is needed again last.
GIVING_ORDER = (Part.TEXT, Part.VAE, Part.DIFFUSION)


class Component:
    """A part of a workflow whose model is ours to move. Two nodes on one model have one component."""

    def __init__(self, part: Part, stream: ModelStream, settings: PolicySettings) -> None:
        self.part = part
        self.stream = stream
        self.settings = settings
        self.running = 0
        """How many stages of its own it is in; one may lie within another."""
        self.has_left = False
        self._patcher: Callable[[], Any] = lambda: None

    @property
    def is_on_card(self) -> bool:
        return self.stream.held_bytes > 0

    def note_patcher(self, patcher: Any) -> None:
        """Take note of the patcher that runs, with which the component is brought back."""
        self._patcher = weakref.ref(patcher)

    def missing_bytes(self, patcher: Any) -> int:
        """What of the weights is not on the card, for one that is not streamed whatever the room."""
        if patcher.settings.mode is Mode.ALWAYS:
            return 0
        return max(0, patcher.model_size() - self.stream.held_bytes)

    def give(self, size_bytes: int | None, why: str) -> int:
        """Leave the card, or give up `size_bytes` of it; give the bytes that came free."""
        freed = 0 if self.running else make_leave(self.stream, size_bytes)
        if freed:
            self.has_left = True
            self._say(f"{self.part.value} left the card {why}: {self.stream.moves.departures.last}, nothing was copied")
        return freed

    def come_back(self) -> None:
        """Come back where there is room without anything else leaving."""
        patcher = self._patcher()
        if patcher is None or not self.has_left:
            return
        needed = self.missing_bytes(patcher) + comfy.model_management.minimum_inference_memory()
        if self.stream.device.holds_activations and needed > self.stream.device.free_bytes():
            return
        try:
            comfy.model_management.load_models_gpu([patcher])
        except (torch.OutOfMemoryError, BudgetTooSmall, HostMemoryFull) as reason:
            # What the stage has made must not be lost with it.
            self._say(f"{self.part.value} comes back when it is needed: {reason}")
            return
        self.note_return()

    def note_return(self) -> None:
        """Say how fast it came back, if it had left."""
        if self.has_left and self.is_on_card:
            self.has_left = False
            if self.stream.moves.returns.count:
                returns = self.stream.moves.returns
                self._say(f"{self.part.value} is back on the card: {returns.last}, {returns.last_gib_per_s:.1f} GiB/s")

    def _say(self, line: str) -> None:
        logger.log(logging.INFO if self.settings.is_logged else logging.DEBUG, "LayerStream: %s", line)


_components: weakref.WeakValueDictionary[int, Component] = weakref.WeakValueDictionary()


def component_for(part: Part, stream: ModelStream, settings: PolicySettings) -> Component:
    """Find or make the component of a stream; the node that ran last has its say."""
    component = _components.get(id(stream))
    if component is None or component.stream is not stream:
        component = _components[id(stream)] = Component(part, stream, settings)
    component.settings = settings
    return component


def live_components() -> list[Component]:
    return list(_components.values())


@contextmanager
def stage(kind: Stage, own: Component | None, patcher: Any, need: Need) -> Iterator[None]:
    """The scope of a stage. `own` is the component that works, None where it is ComfyUI's; `need` tells what it needs
    of the card besides weights, and is asked only where that decides anything.
    """
    if own is not None:
        if own.running:
            yield  # a stage of its own within a stage of its own
            return
        own.note_patcher(patcher)
        own.running += 1
    try:
        make_room = getattr(patcher, "make_room", None)
        if make_room is not None:
            make_room()
        _make_way(kind, own, patcher, need)
        yield
    finally:
        if own is not None:
            own.running -= 1
            own.note_return()
    if own is not None and own.settings.departure(own.part) is Leave.AT_END:
        own.give(None, f"after {kind.value}")
    if kind is Stage.DECODE:
        for component in live_components():
            if component.settings.reload(component.part) is Switch.ON:
                component.come_back()


def _make_way(kind: Stage, own: Component | None, patcher: Any, need: Need) -> None:
    """Have idle components leave as their policies say."""
    others = [one for one in live_components() if one is not own and one.is_on_card and not one.running]
    for other in others:
        if other.settings.departure(other.part) in (Leave.NEXT_STAGE, Leave.AT_END):
            other.give(None, f"before {kind.value}")
    willing = [one for one in others if one.settings.departure(one.part) is Leave.IF_SHORT]
    if not willing or patcher is None:
        return
    missing = own.missing_bytes(patcher) if own is not None else max(0, patcher.model_size() - patcher.loaded_size())
    for other in sorted(willing, key=lambda one: GIVING_ORDER.index(one.part)):
        device = other.stream.device
        work_bytes = need.with_margin() if device.holds_activations else MARGIN_BYTES
        short = missing + work_bytes - device.free_bytes()
        if short <= 0:
            return
        other.give(short, f"before {kind.value}, which was short of {short / MIB:.0f} MiB")
