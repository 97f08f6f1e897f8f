"""Patches that are applied whenever their layer runs, by the arithmetic of ComfyUI's low-memory way.

In: a streaming patcher about to load. Out: which of its patches are applied so, because baking them into the weights
would take more RAM than there is. What they hold lies in page-locked memory, so that it crosses the link at its full
speed. Layers that ComfyUI gives no way to patch as they run are always baked, as it does.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from comfy.model_patcher import LowVramPatch, get_key_weight

from ..engine.device import Device
from ..engine.loader import cut_of
from ..engine.store import Slab
from .budget import host_memory, within
from .casting import FLAG
from .locked_patches import page_locked
from .patched import LAYER_WEIGHTS
from .settings import GIB, Mode, Patching
from .streams import is_mapped

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher

logger = logging.getLogger("layerstream")


class RunTimePatch(LowVramPatch):
    """The patches of one weight."""

    slab: Slab | None = None
    """Page-locked memory that its tensors lie in, with those of other patches; None where they are as they came."""


def lock(patches: Sequence[RunTimePatch], device: Device) -> None:
    """Have `patches` hold their tensors in page-locked memory, if there is such; those that do already stay there."""
    fresh = [patch for patch in patches if patch.slab is None]
    locked = page_locked([patch.patches[patch.key] for patch in fresh], device, host_memory())
    if locked is not None:
        for patch, values in zip(fresh, locked.values, strict=True):
            patch.patches[patch.key], patch.slab = values, locked.slab


class RunTimePatches(NamedTuple):
    """What was decided for one set of patches of a model: those that are applied as their layer runs, by weight."""

    asked: tuple[uuid.UUID, Patching]
    by_key: dict[str, RunTimePatch]


def decide(patcher: StreamingModelPatcher) -> RunTimePatches:
    """Choose how the patches of `patcher` are applied. What was chosen once stands: it shows in the image."""
    stream, asked = patcher.stream, (patcher.patches_uuid, patcher.settings.patching)
    if stream.run_time is not None and stream.run_time.asked == asked:
        return stream.run_time
    keys = list(_keys(patcher))
    if not keys or not _is_at_run_time(patcher, set(keys)):
        return RunTimePatches(asked, {})
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
    baked_bytes = _baked_bytes(patcher, keys)
    # What holds other patches of the model is given up for these.
    wanted_bytes = baked_bytes - stream.session.changed_bytes
    if wanted_bytes <= 0 or (stream.has_ram_for(wanted_bytes) and host_memory().has_room(wanted_bytes)):
        return False
    logger.warning(
        "LayerStream: LoRAs are applied whenever their layers run, as ComfyUI's low-memory way does: patched weights "
        "would take %.2f GiB of RAM beside the others. Steps take longer; to have LoRAs applied once, close other "
        "programs or raise ram_gb on a VRAM Budget node",
        baked_bytes / GIB,
    )
    return True


def _baked_bytes(patcher: StreamingModelPatcher, keys: set[str]) -> int:
    """RAM that patched weights take beside those of the model: of what streams, and is not mapped from its file."""
    stream, session, settings = patcher.stream, patcher.stream.session, within(patcher.settings, patcher.stream)
    patched_bytes = sum(
        block.weight_bytes() - block.offset_of(cut_of(block))
        for block in session.parts.blocks
        if any(stream.key(name) in keys for weight in block.weights for name in weight.keys)
        and not all(is_mapped(weight.home) for weight in block.weights)
    )
    if stream.is_shelved or settings.mode is Mode.ALWAYS:
        return patched_bytes
    staying_bytes = settings.budget_bytes(stream.device.free_bytes() + stream.held_bytes, math.inf, 0)
    return min(patched_bytes, max(0, session.total_bytes - staying_bytes))
