"""What a stage needs of the card besides weights: as it was seen to, and by estimate until then.

In: a model, its work, an estimate. Out: bytes. They are measured the first time that the work is done: all that lies
unused is given back before, so what lies unused afterwards is what the work took at its peak, libraries' workspaces and
the allocator's holes included. What was measured is remembered for as long as the model lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from .settings import MIB

# What stays free beside it: allocators round up, and libraries take workspaces when they first run.
MARGIN_SHARE = 0.1
MARGIN_BYTES = 256 * MIB

# By model and work, the largest amount of it that was measured, and the most bytes.
_measured: weakref.WeakKeyDictionary[Module, dict[Hashable, tuple[int, int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Need:
    """What `work` of `model` needs. `amount` says how much work it is where that is not part of `work`: the largest
    that was measured stands for all that are smaller, and for larger ones until they were measured themselves."""

    model: Module
    work: Hashable
    estimated: Callable[[], int]
    amount: int = 0

    @property
    def seen(self) -> tuple[int, int] | None:
        """The largest amount that was measured, and bytes; None where nothing was."""
        return _measured.get(self.model, {}).get(self.work)

    @property
    def is_measured(self) -> bool:
        return self.seen is not None and self.seen[0] >= self.amount

    def bytes(self) -> int:
        """Bytes, by the estimate where nothing was measured."""
        return self.estimated() if self.seen is None else self.seen[1]

    def with_margin(self) -> int:
        """Bytes that are to be free for the work."""
        return int(self.bytes() * (1 + MARGIN_SHARE)) + MARGIN_BYTES

    @contextmanager
    def measuring(self, patcher: Any) -> Iterator[None]:
        """The scope of the work itself, the weights of `patcher` being where they will be; a second time it is not
        measured. An error leaves nothing noted."""
        stream = getattr(patcher, "stream", None)
        if stream is None or not stream.device.holds_activations or self.is_measured:
            yield
            return
        device = stream.device
        device.trim()
        yield
        unused_bytes = device.unused_bytes()
        device.trim()
        amount, most_bytes = self.seen or (0, 0)
        seen = max(amount, self.amount), max(most_bytes, device.unused_bytes() - unused_bytes)
        _measured.setdefault(self.model, {})[self.work] = seen
