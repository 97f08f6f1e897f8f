"""Patches that are applied whenever their layer runs, by the arithmetic of ComfyUI's low-memory way.

In: a streaming patcher about to load. Out: which of its patches are applied so, because baking them into the weights
would take more RAM than there is. What they hold is on the card while the model is loaded, where there is room for it:
copied for each layer, it stands in line behind all weights on their way, and compute waits for both. Otherwise it lies
in page-locked memory. Layers that ComfyUI gives no way to patch as they run are always baked, as it does.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from comfy.model_patcher import LowVramPatch, get_key_weight

from ..engine.device import Device
from ..engine.moving import cut_of, is_block_mapped
from .budget import host_memory, within
from .casting import FLAG
from .files import is_mapped
from .locked_patches import Locked, page_locked
from .patched import LAYER_WEIGHTS
from .planning import has_room_beside, least_streamed_bytes
from .settings import GIB, Patching
from .swallowed import raising_swallowed

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher

logger = logging.getLogger("layerstream")

# Patches that take no more are locked even where RAM is short: a LoRA does, and its layers wait for it otherwise.
LITTLE_BYTES = 1 * GIB


class RunTimePatch(LowVramPatch):
    """The patches of one weight."""

    locked: Locked | None = None
    """Page-locked memory that its tensors lie in; None where they are as they came."""
    _on_card: LowVramPatch | None = None

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        with raising_swallowed():
            return super().__call__(weight) if self._on_card is None else self._on_card(weight)

    @property
    def locked_bytes(self) -> int:
        return self.locked.stored.nbytes if self.locked is not None else 0

    @property
    def card_bytes(self) -> int:
        """Bytes of the card that it takes."""
        return self.locked_bytes if self._on_card is not None else 0

    def bring(self, memory: torch.Tensor, device: Device) -> None:
        """Have its tensors on the card too, in `memory`, uint8 [locked_bytes]."""
        assert self.locked is not None
        held = {self.key: self.locked.on_card(memory, device)}
        self._on_card = LowVramPatch(self.key, held, self.convert_func, self.set_func)

    def leave(self) -> None:
        """Give back what it takes of the card."""
        self._on_card = None

    def move_to(self, device: torch.device) -> int:
        """ComfyUI has what layers apply follow them: off the card, to which only `bring` knows what has room.

        Gives the bytes that came to the card.
        """
        if device.type == "cpu":
            self.leave()
        return 0


def lock(patches: Sequence[RunTimePatch], device: Device) -> None:
    """Have `patches` hold their tensors in page-locked memory, if there is such; those that do already stay there.

    A merge's hold another model, for which there may be no room once more.
    """
    fresh = [patch for patch in patches if patch.locked is None]
    most_bytes = max(LITTLE_BYTES, host_memory().room_for_copies())
    found = page_locked([patch.patches[patch.key] for patch in fresh], device, host_memory(), most_bytes)
    if found is not None:
        for patch, locked in zip(fresh, found, strict=True):
            patch.patches[patch.key], patch.locked = locked.value, locked


def bring(patcher: StreamingModelPatcher, allowed_bytes: float) -> None:
    """Have the patches of `patcher` that its layers apply on the card, those of no other, where a plan has room beside
    them; `allowed_bytes` is what ComfyUI grants.
    """
    stream = patcher.stream
    wanted = tuple(patch for patch in patcher.applied_patches if patch.locked_bytes)
    is_there = wanted == stream.brought and all(patch.card_bytes for patch in wanted)
    size_bytes = sum(patch.locked_bytes for patch in wanted)
    settings = within(patcher.settings, stream)
    if not wanted or not has_room_beside(stream, settings, allowed_bytes, patcher.held_bytes, size_bytes):
        stream.leave_patches()
    elif not is_there:
        stream.leave_patches()
        lacking_bytes = size_bytes - stream.device.free_bytes()
        if lacking_bytes > 0 and stream.is_in_place:
            stream.session.evict(lacking_bytes)  # weights, which the plan will not keep beside them
        with suppress(torch.OutOfMemoryError):
            memory = stream.device.allocate(size_bytes)
            for patch, piece in zip(wanted, memory.split([patch.locked_bytes for patch in wanted]), strict=True):
                patch.bring(piece, stream.device)
            stream.brought = wanted


class RunTimePatches(NamedTuple):
    """What was decided for one set of patches of a model: those that are applied as their layer runs, by weight."""

    asked: tuple[uuid.UUID, Patching]
    by_key: dict[str, RunTimePatch]


def decide(patcher: StreamingModelPatcher) -> RunTimePatches:
    """Choose how the patches of `patcher` are applied.

    It shows in the image, so that what was chosen stands until others are loaded, and that there was no room for
    patched weights stands for good.
    """
    stream, asked = patcher.stream, (patcher.patches_uuid, patcher.settings.patching)
    if stream.run_time is not None and stream.run_time.asked == asked:
        return stream.run_time
    keys = list(_keys(patcher))
    is_at_run_time = bool(keys) and (asked in stream.without_room or _is_at_run_time(patcher, set(keys)))
    if is_at_run_time != bool(stream.run_time and stream.run_time.by_key):
        stream.forget_measured()  # patching takes memory and time of the card in each layer
    if not is_at_run_time:
        return RunTimePatches(asked, {})
    stream.without_room.add(asked)
    by_key = {}
    for key in keys:
        _, store, convert = get_key_weight(patcher.model, key)
        by_key[key] = RunTimePatch(key, {key: patcher.patches[key]}, convert, store)
    lock(list(by_key.values()), stream.device)
    return RunTimePatches(asked, by_key)


def _keys(patcher: StreamingModelPatcher) -> Iterator[str]:
    """The patched weights of layers that can apply patches as they run."""
    stream = patcher.stream
    for name, module in stream.model.get_submodule(stream.root).named_modules():
        if hasattr(module, FLAG):
            keys = (stream.key(f"{name}.{kind}") for kind in LAYER_WEIGHTS if getattr(module, kind, None) is not None)
            yield from (key for key in keys if key in patcher.patches)


def _is_at_run_time(patcher: StreamingModelPatcher, keys: set[str]) -> bool:
    if patcher.settings.patching is not Patching.AUTO:
        return patcher.settings.patching is Patching.RUN_TIME
    stream = patcher.stream
    fresh_bytes, mapped_bytes = _baked_bytes(patcher, keys)
    # What holds other patches of the model is given up for these.
    fresh_bytes -= stream.session.changed_bytes
    is_enough = stream.has_ram_for(fresh_bytes) and (fresh_bytes <= 0 or host_memory().has_room(fresh_bytes))
    if is_enough and mapped_bytes <= max(0, stream.room_for_copies):
        return False
    logger.warning(
        "LayerStream: LoRAs are applied whenever their layers run, as ComfyUI's low-memory way does: patched weights "
        "would take %.2f GiB of RAM, more than there is room for. Steps take longer; to have LoRAs applied once, close "
        "other programs or raise ram_gb on a VRAM Budget node",
        max(fresh_bytes, mapped_bytes) / GIB,
    )
    return True


def _baked_bytes(patcher: StreamingModelPatcher, keys: set[str]) -> tuple[int, int]:
    """RAM that patched weights take where they stream: of those that have memory of their own beside, and of those that
    are mapped from their file.
    """
    stream, fresh_bytes, mapped_bytes = patcher.stream, 0, 0
    for block in stream.session.parts.blocks:
        if any(stream.key(name) in keys for weight in block.weights for name in weight.keys):
            size_bytes = block.bytes_from(cut_of(block))
            if is_block_mapped(block, is_mapped):
                mapped_bytes += size_bytes
            else:
                fresh_bytes += size_bytes
    if stream.is_shelved:
        return fresh_bytes, mapped_bytes
    streamed_bytes = least_streamed_bytes(stream, within(patcher.settings, stream))
    return min(fresh_bytes, streamed_bytes), min(mapped_bytes, streamed_bytes)
