"""A model being streamed: residents, slabs, ring and pipeline of one module, from attach to close.

In: a module taken apart, a device, plans. Out: the module runs with at most the planned bytes on the device. The
session changes nothing of a module but which tensors stand in its parameter and buffer tables, and puts the home
tensors back.

The file is long because it is one state machine. States: `unloaded` (home tensors everywhere) -> `load` -> `loaded`
(residents on the device, streamed weights on the host) -> `running` inside `one_pass`. `unload` and `close` lead back
from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from .block import Block, ModelBlocks, Weight
from .codec import align
from .costs import CostSheet
from .device import Device
from .forecast import Forecast, Form, forecast
from .host_memory import HostMemory
from .loader import BlockLoader, Changed, FileOf
from .meter import Meter, PassTimes
from .moving import MovingBlock, cut_of, packable_dtype
from .pipeline import NoteBound, Pipeline
from .plan import Packing, Plan
from .planner import make_plan
from .ring import Place, Ring
from .staging import Staged, Staging
from .walk import Walk

Progress = Callable[[int, int], None]

# Compute that takes less than this share of what a plan was made for asks for another plan.
FAR_LESS = 0.85

MIB = 1024**2


class Marks(NamedTuple):
    """How the host says what is in a block: a different mark means that its stored bytes are out of date."""

    blocks: tuple[Hashable, ...]
    outside: Hashable


class Session:
    """Streams the blocks of one module on one device. Not thread-safe: it belongs to the thread that runs the model."""

    def __init__(
        self,
        parts: ModelBlocks,
        device: Device,
        keep_home: Callable[[torch.Tensor], bool],
        note_bound: NoteBound = lambda block, is_bound: None,
        host_memory: HostMemory | None = None,
        file_of: FileOf = lambda tensor: None,
    ) -> None:
        """`keep_home(tensor)` says whether a home tensor costs no memory of its own (mapped from a file, say).

        Such a one is kept when a slab holds a copy of it, and read again and again where there is no room for a copy;
        any other is replaced by the slab, so that no weight is in host memory twice. `note_bound` is told, in a pass,
        when a block's weights come to the device and when they go. `host_memory` is what slabs are taken from, without
        bounds where it is not given. `file_of(tensor)` says where a home tensor's bytes lie in a file: they are read
        from there, and what is mapped is not kept in memory beside.
        """
        self.parts = parts
        self.device = device
        self.meter = Meter(device)
        self.plan: Plan | None = None
        self.is_running = False
        self.can_pack = device.packer is not None
        """Whether weights can be packed, as far as a plan has asked for it."""
        self._note_bound = note_bound
        self._loader = BlockLoader(device, keep_home, file_of, host_memory or HostMemory())
        self._costs = CostSheet(parts, device, self.meter, self._loader.packer.packed_bytes)
        self._walk = Walk(range(len(parts.blocks)))
        self._marks: Marks | None = None
        self._weighed: PassTimes | None = None
        self._planned_ms: float | None = None
        self._is_measured = False
        self._moving: dict[int, MovingBlock] = {}
        self._evicted: set[int] = set()
        self._rings: tuple[Ring, Ring] | None = None
        self._pipeline: Pipeline | None = None

    # -- planning ------------------------------------------------------------------------------------------------

    def propose(
        self,
        budget_bytes: int | None,
        *,
        packing: Packing = Packing.AUTO,
        prefetch: int = 0,
        stream_all: bool = False,
        unpacked: Container[int] = (),
    ) -> Plan:
        """Make a plan with what was measured so far; the blocks in `unpacked` are not packed. Otherwise `make_plan`."""
        order = self._costs.order()
        make = partial(
            make_plan,
            self._costs.of(order, unpacked),
            budget_bytes=budget_bytes,
            outside_bytes=self.outside_bytes,
            rates=self._costs.rates,
            prefetch=prefetch,
            stream_all=stream_all,
            present=[self.plan.forms[index] for index in order] if self.plan and self._costs.rates else None,
        )
        plan = make(packing=packing if self.can_pack else Packing.NEVER)
        # Finding out takes a second or more where nothing was compiled before, so it is left until something is packed.
        if plan.is_packed and not self._packer_works():
            self.can_pack = False
            plan = make(packing=Packing.NEVER)
        form_of = dict(zip(order, plan.forms, strict=True))
        return replace(plan, forms=tuple(form_of[index] for index in sorted(order)))

    def _packer_works(self) -> bool:
        packer, dtypes = self.device.packer, {packable_dtype(block) for block in self.parts.blocks}
        return packer is not None and all(packer.works(dtype) for dtype in dtypes if dtype is not None)

    def expect(self, plan: Plan) -> Forecast | None:
        """What `plan` would take by the latest times; None while there are none."""
        rates = self._costs.rates
        if rates is None:
            return None
        order = self._costs.order()
        forms = [plan.forms[index] for index in order]
        return forecast(self._costs.of(order), forms, plan.ring_bytes, plan.scratch_bytes, rates)

    @property
    def is_timed(self) -> bool:
        """True once plans are made from measured times."""
        return self._costs.rates is not None

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def outside_bytes(self) -> int:
        return self.parts.outside.weight_bytes()

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights as laid out."""
        return self.outside_bytes + sum(block.weight_bytes() for block in self.parts.blocks)

    @property
    def resident_bytes(self) -> int:
        """Bytes that weights take of the device now, in blocks and outside, ring and scratch not counted."""
        plan = self.plan
        if plan is None:
            return 0
        blocks = (index for index in range(len(self.parts.blocks)) if index not in self._evicted)
        return plan.outside_bytes + sum(map(self._kept_bytes, blocks))

    def _kept_bytes(self, index: int) -> int:
        """What block `index` has on the device for good."""
        block = self.parts.blocks[index]
        moving = self._moving.get(index)
        if moving is None:
            return block.weight_bytes()
        return block.offset_of(moving.cut) + moving.kept_bytes

    @property
    def ring_bytes(self) -> int:
        """What passing weights take of the device now: as they are copied, and as they are restored."""
        return sum(ring.ring_bytes for ring in self._rings or ())

    @property
    def device_bytes(self) -> int:
        """What the loaded plan takes of the device in a run; more than planned where weights packed badly."""
        assert self.plan is not None
        return self.resident_bytes + self.plan.ring_bytes + self._scratch_bytes

    @property
    def _scratch_bytes(self) -> int:
        assert self.plan is not None
        sizes = [align(moving.raw_bytes) for moving in self._moving.values() if moving.layout]
        return min(sum(sizes), max(self.plan.scratch_bytes, max(sizes, default=0)))

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link in one pass over all blocks; where blocks run several times, at the most."""
        return sum(self._costs.uses(index) * moving.link_bytes for index, moving in self._moved())

    @property
    def in_file_bytes(self) -> int:
        """Bytes of them that are read from their file in each pass."""
        staged = ((index, moving.origin) for index, moving in self._moved() if isinstance(moving.origin, Staged))
        return sum(self._costs.uses(index) * origin.nbytes for index, origin in staged if origin.in_file)

    @property
    def is_packed(self) -> bool:
        """True where any block is restored when it runs."""
        return any(moving.layout is not None for _, moving in self._moved())

    @property
    def packed_resident_bytes(self) -> int:
        """Bytes that packed blocks take of the device for good."""
        return sum(moving.kept_bytes for _, moving in self._moved())

    def _moved(self) -> tuple[tuple[int, MovingBlock], ...]:
        """The blocks that move, by index, in a copy made at one go: sizes are read by other threads, to be shown."""
        return tuple(self._moving.items())

    def places(self) -> list[Place]:
        """The places of a run under way, to be looked at by any thread and changed by none."""
        return [place for ring in self._rings or () for place in ring.places.values()]

    @property
    def host_bytes(self) -> int:
        return self._loader.store.host_bytes

    @property
    def spare_bytes(self) -> int:
        """Bytes of host memory beside that, which make way for anything else: originals of what is changed."""
        return self._loader.originals.size_bytes

    @property
    def page_locked_bytes(self) -> int:
        return self._loader.store.page_locked_bytes

    @property
    def changed_bytes(self) -> int:
        """What slabs of changed weights take of host memory."""
        return self._loader.changed_bytes

    # -- loading -------------------------------------------------------------------------------------------------

    def shelve(self) -> None:
        """From the next load on, keep page-locked copies of residents too, so that they come back at link speed."""
        self._loader.host_room.is_shelving = True

    def load(
        self,
        plan: Plan,
        *,
        marks: Marks | None = None,
        changed: Changed = lambda weight: None,
        will_change: Callable[[Weight], bool] = lambda weight: False,
        progress: Progress = lambda done, total: None,
        afresh: bool = False,
        all_in_slabs: bool = False,
    ) -> bool:
        """Bring the module to `plan`, whose forms are in the order of the blocks: residents on the device, streamed
        weights in slabs, or left in their file where host memory is short. `changed` gives what a weight is to hold
        instead of its home tensor, and `will_change` says whether it would, to have that read ahead. `all_in_slabs` is
        for weights that will be changed in place.

        What already is as the plan wants it, with the same mark, is left alone, unless all is to be brought to the
        device `afresh`, which leaves no holes between what stays and what comes. Gives whether anything was not. Raises
        torch.OutOfMemoryError when the device refuses; the session is then unloaded.
        """
        assert not self.is_running, "a plan cannot change inside a pass"
        marks = marks or Marks((None,) * len(self.parts.blocks), None)
        is_there = plan == self.plan and marks == self._marks and not self._evicted
        if is_there and not afresh and plan.is_resident and not self.host_bytes:
            return False  # nor has host memory anything to give up
        was_in_run = self.is_in_run
        self.end_run()
        previous, old, evicted = self.plan, self._marks, set(self._evicted)
        self.plan = self._marks = None
        blocks, host_room = self.parts.blocks, self._loader.host_room
        was_in_file = host_room.in_file
        unchanged = [index for index, mark in enumerate(marks.blocks) if mark is None and not all_in_slabs]
        host_room.choose_in_file(self._slab_sizes(plan), {index: blocks[index] for index in unchanged})
        self._loader.passing_bytes = plan.ring_bytes + plan.scratch_bytes
        self._loader.originals.relieve()
        try:
            stale = [
                index
                for index in range(len(blocks))
                if afresh
                or previous is None
                or old is None
                or index in evicted
                or previous.forms[index] is not plan.forms[index]
                or old.blocks[index] != marks.blocks[index]
                or (index in was_in_file) != (index in host_room.in_file)
                or (all_in_slabs and self._loader.is_on_file(index))
            ]
            is_outside_stale = afresh or old is None or old.outside != marks.outside
            # What goes is given back before anything comes, so that the sum never exceeds the larger of both plans.
            for block in [blocks[index] for index in stale] + [self.parts.outside] * is_outside_stale:
                block.to_host()
            if stale:
                self.device.trim()
            if is_outside_stale:
                self._loader.keep_outside(self.parts.outside, marks.outside, changed, will_change)
            self._load_blocks(plan, stale, marks, changed, will_change, progress)
            if marks != old and self.spare_bytes:
                patched = [block for block, mark in zip(blocks, marks.blocks, strict=True) if mark is not None]
                self._loader.keep_originals([*patched, self.parts.outside], will_change)
            self.device.compute_stream().synchronize()  # slabs may be written again from now on
        except BaseException:
            self.unload()
            with suppress(RuntimeError):  # a device that fails in this too has nothing under way
                self.device.compute_stream().synchronize()  # changed weights may be on their way into slabs
            raise
        finally:
            self._loader.finish()
        self.plan, self._marks = plan, marks
        self._evicted.clear()
        # Between runs all that was measured is behind the choice of a plan. One that is made inside a run is measured
        # once more, since it was made by the first times.
        is_known = self._is_measured and not was_in_run
        if previous != plan:
            self.meter.begin_plan(is_known)
        if is_known or previous != plan:
            self._begin_measuring(is_known)
        progress(self.total_bytes, self.total_bytes)
        return bool(stale) or is_outside_stale

    def home_on_device(self, weight: Weight) -> torch.Tensor | None:
        """For `changed` to work from: a copy of the home tensor, brought to the device faster than one by one from the
        pages of a mapped file. It stays until the next call. None where that is not to be had: it takes no more than
        ring and scratch will in a run.
        Raises torch.OutOfMemoryError.
        """
        return self._loader.home_on_device(weight)

    def _slab_sizes(self, plan: Plan) -> dict[int, int]:
        """Bytes of the slabs that `plan` asks for, in the order in which blocks run."""
        return self._sizes(plan, [index for index in self._costs.order() if plan.forms[index].is_streamed])

    def _sizes(self, plan: Plan, indices: Sequence[int]) -> dict[int, int]:
        """Bytes that what moves of those blocks takes by `plan`, packed or raw, as far as they are known."""
        return {
            index: cost.packed_bytes if plan.forms[index].is_packed and cost.packed_bytes else cost.moving_bytes
            for index, cost in zip(indices, self._costs.of(indices), strict=True)
        }

    def _load_blocks(
        self,
        plan: Plan,
        stale: list[int],
        marks: Marks,
        changed: Changed,
        will_change: Callable[[Weight], bool],
        progress: Progress,
    ) -> None:
        blocks, total = self.parts.blocks, self.total_bytes
        done = total - sum(blocks[index].weight_bytes() for index in stale)
        for index in stale:
            self._moving.pop(index, None)
            self._loader.keep_first(blocks[index], cut_of(blocks[index]), changed)
        # Packing wants device memory that raw residents will have afterwards, so it comes first. So does working out
        # what changed weights are, which goes on between residents: what stays has its memory before, lest what is
        # worked on leave holes that the next has no room in.
        stale.sort(key=lambda index: (not plan.forms[index].is_packed, not plan.forms[index].is_streamed))
        staying = {
            form: [index for index in stale if plan.forms[index] is form] for form in Form if not form.is_streamed
        }
        coming = [(index, blocks[index], plan.forms[index], marks.blocks[index]) for index in stale]
        for number, (index, block, form, mark) in enumerate(coming):
            if not form.is_packed:
                self._loader.packer.finish()
            if kept := staying.pop(form, None):  # this is their first
                self._loader.reserve(self._sizes(plan, kept))
            self._loader.look_ahead(coming[number:], will_change)
            moving = self._loader.place(index, block, form, mark, changed)
            if moving is not None:
                self._moving[index] = moving
            done += block.weight_bytes()
            progress(done, total)
        if any(plan.forms[index].is_packed for index in stale):
            self._loader.packer.finish()
            self.device.trim()

    # -- running -------------------------------------------------------------------------------------------------

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """The scope of one forward pass of the module. Left by an exception it ends as clean as otherwise.

        A pass within a pass belongs to the outer one. Raises torch.OutOfMemoryError when the ring does not fit.
        """
        assert self.plan is not None and not self._evicted, "load a plan before the first pass"
        if self.is_running or self.plan.is_resident:
            yield
            return
        pipeline = self._pipeline or self._start_run()
        self.is_running = True
        whole = False
        try:
            pipeline.begin_pass()
            yield
            whole = True
        finally:
            self.is_running = False
            pipeline.end_pass(whole)

    def _start_run(self) -> Pipeline:
        assert self.plan is not None
        copied = {index: moving.link_bytes for index, moving in self._moving.items() if moving.origin is not None}
        restored = {index: moving.raw_bytes for index, moving in self._moving.items() if moving.layout is not None}
        if self._walk.blocks != self._moving.keys():
            self._walk = Walk([index for index in self._costs.order() if index in self._moving])
        try:
            ring = Ring(self.device, copied, self._walk.order, self.plan.ring_bytes)
            scratch = Ring(self.device, restored, self._walk.order, self._scratch_bytes)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the blocks that stream need {self.plan.ring_bytes / MIB:.0f} MiB of the device to pass through and "
                f"{self._scratch_bytes / MIB:.0f} MiB to be restored in, in one piece each, and "
                f"{self.device.free_bytes() / MIB:.0f} MiB are free: free more, or load a plan for a smaller budget"
            ) from error
        staged = {index: moving.source for index, moving in self._moving.items() if isinstance(moving.source, Staged)}
        staging = Staging(self.device, self._loader.store.host_memory, staged) if staged else None
        self._rings = ring, scratch
        self._pipeline = Pipeline(
            self.device,
            self.parts.blocks,
            self._moving,
            ring,
            scratch,
            staging,
            self._walk,
            self.meter,
            self._note_bound,
        )
        return self._pipeline

    def measure(self) -> bool:
        """Between passes of a run: take the first times under this plan as soon as there are some, waiting for the
        device; True when it did, and when later ones show that compute takes far less than the plan was made for.
        """
        if not self.device.has_clock or not self.is_in_run:
            return False
        if self.meter.is_due:
            self.meter.close_trace(self.device.compute_stream())
            self.meter.collect(wait=True)
        best = self.meter.best
        if best is None or best is self._weighed:
            return False
        self._weighed = best
        if self._planned_ms is not None and best.busy_ms > FAR_LESS * self._planned_ms:
            return False
        self._planned_ms, self._is_measured = best.busy_ms, True
        return True

    @property
    def times(self) -> PassTimes | None:
        """What plans are made by; None until passes were measured."""
        return self.meter.best

    def take_times(self, times: PassTimes | None) -> None:
        """Take note that passes take other times from now on: those of an earlier run, or None if they are not known.

        Then the next are measured as the first were.
        """
        self.meter.take_times(times)
        self._is_measured = times is not None
        self._begin_measuring(self._is_measured)

    def _begin_measuring(self, is_known: bool) -> None:
        """Take note of what the plan in place was made for, if that is known."""
        best = self.meter.best
        self._planned_ms = best.busy_ms if is_known and best is not None else None
        self._weighed = best

    def begin_run(self) -> None:
        """Take the memory of the ring now; otherwise the first pass does.

        Raises torch.OutOfMemoryError when it does not fit.
        """
        if self._pipeline is None and self.plan is not None and not self.plan.is_resident:
            self._start_run()

    def end_run(self) -> None:
        """Give the ring back, after the copies under way. The next pass makes a new one."""
        assert not self.is_running
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = self._rings = None

    def discard_fetched(self) -> None:
        """Forget what was fetched ahead, because host tensors are about to be changed in place."""
        if self._pipeline is not None:
            self._pipeline.discard()

    def evict(self, size_bytes: int) -> int:
        """Between runs, take residents of whole blocks off the device, last blocks first; give the bytes freed.

        The plan stands; `load` brings them back.
        """
        self.end_run()
        freed = 0
        for index in reversed(range(len(self.parts.blocks))):
            if freed >= size_bytes or self.plan is None:
                break
            if index not in self._evicted and self._kept_bytes(index) > 0:
                self.parts.blocks[index].to_host()
                self._evicted.add(index)
                freed += self._kept_bytes(index)
        return freed

    @property
    def is_in_run(self) -> bool:
        """True between the first pass of a run and the end of the run."""
        return self._pipeline is not None

    def moving_modules(self) -> set[torch.nn.Module]:
        """The modules that hold a weight which is on the device only while its block runs."""
        return {
            site.module
            for moving in self._moving.values()
            for weight in moving.block.weights[moving.cut :]
            for site in weight.sites
        }

    def differing_blocks(self) -> set[Block]:
        """The blocks in whose modules there are other weights than they run with, while they do not run."""
        return {moving.block for moving in self._moving.values() if moving.differs}

    # -- leaving -------------------------------------------------------------------------------------------------

    def unload(self) -> None:
        """Leave the device: home tensors everywhere, slabs kept for the next load."""
        self.end_run()
        for block in (*self.parts.blocks, self.parts.outside):
            block.to_host()
        self.forget()

    def forget(self) -> None:
        """Take note that someone else has put other tensors into the module: nothing of ours is loaded any more."""
        self.end_run()
        self._moving.clear()
        self._evicted.clear()
        self.plan = self._marks = None

    def close(self) -> None:
        """Unload and unlock the host memory; home tensors that lie in a slab live on. Safe to call twice."""
        self.unload()
        self._loader.close()

    def check(self) -> None:
        """Prove that bytes, places and tensors add up."""
        for ring in self._rings or ():
            ring.check()
        if self.plan is None:
            return
        for index, moving in self._moving.items():
            form = self.plan.forms[index]
            assert (moving.origin is not None) == form.is_streamed, f"block {index} streams other than planned"
            if not self.is_running:
                for weight in moving.block.weights[moving.cut :]:
                    assert weight.current().device.type == "cpu", f"{weight.keys[0]} is not on the host"
