"""One bound on the card, and on host memory, for all models that are put under it.

In: what a person set on the VRAM Budget node, and which models share it. Out: for each model as it loads, what the
others leave of it. Idle models make way for the one that runs, as far as the bound asks for it; how much each holds is
the split. A hard limit is given to the allocator, so that activations count too and a breach is an ordinary
out-of-memory error.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import psutil

from ..engine.device import Device
from ..engine.host_memory import Ceilings, HostMemory
from ..engine.plan import GIB
from .leaving import make_leave

if TYPE_CHECKING:
    from .settings import StreamingSettings
    from .streams import ModelStream

MIB = 1024**2

# Page-locked memory cannot be swapped; the system and other programs need the rest. Windows refuses more than half of
# RAM, by what ComfyUI found, which stops at 0.4: there the buffers that bring the rest must find some left.
LOCKED_SHARE = 0.5
WINDOWS_LOCKED_SHARE = 0.4

# RAM that is left to the system and other programs. Copies of what is mapped from its file leave a share, at the least
# so much: a weight without one is read from the disk in every step, so they may come close to the end of RAM. Packed or
# patched copies beside weights that are not mapped leave more: without them steps take up to half as long again, no
# more, and where weights are not mapped, the text encoder that is loaded next takes RAM that the system cannot take
# back. By one rule for both, a machine of 16 GiB would either swap or read from its disk what it has room for.
LEFT_SHARE = 0.1
LEAST_LEFT_BYTES = 2 * GIB
SPARE_RAM_BYTES = 8 * GIB

# What a bound is given as where nothing of it is left: less would read as automatic.
NOTHING_GIB = 1e-9


@dataclass(frozen=True, eq=False)
class Budget:
    """What a person sets on the VRAM Budget node.

    `vram_gib` bounds the weights of all its models together: 0 is what is free, negative what is free less that many
    GiB. `min_free_mib` stays free on the card. `ram_gib` bounds page-locked and all host memory that is taken for
    weights; 0 is half of RAM page-locked, 0.4 on Windows, and copies of what is mapped from its file only while RAM
    is free.
    """

    vram_gib: float = 0.0
    min_free_mib: int = 256
    ram_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.min_free_mib < 0:
            raise ValueError(f"min_free_mb is {self.min_free_mib}: set it to 0 or more")
        if self.ram_gib < 0:
            raise ValueError(f"ram_gb is {self.ram_gib}: set it to 0 for automatic, or to the GiB of RAM to use")
        _budgets.add(self)

    def add(self, stream: ModelStream) -> None:
        """Put a model under this budget, and under no other.

        A budget that loses its last model to another one bounds nothing until it is given one again: ComfyUI may keep
        what a node gave long after the node was set otherwise.
        """
        if budget_of(stream) is not self:
            leave_budget(stream)
            _budget_of[stream] = weakref.ref(self)
            _given_up.discard(self)
            if _limits:
                _apply_limits(stream.device)

    def limit(self, device: Device) -> None:
        """Bound all that this process takes of the card, until nothing refers to this budget or uses it any more.

        Raises ValueError where that would leave nothing.
        """
        device.limit(None)  # an older limit says nothing of what the card has
        free_bytes = device.free_bytes() + device.taken_bytes()
        most_bytes = self.vram_gib * GIB if self.vram_gib > 0 else free_bytes + self.vram_gib * GIB
        most_bytes = int(min(most_bytes, free_bytes - self.min_free_mib * MIB))
        if most_bytes <= 0:
            _apply_limits(device)
            raise ValueError(
                f"the hard limit leaves {most_bytes / GIB:.2f} GiB of the card: {free_bytes / GIB:.2f} GiB are free, "
                "so raise vram_gb or lower min_free_mb"
            )
        _limits[self] = most_bytes
        weakref.finalize(self, _apply_limits, device).atexit = False
        _apply_limits(device)

    def split(self) -> dict[str, int]:
        """Bytes of the card that each model holds, by the model's class."""
        held: dict[str, int] = {}
        for stream in sorted(_members_of(self), key=lambda one: type(one.model).__name__):
            name = type(stream.model).__name__
            held[name] = held.get(name, 0) + stream.held_bytes
        return held

    def make_room(self, stream: ModelStream, wanted_bytes: int) -> None:
        """Before `stream` loads: have idle models give up what `wanted_bytes` asks for of the bound."""
        if self.vram_gib <= 0:
            return
        over_bytes = self._held_beside(stream) + wanted_bytes - self.vram_gib * GIB
        for other in _members_of(self):
            if over_bytes <= 0:
                return
            if other is not stream:
                over_bytes -= make_leave(other, int(over_bytes))

    def _held_beside(self, stream: ModelStream) -> int:
        return sum(other.held_bytes for other in _members_of(self) if other is not stream)

    def left_for(self, stream: ModelStream) -> int:
        """Bytes of the bound that the other models leave; only for a bound in GiB."""
        return int(self.vram_gib * GIB) - self._held_beside(stream)


