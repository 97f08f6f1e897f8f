"""How long a pass will take: the pipeline played through on paper.

In: what each block costs and how it travels. Out: a `Forecast`. It follows the same rules as `stage` and `ring`: copies
in order on one link, each into the place `lay_out` gives it, as soon as what lies there was used; restoring likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .codec import align

# What a copy takes besides its bytes, in milliseconds: the link's latency and the events around it.
COPY_LATENCY_MS = 0.01

# Of the rate that single copies reach, what a link sustains: copies start late, and the device fetches its commands
# over the same link.
SUSTAINED = 0.95

# Of the time that copying and restoring take, what compute loses that runs beside them: they share the memory, and
# restoring shares the processors. On an H200 kernels bound by memory run 11 % slower beside copies, others as ever.
COPY_TOLL = 0.025
RESTORE_TOLL = 0.5

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
    block's own; both 0 until measured. They are of all `uses` of the block in a pass, for each of which it is brought.
    """

    name: str
    fixed_bytes: int
    moving_bytes: int
    packed_bytes: int | None = None
    lead_ms: float = 0.0
    compute_ms: float = 0.0
    uses: int = 1

    def __post_init__(self) -> None:
        if min(self.fixed_bytes, self.moving_bytes, self.packed_bytes or 0, self.lead_ms, self.compute_ms) < 0:
            raise ValueError(f"block `{self.name}` has a negative size or time")
        if self.uses < 1:
            raise ValueError(f"block `{self.name}` is used {self.uses} times: count one that does not run as used once")

    @property
    def span_ms(self) -> float:
        return self.lead_ms + self.compute_ms

    @property
    def passing_bytes(self) -> int:
        """Bytes of the moving weights that are used in a pass."""
        return self.uses * self.moving_bytes

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
    """A pass in steady state, milliseconds. `step_ms` is never less than `floor_ms`: the compute, with what it loses to
    what runs beside it, or the copies, whichever is longer."""

    step_ms: float
    compute_ms: float
    restore_ms: float
    link_ms: float

    @property
    def floor_ms(self) -> float:
        return max(self._whole_compute_ms, self.link_ms, self.restore_ms)

    @property
    def limit(self) -> str:
        """What the step cannot be faster than: `compute` or `link`."""
        return "link" if self.link_ms > self._whole_compute_ms else "compute"

    @property
    def _whole_compute_ms(self) -> float:
        return self.compute_ms + COPY_TOLL * self.link_ms + RESTORE_TOLL * self.restore_ms


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


# Of one block's copy in steady state: whose use, so many uses ago, must be over before it (None: it need not wait), and
# whether its place is its own, so that it is there for good and takes no time. Tuples all, since thousands are made for
# a plan.
_Copy = tuple[int | None, bool]


def _copies(sizes: Sequence[int], ring_bytes: int) -> list[_Copy]:
    """What each copy into a ring of these sizes has to wait for."""
    places = [(start, start + size) for start, size in zip(lay_out(sizes, ring_bytes), sizes, strict=True)]
    count = len(sizes)
    inside: list[tuple[int, int, int]] = []
    waits: list[int | None] = []
    shared = [False] * count
    for first_use in (0, count):
        for index, (start, end) in enumerate(places):
            use, last = first_use + index, -1
            kept = [(start, end, use)]
            for entry in inside:
                if entry[0] < end and start < entry[1]:
                    other = entry[2]
                    if other != use - count:
                        last = other if other > last else last
                        shared[index] = shared[other % count] = True
                else:
                    kept.append(entry)
            inside = kept
            if first_use:
                waits.append(use - last if last >= 0 else None)
    return [(wait, not is_shared) for wait, is_shared in zip(waits, shared, strict=True)]


class _Stage:
    """A stage played through: it is busy until `now_ms`, and what it brought was used at `used_ms`, in order."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.used_ms: list[float] = []

    def bring(self, after_ms: float, takes_ms: float, copy: _Copy) -> float:
        """When the next block is there that can be brought `after_ms`."""
        wait, is_there = copy
        used_ms = self.used_ms
        if is_there:
            return 0.0
        if after_ms < self.now_ms:
            after_ms = self.now_ms
        if wait is not None and wait <= len(used_ms) and used_ms[-wait] > after_ms:
            after_ms = used_ms[-wait]
        self.now_ms = after_ms + takes_ms
        return self.now_ms


def forecast(
    blocks: Sequence[BlockCost], forms: Sequence[Form], ring_bytes: int, scratch_bytes: int, rates: Rates
) -> Forecast:
    """Play passes over `blocks`, in the order they run, and time the last one."""
    rows = _rows(blocks, forms, ring_bytes, scratch_bytes, rates)
    link, restorer = _Stage(), _Stage()
    now = begin = 0.0
    for _ in range(ROUNDS):
        begin = now
        for lead_ms, compute_ms, copy_ms, restore_ms, copy, restore in rows:
            now += lead_ms
            there = 0.0
            if copy is not None:
                there = link.bring(0.0, copy_ms, copy)
            if restore is not None:
                there = restorer.bring(there, restore_ms, restore)
                if copy is not None:
                    link.used_ms.append(there)
            if there > now:
                now = there
            now += compute_ms
            if restore is not None:
                restorer.used_ms.append(now)
            elif copy is not None:
                link.used_ms.append(now)
        now += rates.tail_ms
    link_ms = sum(copy_ms for _, _, copy_ms, *_ in rows)
    restore_ms = sum(restore_ms for _, _, _, restore_ms, *_ in rows)
    return Forecast(
        # What was brought ahead may run out only slowly; in the long run the busier stage decides.
        step_ms=max(now - begin, link_ms, restore_ms),
        compute_ms=sum(block.span_ms for block in blocks) + rates.tail_ms,
        restore_ms=restore_ms,
        link_ms=link_ms,
    )


def _rows(
    blocks: Sequence[BlockCost], forms: Sequence[Form], ring_bytes: int, scratch_bytes: int, rates: Rates
) -> list[tuple[float, float, float, float, _Copy | None, _Copy | None]]:
    """One row a block: lead, compute, copy and restore time, and how it comes into either ring, None where not."""
    streamed = [index for index, form in enumerate(forms) if form.is_streamed]
    packed = [index for index, form in enumerate(forms) if form.is_packed]
    copied = [blocks[index].bytes_as(forms[index]) for index in streamed]
    restored = [blocks[index].moving_bytes for index in packed]
    copies = dict(zip(streamed, _copies(copied, ring_bytes), strict=True))
    restores = dict(zip(packed, _copies(restored, scratch_bytes), strict=True))
    if all(is_there for _, is_there in restores.values()):  # then they are not copied again either
        copies.update((index, (None, True)) for index in packed if index in copies)
    rows = []
    for index, (block, form) in enumerate(zip(blocks, forms, strict=True)):
        copy, restore = copies.get(index), restores.get(index)
        copy_ms = restore_ms = 0.0
        if copy is not None and not copy[1]:
            copy_ms = block.uses * (block.bytes_as(form) / (SUSTAINED * rates.link) + COPY_LATENCY_MS)
        if restore is not None and not restore[1]:
            restore_ms = block.passing_bytes / rates.restore
        toll_ms = COPY_TOLL * copy_ms + RESTORE_TOLL * restore_ms
        rows.append((block.lead_ms, block.compute_ms + toll_ms, copy_ms, restore_ms, copy, restore))
    return rows
