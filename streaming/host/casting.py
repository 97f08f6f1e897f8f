"""Casting of streamed layers: on while their weights are in RAM, off while they are on the card.

ComfyUI's layers can cast a weight where they use it. That makes a streamed weight that is used outside its block's
forward slow, but right. Inside it the weight is where it must be and casting would change nothing, but takes longer on
the host than the layer itself; a model of many small layers would wait for it.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from ..engine.block import Block, ModelBlocks

FLAG = "comfy_cast_weights"
OWN_FLAG = f"prev_{FLAG}"
"""Where ComfyUI looks for what the flag was before someone switched casting on."""
FORCED_FLAG = "comfy_force_cast_weights"
"""Where newer versions, when they load a model, note that its quantised weights shall be multiplied dequantised."""


class CastSwitch:
    """Switches the layers of one model. A layer that casts by nature, or is told to, always does."""

    def __init__(self) -> None:
        self._tables: dict[Block, list[dict[str, object]]] = {}

    def arm(
        self, root: torch.nn.Module, parts: ModelBlocks, streamed: Container[torch.nn.Module], *, always: bool
    ) -> None:
        """Have the `streamed` modules under `root` cast, and with `always` all others too.

        What each did before is noted where ComfyUI restores it from.
        """
        for module in root.modules():
            module.__dict__.pop(FORCED_FLAG, None)
            if always and hasattr(module, FLAG):
                setattr(module, FORCED_FLAG, True)
            if hasattr(module, FLAG) and (always or module in streamed):
                setattr(module, OWN_FLAG, getattr(module, FLAG))
                setattr(module, FLAG, True)
        self._tables = {block: [] if always else _switchable(block) for block in parts.blocks}

    def note_bound(self, block: Block, is_bound: bool) -> None:
        """Take note that the weights of `block` are on the card now, or in RAM again."""
        for table in self._tables.get(block, ()):
            table[FLAG] = not is_bound


def _switchable(block: Block) -> list[dict[str, object]]:
    """The attributes of the modules of `block` that cast only because they stream."""
    # Written to directly: setting an attribute of a module the usual way takes a microsecond.
    return [module.__dict__ for module in block.module.modules() if not getattr(module, OWN_FLAG, True)]
