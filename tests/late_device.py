"""A simulated card whose copies run as late as they may, compute's own too."""

from __future__ import annotations

from layerstream.streaming.engine.simulated import SimulatedDevice, SimulatedStream


class LateDevice(SimulatedDevice):
    """Compute's stream defers its work as those of copies do."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self._late = self.copy_stream()

    def compute_stream(self) -> SimulatedStream:
        return self._late
