"""Which weights have patches baked into them, what those weights are, and how they reach whoever reads a model that
streams.

In: a streaming patcher. Out: answers about its patches. The newer ComfyUI reads a model's weights, to save them say,
without asking for patched ones first: it adds patches to the weights and biases of its own layers as it reads them, but
where `comfy_patched_weights` says that they are in place already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import comfy.utils
import torch

from ..engine.block import Block, Weight
from ..engine.moving import cut_of
from .casting import FLAG
from .locked_patches import Ferry
from .swallowed import raising_swallowed

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher

LAYER_WEIGHTS = ("weight", "bias")
"""What ComfyUI's layers can patch as they run, and as they are read."""


class Backup(NamedTuple):
    """What ComfyUI keeps of a weight that it patches, to put it back."""

    weight: torch.Tensor
    inplace_update: bool


def patch_key(patcher: StreamingModelPatcher, weight: Weight) -> str | None:
    """The name by which patches know `weight`; None if none are to be baked into it. Some are applied at run time, and
    some never by ComfyUI: to buffers, and to weights of a module that has others below it.
    """
    for name, site in zip(weight.keys, weight.sites, strict=True):
        key = patcher.stream.key(name)
        if key not in patcher.patches or key in patcher.run_time_patches or site.is_buffer:
            continue
        has_below = any(True for _ in site.module.children())  # asked first: nearly none has, and all are asked often
        if not (has_below and any("." in below for below, _ in site.module.named_parameters())):
            return key
    return None


def baked(patcher: StreamingModelPatcher, ferry: Ferry, weight: Weight) -> torch.Tensor | None:
    """The weight with its patches, worked out by ComfyUI on the card as for a full load; None if it has none.

    ComfyUI converts what is not on the card yet on the processor, and copies it from there at a fraction of the link's
    speed. So it gets the weight and what the patches hold on the card, where there is room, and a backup that is not.
    """
    key = patch_key(patcher, weight)
    if key is None:
        return None
    weight.put(weight.home)
    held = patcher.patches[key]
    # Asked for before the weight that comes next, which the card would serve first otherwise, whatever its stream.
    there = ferry.on_card(held)
    on_card = patcher.stream.session.home_on_device(weight)
    if on_card is not None:
        patcher.backup.setdefault(key, Backup(comfy.utils.get_attr(patcher.model, key), inplace_update=False))
        weight.put(on_card)
    patcher.patches[key] = there
    try:
        with raising_swallowed():
            patcher.patch_weight_to_device(key, device_to=patcher.load_device)
    finally:
        patcher.patches[key] = held
    return comfy.utils.get_attr(patcher.model, key)


def is_patched_when_read(patcher: StreamingModelPatcher, block: Block) -> bool:
    """Whether readers that find the unpatched weights of `block` get patched ones: all its patches are ones that
    ComfyUI adds then, and none is to a weight that is on the card for good, and so is patched already.
    """
    patched = {weight for weight in block.weights if patch_key(patcher, weight) is not None}
    sites = [weight.sites[0] for weight in patched]
    is_added = all(site.name in LAYER_WEIGHTS and hasattr(site.module, FLAG) for site in sites)
    return is_added and patched.isdisjoint(block.weights[: cut_of(block)])


def patched_modules(patcher: StreamingModelPatcher) -> set[torch.nn.Module]:
    """Those whose own tensors have their patches in them, as the model is loaded now."""
    if not patcher.patches:
        return set()
    session = patcher.stream.session
    return {
        site.module
        for block in {*session.parts.blocks, session.parts.outside} - session.differing_blocks()
        for weight in block.weights
        if patch_key(patcher, weight) is not None
        for site in weight.sites
    }