_budgets: weakref.WeakSet[Budget] = weakref.WeakSet()
_given_up: weakref.WeakSet[Budget] = weakref.WeakSet()
_limits: weakref.WeakKeyDictionary[Budget, int] = weakref.WeakKeyDictionary()
_budget_of: weakref.WeakKeyDictionary[ModelStream, weakref.ref[Budget]] = weakref.WeakKeyDictionary()


def _apply_limits(device: Device) -> None:
    """Bound the card by the smallest hard limit that is in force."""
    device.limit(min((most for budget, most in _limits.items() if budget not in _given_up), default=None))


def _members_of(budget: Budget) -> list[ModelStream]:
    # The references come in a list of their own: reports are made by other threads, while models come.
    streams = (reference() for reference in _budget_of.keyrefs())
    return [stream for stream in streams if stream is not None and budget_of(stream) is budget]


def leave_budget(stream: ModelStream) -> None:
    """Put a model under no budget."""
    last = budget_of(stream)
    if last is None:
        return
    del _budget_of[stream]
    if not _members_of(last):
        _given_up.add(last)
        if _limits:
            _apply_limits(stream.device)


def budget_of(stream: ModelStream) -> Budget | None:
    reference = _budget_of.get(stream)
    return None if reference is None else reference()


def within(settings: StreamingSettings, stream: ModelStream) -> StreamingSettings:
    """The settings with what the budget, if any, leaves this model now, as plain figures, and under its restraint."""
    return stream.restraint.on(_within_budget(settings, stream))


def _within_budget(settings: StreamingSettings, stream: ModelStream) -> StreamingSettings:
    budget = settings.budget
    if budget is None:
        return settings
    bounds = list(_bounds_gib(settings, budget, stream))
    return replace(
        settings,
        vram_gib=max(min(bounds), NOTHING_GIB) if bounds else 0.0,
        min_free_mib=max(settings.min_free_mib, budget.min_free_mib),
        budget=None,
    )


def _bounds_gib(settings: StreamingSettings, budget: Budget, stream: ModelStream) -> Iterator[float]:
    """Every bound in GiB that is someone's own figure."""
    free_gib = (stream.device.free_bytes() + stream.held_bytes) / GIB
    if budget.vram_gib > 0:
        yield budget.left_for(stream) / GIB
    for figure in (settings.vram_gib, budget.vram_gib):
        if figure < 0:
            yield free_gib + figure
    if settings.vram_gib > 0:
        yield settings.vram_gib


@cache
def host_memory() -> HostMemory:
    """The host memory of this process, bounded by the smallest budget that is in force."""
    return HostMemory(_ceilings)


def available_ram_bytes() -> int:
    """RAM that programs can have. The system counts all pages of files as such, those that are locked too."""
    return _unclaimed_bytes(psutil.virtual_memory().available) + host_memory().spare_bytes


def _unclaimed_bytes(available_bytes: int) -> int:
    """The same with nothing of ours making way."""
    return available_bytes - host_memory().file_bytes


def _ceilings() -> Ceilings:
    own = [int(budget.ram_gib * GIB) for budget in _budgets if budget.ram_gib and budget not in _given_up]
    if own:
        return Ceilings(min(own), min(own), min(own))
    ram = psutil.virtual_memory()
    left_bytes = max(LEAST_LEFT_BYTES, int(LEFT_SHARE * ram.total))
    room_bytes = _unclaimed_bytes(ram.available) - left_bytes
    locked_share = WINDOWS_LOCKED_SHARE if sys.platform == "win32" else LOCKED_SHARE
    return Ceilings(int(locked_share * ram.total), None, host_memory().total_bytes + room_bytes)
