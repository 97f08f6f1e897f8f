"""A plan: what stays on the device and what streams. `planner` makes it, `session` brings a model to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .forecast import Forecast, Form

GIB = 1024**3

# A copy below this size costs its latency, not its bytes (4 GB/s at 64 KiB against 55 from 64 MiB up on PCIe 5), so a
# tensor this small is always resident.
TINY_BYTES = 64 * 1024


class Packing(Enum):
    """`auto` packs what the link cannot keep pace with, `never` nothing, `always` whatever can be packed."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class BudgetTooSmall(ValueError):
    """The budget does not hold the least this model needs; the message says what would."""


@dataclass(frozen=True)
class Plan:
    """Where every block's large weights are, and how much of the device is set aside for those that move.

    Equal plans put the same things in the same places; the forecast is not compared.
    """

    forms: tuple[Form, ...]
    outside_bytes: int
    resident_bytes: int
    streamed_bytes: int
    """Bytes of weights that are brought to the device in one pass, each time they are used, as they are used."""
    link_bytes: int
    """The same as they cross the link, as far as known when the plan was made."""
    ring_bytes: int
    scratch_bytes: int
    expected: Forecast | None = field(default=None, compare=False)

    @property
    def device_bytes(self) -> int:
        """All that the plan takes of the device: residents, weights outside blocks, ring and scratch."""
        return self.outside_bytes + self.resident_bytes + self.ring_bytes + self.scratch_bytes

    @property
    def is_resident(self) -> bool:
        """True where every weight stays on the device as it is, so that nothing has to be done in a pass."""
        return all(form is Form.RESIDENT for form in self.forms)

    @property
    def is_packed(self) -> bool:
        """True where anything is packed."""
        return any(form.is_packed for form in self.forms)
