"""How long a pass will take: the pipeline played through on paper.

In: what each block costs and how it travels. Out: a `Forecast`. It follows the same rules as `pipeline` and `ring`:
copies in order on one link, each into the place `lay_out` gives it, as soon as what lies there was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .codec import align

# What a copy takes besides its bytes, in milliseconds: the link's latency and the events around it.
COPY_LATENCY_MS = 0.01

# Of the rate that single copies reach, what a link sustains: copies start late, and the device fetches its commands
# over the same link.
SUSTAINED = 0.95

# Passes played through; the last one is taken, when what the first ones began with has worn off.
ROUNDS = 3


class Form(Enum):
    """Where a block's large weights are, and whether as they are or packed: then they are restored on the device each
    time the block runs."""

    RESIDENT = (False, False)
    RESIDENT_PACKED = (False, True)
    STREAMED = (True, False)
    STREAMED_PACKED = (True, True)

    def __init__(self, is_streamed: bool, is_packed: bool) -> None:
        self.is_streamed = is_streamed
        self.is_packed = is_packed


@dataclass(frozen=True)
class BlockCost:
    """One block as the planner sees it.

    `fixed_bytes` always stay on the device, `moving_bytes` stay or stream as one, in `packed_bytes` where they are
    packed (None where they cannot be). `lead_ms` is compute between the block before and this one, `compute_ms` the
    block's own; both 0 until measured.
    """

    name: str
    fixed_bytes: int
    moving_bytes: int
    packed_bytes: int | None = None
    lead_ms: float = 0.0
    compute_ms: float = 0.0

    def __post_init__(self) -> None:
        if min(self.fixed_bytes, self.moving_bytes, self.packed_bytes or 0, self.lead_ms, self.compute_ms) < 0:
            raise ValueError(f"block `{self.name}` has a negative size or time")

    @property
    def span_ms(self) -> float:
        return self.lead_ms + self.compute_ms

    def bytes_as(self, form: Form) -> int:
        """Bytes of the moving weights in this form, on the link or on the device."""
        if not form.is_packed:
            return self.moving_bytes
        assert self.packed_bytes is not None, f"`{self.name}` cannot be packed"
        return self.packed_bytes


@dataclass(frozen=True)
class Rates:
    """What was measured besides the blocks: bytes a millisecond over the link, raw bytes a millisecond restored from
    packed ones, and the time from the last block of a pass to the beginning of the next pass."""

    link: float
    restore: float
    tail_ms: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """A pass in steady state, milliseconds. `step_ms` is never less than `floor_ms`: the compute, restoring included,
    or the copies, whichever is longer."""

    step_ms: float
    compute_ms: float
    restore_ms: float
    link_ms: float

    @property
    def floor_ms(self) -> float:
        return max(self.compute_ms + self.restore_ms, self.link_ms)

    @property
    def limit(self) -> str:
        """What the step cannot be faster than: `compute` or `link`."""
        return "link" if self.link_ms > self.compute_ms + self.restore_ms else "compute"


def lay_out(sizes: Sequence[int], ring_bytes: int) -> list[int]:
    """Give each of `sizes`, in the order they are used, its place in a ring: the first byte of each.

    A place is one piece of memory, so what does not fit before the end of the ring starts at its beginning again.
    """
    starts, position = [], 0
    for size in sizes:
        if position + size > ring_bytes:
            position = 0
        starts.append(position)
        position += align(size)
    return starts


class _Copy(NamedTuple):
    """One block's copy in steady state: whose use, so many uses ago, must be over before it (None: it need not wait),
    and whether its place is its own, so that it arrives once and stays."""

    wait: int | None
    is_once: bool


def _copies(sizes: Sequence[int], ring_bytes: int) -> list[_Copy]:
    """What each copy into a ring of these sizes has to wait for."""
    starts = lay_out(sizes, ring_bytes)
    count = len(sizes)
    inside: list[tuple[int, int, int]] = []
    waits: list[int | None] = []
    shared = [False] * count
    for use in range(2 * count):
        start, end = starts[use % count], starts[use % count] + sizes[use % count]
        last = -1
        kept = [(start, end, use)]
        for entry in inside:
            if entry[0] < end and start < entry[1]:
                if entry[2] != use - count:
                    last = max(last, entry[2])
                    shared[use % count] = shared[entry[2] % count] = True
            else:
                kept.append(entry)
        inside = kept
        if use >= count:
            waits.append(use - last if last >= 0 else None)
    return [_Copy(wait, not is_shared) for wait, is_shared in zip(waits, shared, strict=True)]


def forecast(blocks: Sequence[BlockCost], forms: Sequence[Form], ring_bytes: int, rates: Rates) -> Forecast:
    """Play passes over `blocks`, in the order they run, and time the last one."""
    order = [index for index, form in enumerate(forms) if form.is_streamed]
    sizes = [blocks[index].bytes_as(forms[index]) for index in order]
    copies = dict(zip(order, _copies(sizes, ring_bytes), strict=True))
    # one row a block: lead, restore, compute, then of a streamed one copy time, whom it waits for, if it comes once
    rows = []
    for index, (block, form) in enumerate(zip(blocks, forms, strict=True)):
        restore_ms = block.moving_bytes / rates.restore if form.is_packed else 0.0
        copy, copy_ms = copies.get(index), None
        if copy is not None:
            copy_ms = block.bytes_as(form) / (SUSTAINED * rates.link) + COPY_LATENCY_MS
        wait, is_once = copy or (None, False)
        rows.append((block.lead_ms, restore_ms, block.compute_ms, copy_ms, wait, is_once))

    free: list[float] = []
    now = link = begin = 0.0
    for _ in range(ROUNDS):
        begin = now
        for lead_ms, restore_ms, compute_ms, copy_ms, wait, is_once in rows:
            now += lead_ms
            if copy_ms is None:
                now += restore_ms + compute_ms
                continue
            if not is_once or len(free) < len(order):
                if wait is not None and wait <= len(free) and free[-wait] > link:
                    link = free[-wait]
                link += copy_ms
                if link > now:
                    now = link
            now += restore_ms
            if restore_ms:
                free.append(now)
                now += compute_ms
            else:
                now += compute_ms
                free.append(now)
        now += rates.tail_ms
    link_ms = sum(row[3] for row in rows if row[3] is not None and not row[5])
    return Forecast(
        # The ring may start out full and run dry only slowly; in the long run the link decides.
        step_ms=max(now - begin, link_ms),
        compute_ms=sum(row[0] + row[2] for row in rows) + rates.tail_ms,
        restore_ms=sum(row[1] for row in rows),
        link_ms=link_ms,
    )
