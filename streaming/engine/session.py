"""A model being streamed: residents, slabs, ring and pipeline of one module, from attach to close.

In: a module taken apart, a device, plans. Out: the module runs with at most the planned bytes on the device. The
session changes nothing of a module but which tensors stand in its parameter and buffer tables, and puts the home
tensors back.

States: `unloaded` (home tensors everywhere) -> `load` -> `loaded` (residents on the device, streamed weights on the
host) -> `running` inside `one_pass`. `unload` and `close` lead back from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .block import ModelBlocks
from .device import Device
from .loader import BlockLoader, Changed, StreamedBlock
from .meter import Meter
from .pipeline import Pipeline
from .plan import BlockSizes, Plan
from .ring import Ring
from .walk import Walk

Progress = Callable[[int, int], None]


class Marks(NamedTuple):
    """How the host says what is in a block: a different mark means that its stored bytes are out of date."""

    blocks: tuple[Hashable, ...]
    outside: Hashable


class Session:
    """Streams the blocks of one module on one device. Not thread-safe: it belongs to the thread that runs the model."""

    def __init__(self, parts: ModelBlocks, device: Device, keep_home: Callable[[torch.Tensor], bool]) -> None:
        """`keep_home(tensor)` says whether a home tensor costs no memory of its own (mapped from a file, say).

        Such a one is kept when a slab holds a copy of it; any other is replaced by the slab, so that no weight is in
        host memory twice.
        """
        self.parts = parts
        self.device = device
        self.meter = Meter(device)
        self.plan: Plan | None = None
        self.is_running = False
        self._loader = BlockLoader(device, keep_home)
        self._walk = Walk(range(len(parts.blocks)))
        self._marks: Marks | None = None
        self._streamed: dict[int, StreamedBlock] = {}
        self._evicted: set[int] = set()
        self._ring: Ring | None = None
        self._pipeline: Pipeline | None = None

    # -- sizes ---------------------------------------------------------------------------------------------------

    def sizes(self, is_timed: bool = False) -> list[BlockSizes]:
        """What the planner needs to know, with the blocks' compute times as far as they were measured and asked for."""
        times = self.meter.times if is_timed else {}
        return [
            BlockSizes(
                block.name,
                tuple(weight.end - weight.offset for weight in block.weights),
                (times[index].compute_ms or 0.0) if index in times else 0.0,
            )
            for index, block in enumerate(self.parts.blocks)
        ]

    @property
    def outside_bytes(self) -> int:
        return self.parts.outside.weight_bytes()

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights as laid out."""
        return self.outside_bytes + sum(block.weight_bytes() for block in self.parts.blocks)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on the device now, in blocks and outside."""
        if self.plan is None:
            return 0
        evicted = sum(self._kept_bytes(index) for index in self._evicted)
        return self.plan.outside_bytes + self.plan.resident_bytes - evicted

    def _kept_bytes(self, index: int) -> int:
        assert self.plan is not None
        return self.parts.blocks[index].offset_of(self.plan.cuts[index])

    @property
    def ring_bytes(self) -> int:
        return self._ring.ring_bytes if self._ring else 0

    @property
    def slot_bytes(self) -> int:
        """What the largest streamed block takes of the link, and so of a slot."""
        return max((streamed.source.nbytes for streamed in self._streamed.values()), default=0)

    @property
    def _scratch_bytes(self) -> int:
        return max((streamed.raw_bytes for streamed in self._streamed.values() if streamed.layout), default=0)

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link in one pass over all blocks."""
        return sum(streamed.source.nbytes for streamed in self._streamed.values())

    @property
    def host_bytes(self) -> int:
        return self._loader.store.host_bytes

    @property
    def page_locked_bytes(self) -> int:
        return self._loader.store.page_locked_bytes

    # -- loading -------------------------------------------------------------------------------------------------

    def load(
        self,
        plan: Plan,
        *,
        marks: Marks | None = None,
        changed: Changed = lambda weight: None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Bring the module to `plan`: residents on the device, streamed weights in slabs.

        What already is as the plan wants it, with the same mark, is left alone. Raises torch.OutOfMemoryError when the
        device refuses; the session is then unloaded.
        """
        assert not self.is_running, "a plan cannot change inside a pass"
        marks = marks or Marks((None,) * len(self.parts.blocks), None)
        self.end_run()
        total, done = self.total_bytes, 0
        previous, old = self.plan, self._marks
        self.plan = self._marks = None
        try:
            stale = [
                previous is None
                or old is None
                or index in self._evicted
                or (previous.cuts[index], previous.is_packed) != (plan.cuts[index], plan.is_packed)
                or old.blocks[index] != marks.blocks[index]
                for index in range(len(self.parts.blocks))
            ]
            # What goes is given back before anything comes, so that the sum never exceeds the larger of both plans.
            for index, block in enumerate(self.parts.blocks):
                if stale[index] and previous is not None:
                    block.to_device(torch.device("cpu"))
            # Streamed weights first: packing them wants device memory that residents will have afterwards.
            for index, block in enumerate(self.parts.blocks):
                if stale[index]:
                    self._streamed.pop(index, None)
                    if plan.streamed[index]:
                        self._streamed[index] = self._loader.stream(
                            index, block, plan.cuts[index], marks.blocks[index], changed, plan.is_packed
                        )
                done += plan.streamed[index]
                progress(done, total)
            self._loader.finish()
            for index, block in enumerate(self.parts.blocks):
                if stale[index]:
                    self._loader.keep(block, plan.cuts[index], changed)
                done += block.offset_of(plan.cuts[index])
                progress(done, total)
            if old is None or old.outside != marks.outside:
                self.parts.outside.to_device(torch.device("cpu"))
                self._loader.keep(self.parts.outside, len(self.parts.outside.weights), changed)
            progress(total, total)
        except BaseException:
            self.unload()
            raise
        finally:
            self._loader.finish()
        self.plan, self._marks = plan, marks
        self._evicted.clear()
        if previous is None or previous.cuts != plan.cuts:
            self.meter.forget_times()

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
            pipeline.end_pass(whole)
            self.is_running = False

    def _start_run(self) -> Pipeline:
        assert self.plan is not None
        self._ring = Ring(self.device, self.plan.slots, self.slot_bytes, self._scratch_bytes)
        self._pipeline = Pipeline(
            self.device, self._streamed, self._ring, self._walk_for_plan(), self.plan.prefetch, self.meter
        )
        return self._pipeline

    def _walk_for_plan(self) -> Walk:
        """The walk as learned so far, as long as it is over the blocks that stream now."""
        if set(self._walk.order) != set(self._streamed):
            self._walk = Walk(sorted(self._streamed))
        return self._walk

    def end_run(self) -> None:
        """Give the ring back, after the copies under way. The next pass makes a new one."""
        assert not self.is_running
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = self._ring = None

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
                self.parts.blocks[index].to_device(torch.device("cpu"))
                self._evicted.add(index)
                freed += self._kept_bytes(index)
        return freed

    @property
    def is_in_run(self) -> bool:
        """True between the first pass of a run and the end of the run."""
        return self._pipeline is not None

    def streamed_modules(self) -> set[torch.nn.Module]:
        """The modules that hold a streamed weight."""
        return {
            site.module
            for streamed in self._streamed.values()
            for weight, _ in streamed.host_tensors
            for site in weight.sites
        }

    # -- leaving -------------------------------------------------------------------------------------------------

    def unload(self) -> None:
        """Leave the device: home tensors everywhere, slabs kept for the next load."""
        self.end_run()
        for block in (*self.parts.blocks, self.parts.outside):
            block.to_device(torch.device("cpu"))
        self.forget()

    def forget(self) -> None:
        """Take note that someone else has put other tensors into the module: nothing of ours is loaded any more."""
        self.end_run()
        self._streamed.clear()
        self._evicted.clear()
        self.plan = self._marks = None

    def close(self) -> None:
        """Unload and unlock the host memory; home tensors that lie in a slab live on. Safe to call twice."""
        self.unload()
        self._loader.close()

    def check(self) -> None:
        """Prove that bytes, slots and tensors add up."""
        if self._ring is not None:
            self._ring.check()
        if self.plan is None:
            return
        for index, streamed in self._streamed.items():
            assert streamed.raw_bytes == self.plan.streamed[index], f"block {index} streams other than planned"
            if not self.is_running:
                for weight, tensor in streamed.host_tensors:
                    assert weight.current() is tensor, f"{weight.keys[0]} does not hold its host tensor"

