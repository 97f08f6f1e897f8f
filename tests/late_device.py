"""A simulated card on which compute may be as late as copies are."""

from __future__ import annotations

from layerstream.streaming.engine.simulated import SimulatedDevice, SimulatedStream


class LateDevice(SimulatedDevice):
    """Compute's stream defers its work as those of copies do; `seed` says which runs when."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(1 << 30, seed)
        self._late = self.copy_stream()

    def compute_stream(self) -> SimulatedStream:
        return self._late
