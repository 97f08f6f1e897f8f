"""Has a model leave the card, or give up some of it, as ComfyUI would have it do and with ComfyUI told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management

if TYPE_CHECKING:
    from .streams import ModelStream


def make_leave(stream: ModelStream, size_bytes: int | None) -> int:
    """Have an idle model give up `size_bytes` of the card, or all of it; give the bytes that came free.

    A model that is running stays. Copies that are page-locked on the host make this free and coming back fast.
    """
    before = stream.held_bytes
    if before == 0 or stream.is_in_run:
        return 0
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if getattr(entry.model, "model", None) is stream.model]:
        if entry.model_unload(size_bytes):
            loaded.remove(entry)
    stream.device.trim()
    return before - stream.held_bytes
