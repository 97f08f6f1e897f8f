"""Which blocks stay, stream, and travel packed, for one size of the rings: the arithmetic behind a plan.

In: the blocks' costs and what is known of rates. Out: plans, each with what it is expected to take.

The reasoning, all of it linear: of `moving` bytes, what the budget does not hold must cross the link in every pass. As
long as it crosses while the blocks compute, streaming costs nothing. Where it does not, packing makes the link's part
0.67 of the size, first of what streams, then, where that is not enough, of what stays as well, so that more stays;
both cost some of the time that restoring them takes. So as little is packed as lets the link keep pace.
What streams is spread over the walk by compute time, so that the link is as busy under every block. What runs several
times in a pass crosses as often.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import NamedTuple

from .codec import align
from .forecast import RESTORE_TOLL, SUSTAINED, BlockCost, Form, Rates, forecast
from .plan import Packing, Plan

# The fewest places of the largest size that a ring must have: one computes while the next one comes.
LEAST_DEPTH = 2

FITTING_ROUNDS = 8

# Packing a block takes this many times its size of device memory; what ring and scratch will have serves.
PACKING_ROOM = 2.35

# How far, in sizes of the block, the spread may be off before a block leaves the form it has: moving costs time and
# leaves holes in the device's memory.
INERTIA = 0.4

# The smallest blocks for their uses stay, as far as this share of the room for residents goes: a use costs the host the
# same time whatever the block's size.
SMALL_SHARE = 0.5

FORMS = {(form.is_streamed, form.is_packed): form for form in Form}


class _Division(NamedTuple):
    """A budget divided: which share of what streams and of what stays is packed, the ring, and room for residents."""

    pack: float
    pack_kept: float
    ring_bytes: int
    room_bytes: float


class Residency:
    """The arithmetic of one model."""

    def __init__(
        self,
        blocks: Sequence[BlockCost],
        outside_bytes: int,
        rates: Rates | None,
        packing: Packing,
        present: Sequence[Form] | None,
    ) -> None:
        self.blocks = blocks
        self.outside_bytes = outside_bytes
        self.fixed_bytes = sum(block.fixed_bytes for block in blocks)
        self.moving_bytes = sum(block.moving_bytes for block in blocks)
        self.uses = sum(block.passing_bytes for block in blocks) / self.moving_bytes if self.moving_bytes else 1.0
        self.rates = rates
        self.packing = packing
        self.present: Sequence[Form | None] = present or [None] * len(blocks)
        is_timed = rates is not None and sum(block.span_ms for block in blocks) > 0
        self.spans = [block.span_ms if is_timed else float(block.moving_bytes) for block in blocks]
        self.compute_ms = sum(block.span_ms for block in blocks) + (rates.tail_ms if rates else 0.0)
        self.by_size = sorted(range(len(blocks)), key=lambda index: blocks[index].moving_bytes)
        self.by_size_a_use = sorted(self.by_size, key=lambda index: blocks[index].moving_bytes / blocks[index].uses)
        self.giants = _giants(blocks, self.by_size)
        # Kept, since they are asked for once a block of every plan that is tried: sizes as they are, packed, in a pass.
        self._raw_bytes = [block.moving_bytes for block in blocks]
        self._packed_bytes = [block.packed_bytes or 0 for block in blocks]
        self._passing_bytes = [block.passing_bytes for block in blocks]
        self._may_pack = [
            block.packed_bytes is not None and block.moving_bytes > 0 and index not in self.giants
            for index, block in enumerate(blocks)
        ]
        self._largest = {is_packed: self._find_largest(is_packed) for is_packed in (False, True)}
        packable = [block for block in blocks if block.packed_bytes is not None]
        raw_bytes = sum(block.moving_bytes for block in packable)
        self.packed_share = sum(block.packed_bytes or 0 for block in packable) / raw_bytes if raw_bytes else 1.0
        self.can_pack = packing is not Packing.NEVER and self.packed_share < 1.0

    # -- plans from forms ----------------------------------------------------------------------------------------

    def plan(self, forms: Sequence[Form], ring_bytes: int, scratch_places: float) -> Plan:
        """Add up what `forms` take, with a scratch that holds so many of the largest packed blocks."""
        kept_bytes = streamed_bytes = link_bytes = places_bytes = packed_bytes = largest_bytes = 0
        sizes = zip(self.blocks, forms, self._raw_bytes, self._packed_bytes, self._passing_bytes, strict=True)
        for block, form, raw, packed, passing in sizes:
            size = packed if form.is_packed else raw
            if form.is_streamed:
                streamed_bytes += passing
                link_bytes += block.uses * size
                places_bytes += align(size)
            else:
                kept_bytes += size
            if form.is_packed:
                assert block.packed_bytes is not None, f"`{block.name}` cannot be packed"
                place = align(raw)
                packed_bytes += place
                if place > largest_bytes:
                    largest_bytes = place
        scratch_bytes = min(align(int(scratch_places * largest_bytes)), packed_bytes)
        return Plan(
            forms=tuple(forms),
            outside_bytes=self.outside_bytes,
            resident_bytes=self.fixed_bytes + kept_bytes,
            streamed_bytes=streamed_bytes,
            link_bytes=link_bytes,
            ring_bytes=max(min(ring_bytes, places_bytes), int(PACKING_ROOM * largest_bytes) - scratch_bytes),
            scratch_bytes=scratch_bytes,
        )

    def with_forecast(self, plan: Plan) -> Plan:
        if self.rates is None:
            return plan
        expected = forecast(self.blocks, plan.forms, plan.ring_bytes, plan.scratch_bytes, self.rates)
        return replace(plan, expected=expected)

    def largest(self, is_packed: bool) -> int:
        """Bytes of the largest block on the link."""
        return self._largest[is_packed]

    def _find_largest(self, is_packed: bool) -> int:
        sizes = (
            block.packed_bytes if is_packed and block.packed_bytes is not None else block.moving_bytes
            for index, block in enumerate(self.blocks)
            if index not in self.giants
        )
        return align(max(sizes, default=0))

    def stream_everything(self, depth: int, pace: float, scratch_places: float) -> Plan:
        """The plan that takes least of the device."""
        pack, _ = self._shares(0.0, pace)
        streamed = {index for index, block in enumerate(self.blocks) if block.moving_bytes and index not in self.giants}
        forms = self._packed(streamed, pack, 0.0)
        ring_bytes = depth * self.largest(is_packed=pack == 1.0)
        return self.with_forecast(self.plan(forms, ring_bytes, scratch_places))

    # -- how much streams and how much is packed -----------------------------------------------------------------

    def _shares(self, room_bytes: float, pace: float) -> tuple[float, float]:
        """Which share of the streamed and of the resident bytes to pack, with `room_bytes` for residents."""
        if not self.can_pack:
            return 0.0, 0.0
        if self.packing is Packing.ALWAYS:
            return 1.0, 1.0
        if self.rates is None:
            return 0.0, 0.0
        room_bytes = max(0.0, room_bytes)
        link, restore = SUSTAINED * self.rates.link / self.uses, self.rates.restore / self.uses
        saved, cost = (1 - self.packed_share) / link, pace * RESTORE_TOLL / restore
        streamed = self.moving_bytes - room_bytes
        behind_ms = streamed / link - pace * self.compute_ms
        if behind_ms <= 0 or streamed <= 0:
            return 0.0, 0.0
        share = behind_ms / (streamed * (saved + cost))
        if share <= 1.0:
            return share, 0.0
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            resident = self._resident_bytes(room_bytes, middle)
            link_ms = (self.moving_bytes - resident) * self.packed_share / link
            restored = self.moving_bytes - resident * (1 - middle)
            if link_ms > pace * (self.compute_ms + RESTORE_TOLL * restored / restore):
                low = middle
            else:
                high = middle
        return 1.0, high

    def _resident_bytes(self, room_bytes: float, packed: float) -> float:
        """How many bytes of weights `room_bytes` hold when the share `packed` of them is packed."""
        return min(float(self.moving_bytes), room_bytes / (1 - packed * (1 - self.packed_share)))

    def _divide(self, budget_bytes: int, depth: int, pace: float, scratch_places: float) -> _Division:
        held_bytes = self.outside_bytes + self.fixed_bytes
        pack, pack_kept = self._shares(budget_bytes - held_bytes - depth * self.largest(False), pace)
        ring_bytes = depth * self.largest(is_packed=pack == 1.0)
        scratch_bytes = int(scratch_places * self.largest(is_packed=False)) if pack or pack_kept else 0
        return _Division(pack, pack_kept, ring_bytes, float(budget_bytes - held_bytes - ring_bytes - scratch_bytes))

    def within(self, budget_bytes: int, depth: int, pace: float, scratch_places: float) -> Plan | None:
        """A plan for the budget with a ring of `depth` places; None when the ring leaves no room."""
        pack, pack_kept, ring_bytes, room_bytes = self._divide(budget_bytes, depth, pace, scratch_places)
        best: Plan | None = None
        # Blocks are whole and the spread leaves some of it where the link has nothing to do, so what comes out differs
        # from what was asked for; asking differently, as a secant says, closes the gap. Where blocks that compute long
        # have few bytes, more than all must be asked for before enough of the others streams.
        low, high, slope, last = 0.0, room_bytes, 1.0, (room_bytes, 0.0)
        for _ in range(FITTING_ROUNDS):
            streamed = self.moving_bytes - self._resident_bytes(room_bytes, pack_kept)
            plan = self.plan(self._spread(streamed, pack, pack_kept, ring_bytes), ring_bytes, scratch_places)
            over_bytes = plan.device_bytes - budget_bytes
            if over_bytes <= 0 and (best is None or plan.device_bytes > best.device_bytes):
                best = plan
            if -self.largest(False) < over_bytes <= 0:
                break
            low, high = (low, room_bytes) if over_bytes > 0 else (room_bytes, high)
            if room_bytes != last[0] and over_bytes != last[1]:
                slope = (over_bytes - last[1]) / (room_bytes - last[0])
            last = room_bytes, float(over_bytes)
            room_bytes -= (over_bytes + self.largest(False) / 2) / slope
            if room_bytes <= low == 0.0:
                low = -float(self.moving_bytes)
            if not low < room_bytes < high:
                room_bytes = (low + high) / 2
        return None if best is None else self.filled(best, budget_bytes, scratch_places)

    def lightest(self, budget_bytes: int, depth: int, pace: float, scratch_places: float) -> Plan | None:
        """The same where what crosses most often stays, wherever in the walk that is."""
        pack, pack_kept, ring_bytes, room_bytes = self._divide(budget_bytes, depth, pace, scratch_places)
        streamed = {index for index, block in enumerate(self.blocks) if block.moving_bytes} - self.giants
        for index in sorted(self.by_size, key=lambda index: -self.blocks[index].uses):
            if index in streamed and self.blocks[index].moving_bytes <= room_bytes:
                room_bytes -= self.blocks[index].moving_bytes
                streamed.remove(index)
        plan = self.plan(self._packed(streamed, pack, pack_kept), ring_bytes, scratch_places)
        return self.filled(plan, budget_bytes, scratch_places) if plan.device_bytes <= budget_bytes else None

    def _spread(self, streamed_bytes: float, pack: float, pack_kept: float, ring_bytes: float) -> list[Form]:
        """Deal the forms out by error diffusion: each block streams as the time so far asks for.

        What a block cannot give, because blocks are whole, its successors make up for, but no more of it than the
        ring can hold ahead: a link that had nothing to do cannot catch up later.
        """
        stay = self.giants | self._small_ones(SMALL_SHARE * (self.moving_bytes - streamed_bytes))
        per_span = self.uses * streamed_bytes / (sum(self.spans) or 1.0)
        owed = 0.0
        streamed = set()
        for index, (size, span) in enumerate(zip(self._passing_bytes, self.spans, strict=True)):
            owed += per_span * span
            if owed > ring_bytes + size:
                owed = ring_bytes + size
            if size > 0 and index not in stay:
                present = self.present[index]
                inertia = 0.0 if present is None else -INERTIA if present.is_streamed else INERTIA
                if owed >= (0.5 + inertia) * size:
                    owed -= size
                    streamed.add(index)
        return self._packed(streamed, pack, pack_kept)

    def _packed(self, streamed: Container[int], pack: float, pack_kept: float) -> list[Form]:
        """Forms in which the shares `pack` of the streamed bytes and `pack_kept` of the others are packed."""
        owed = owed_kept = 0.0
        forms = []
        for index, (size, may_pack) in enumerate(zip(self._raw_bytes, self._may_pack, strict=True)):
            if index in streamed:
                form = Form.STREAMED
                if may_pack:
                    owed += pack * size
                    if owed >= size / 2:
                        owed -= size
                        form = Form.STREAMED_PACKED
            else:
                form = Form.RESIDENT
                if may_pack:
                    owed_kept += pack_kept * size
                    if owed_kept >= size / 2:
                        owed_kept -= size
                        form = Form.RESIDENT_PACKED
            forms.append(form)
        return forms

    def _small_ones(self, room_bytes: float) -> set[int]:
        """The smallest blocks for their uses that together fit `room_bytes`, none larger than half of the largest."""
        small: set[int] = set()
        most_bytes = self.largest(is_packed=False) // 2
        for index in self.by_size_a_use:
            block = self.blocks[index]
            room_bytes -= block.moving_bytes
            if room_bytes < 0 or block.moving_bytes > block.uses * most_bytes:
                break
            small.add(index)
        return small

    def filled(self, plan: Plan, budget_bytes: int, scratch_places: float) -> Plan:
        """Use what whole blocks left over: keep more of them, as long as they fit."""
        spare = budget_bytes - plan.device_bytes
        forms = list(plan.forms)
        streamed = [index for index, form in enumerate(forms) if form.is_streamed]
        # Largest first fills best; of equal ones those in the middle of the walk, far from where blocks are fetched.
        streamed.sort(key=lambda index: (-self.blocks[index].moving_bytes, abs(index - len(forms) / 2)))
        for index in streamed:
            form = FORMS[False, forms[index].is_packed]
            size = self.blocks[index].bytes_as(form)
            if 0 < size <= spare:
                forms[index] = form
                spare -= size
        return self.with_forecast(self.plan(forms, plan.ring_bytes, scratch_places))


def _giants(blocks: Sequence[BlockCost], by_size: Sequence[int]) -> set[int]:
    """The blocks so much larger than the others that keeping them takes less room than a ring that they fit."""
    kept_bytes, count = 0, 0
    best_bytes = sum(align(block.moving_bytes) for block in blocks)
    for number, index in enumerate(reversed(by_size)):
        size = align(blocks[index].moving_bytes)
        if kept_bytes + LEAST_DEPTH * size < best_bytes:
            best_bytes, count = kept_bytes + LEAST_DEPTH * size, number
        kept_bytes += size
    return set(by_size[len(by_size) - count :])
