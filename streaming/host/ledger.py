"""The ledger: what streaming did to a model, written down where ComfyUI itself looks before it loads.

In: a streaming patcher whose plan was just loaded. Out: entries of the patcher and attributes of the model. A model has
several patchers (clones, an unstreamed branch of the graph), and any of them may be loaded after this one without our
being told. So `backup` has the home tensor of each parameter that was replaced, `model_lowvram` and
`prev_comfy_cast_weights` the modules whose casting was switched on, `comfy_patched_weights` those whose weights have
their patches in them, and `current_weight_patches_uuid` an id that is nobody else's. Whoever comes next restores the
model from these; our device memory is held by the model's parameters alone and goes with them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import wipe_lowvram_weight

from .casting import FLAG
from .patched import LAYER_WEIGHTS, Backup, patched_modules
from .run_time_patches import RunTimePatch

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher


def keep_ledger(patcher: StreamingModelPatcher) -> None:
    """Write the ledger of `patcher`, whose model has what it had, unless it was written for all that is so now."""
    key = _written_for(patcher)
    if key is None or key != patcher.stream.ledger_key:
        write_ledger(patcher)


def _written_for(patcher: StreamingModelPatcher) -> Hashable | None:
    """What a ledger depends on besides what is loaded; None where layers apply something as they run."""
    if patcher.run_time_patches or patcher.weight_wrapper_patches:
        return None
    objects = tuple((name, id(put)) for name, put in patcher.object_patches.items())
    return patcher.patches_uuid, id(patcher.backup), patcher.load_device, patcher.force_cast_weights, objects


def write_ledger(patcher: StreamingModelPatcher) -> None:
    """Bring the ledger of `patcher` up to date, hang on layers what they apply as they run and switch casting on."""
    stream, session, model = patcher.stream, patcher.stream.session, patcher.model
    for block in (*session.parts.blocks, session.parts.outside):
        for weight in block.weights:
            if not weight.sites[0].is_buffer:
                for name in weight.keys:
                    patcher.backup[stream.key(name)] = Backup(weight.home, inplace_update=False)
    patched = patched_modules(patcher)
    for name, module in model.named_modules():
        if not hasattr(module, FLAG):
            continue
        module.comfy_patched_weights = module in patched
        wipe_lowvram_weight(module)
        for kind in LAYER_WEIGHTS:
            key = f"{name}.{kind}"
            at_run_time = patcher.run_time_patches.get(key)
            functions = ([at_run_time] if at_run_time else []) + patcher.weight_wrapper_patches.get(key, [])
            if functions:
                getattr(module, f"{kind}_function").extend(functions)
                _follow(functions, patcher.load_device)
    stream.casting.arm(model, session.parts, session.moving_modules(), always=patcher.force_cast_weights)
    model.model_lowvram = True
    model.lowvram_patch_counter = len(patcher.run_time_patches)
    model.device = patcher.load_device
    model.current_weight_patches_uuid = stream.load_id
    stream.tell_loaded()
    stream.ledger_key = _written_for(patcher)


def _follow(functions: Iterable[Any], device: torch.device) -> None:
    """Have what layers apply come to where the model runs, as ComfyUI does; of our own patches `bring` knows."""
    for function in functions:
        if hasattr(function, "move_to") and not isinstance(function, RunTimePatch):
            function.move_to(device=device)
