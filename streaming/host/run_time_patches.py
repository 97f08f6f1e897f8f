"""Patches that are applied whenever their layer runs, by the arithmetic of ComfyUI's low-memory way.

In: a streaming patcher about to load. Out: which of its patches are applied so, because baking them into the weights
would take more RAM than there is. What they hold lies in page-locked memory, so that it crosses the link at its full
speed. Layers that ComfyUI gives no way to patch as they run are always baked, as it does.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from comfy.model_patcher import LowVramPatch, get_key_weight

from ..engine.device import Device
from ..engine.moving import cut_of, is_block_mapped
from ..engine.store import Slab
from .budget import host_memory, within
from .casting import FLAG
from .locked_patches import page_locked
from .patched import LAYER_WEIGHTS
from .planning import least_streamed_bytes
from .settings import GIB, Patching
from .streams import is_mapped

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher

logger = logging.getLogger("layerstream")

# Patches that take no more are locked even where RAM is short: a LoRA does, and its layers wait for it otherwise.
LITTLE_BYTES = 1 * GIB


class RunTimePatch(LowVramPatch):
    """The patches of one weight."""

    slab: Slab | None = None
    """Page-locked memory that its tensors lie in, with those of other patches; None where they are as they came."""


def lock(patches: Sequence[RunTimePatch], device: Device) -> None:
    """Have `patches` hold their tensors in page-locked memory, if there is such; those that do already stay there.

    A merge's hold another model, for which there may be no room once more.
    """
    fresh = [patch for patch in patches if patch.slab is None]
    most_bytes = max(LITTLE_BYTES, host_memory().room_for_copies())
    locked = page_locked([patch.patches[patch.key] for patch in fresh], device, host_memory(), most_bytes)
    if locked is not None:
        for patch, values in zip(fresh, locked.values, strict=True):
            patch.patches[patch.key], patch.slab = values, locked.slab


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
