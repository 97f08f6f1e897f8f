"""A simulated device that runs out of memory once, wherever a test wants it to."""

from __future__ import annotations

import torch
from layerstream.streaming.engine.simulated import SimulatedDevice


class RefusingDevice(SimulatedDevice):
    """Refuses one allocation after `is_counting` was set: the one that comes after `left` others."""

    left = -1
    is_counting = False

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self.left -= self.is_counting
        if self.is_counting and self.left == -1:
            raise torch.OutOfMemoryError("simulated device: refused")
        return super().allocate(size_bytes)
