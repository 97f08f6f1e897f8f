"""Whatever is done to a session in whatever order, a pass gives the bits of the resident model, and nothing is left.

Each seed is a walk of steps at random: plans, changed weights, passes that go other ways or break off, ceilings on RAM,
loads and reads that fail. A walk that fails says what it did.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import bounce, mapped, originals, store
from layerstream.streaming.engine.block import Weight, take_apart
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory, HostMemoryFull
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks, Session

from mapped_walker import MappedWalker
from refusing_device import RefusingDevice
from walkers import make_input, make_walker, plan_for

SEEDS, STEPS = 60, 60

COUNT, SIZES = 6, {"width": 160, "inner": (256, 640)}
CARD_BYTES = 1 << 30
STRENGTHS = (None, None, 0.7, 1.3)
CHANGED = ("norm.weight", "up.weight", "entry.weight")  # one that stays on the device, one that moves, one outside


class BrokenOff(Exception):
    """What a model or a patch raises in the midst of its work."""


class Ended(BaseException):
    """What no hook is called after, as when someone ends the process from the keyboard."""


class Disk:
    """Reads as the system does, in small pieces, and fails after `left` of them if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.has_failed = False
        """What is read ahead in one pass may be asked for, and so fail, in another."""
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, descriptor: int, buffers: list[memoryview], position: int) -> int:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.has_failed = True
                raise OSError("the disk is gone")
        return self._read(descriptor, [buffers[0][:60_000]], position)


class PickyDevice(RefusingDevice):
    """Locks pages of files `file_locks` times and refuses them then."""

    file_locks = 0

    def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
        self.file_locks -= is_file
        return not (is_file and self.file_locks < 0) and super().page_lock(memory, is_file)


class SessionWalk:
    """A session, and beside it a resident model with the same weights."""

    def __init__(self, seed: int, disk: Disk, folder: Path) -> None:
        self.chance, self.disk, self.done = random.Random(seed), disk, list[str]()
        self.resident = make_walker(count=COUNT, **SIZES)
        self.originals = {name: tensor.clone() for name, tensor in self.resident.named_parameters()}
        self.input = make_input(self.resident)
        self.can_pack, is_mapped = self._likely(0.5), self._likely(0.5)
        self.device = PickyDevice(CARD_BYTES, seed, PlainPacker() if self.can_pack else None)
        self.device.file_locks = self.chance.choice((0, 1, 20, 100_000))
        self.ceilings = Ceilings()
        self.host_memory = HostMemory(lambda: self.ceilings)
        self.mapped = MappedWalker(folder / "weights", count=COUNT, **SIZES) if is_mapped else None
        self.walker = make_walker(count=COUNT, **SIZES) if self.mapped is None else self.mapped.walker
        self.session = Session(
            take_apart(self.walker, self.walker.units()),
            self.device,
            lambda tensor: self.mapped is not None and tensor.data_ptr() in self.mapped.slices,
            host_memory=self.host_memory,
            file_of=lambda tensor: self.mapped and self.mapped.slices.get(tensor.data_ptr()),
        )
        self.strength_of: dict[Weight, float | None] = {}
        self.wanted: tuple = ()
        self.is_loaded = False

    def _likely(self, share: float) -> bool:
        return self.chance.random() < share

    def go(self, steps: int) -> None:
        ways: dict[Callable[[], None], int] = {
            self.load: 6,
            self.load_again: 4,
            self.run_passes: 10,
            self.evict: 1,
            self.begin_run: 1,
            self.end_run: 1,
            self.discard: 1,
            self.unload: 1,
            self.close: 1,
            self.shelve: 1,
            self.bound: 2,
        }
        for step in self.chance.choices(list(ways), list(ways.values()), k=steps):
            self.done.append(step.__name__)
            step()
            self.session.check()
            gc.collect()
            assert self.device.used_bytes == self.session.resident_bytes + self.session.ring_bytes
            if self.session.plan is None:
                self.assert_original()

    # -- steps -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Another plan, with weights changed in another way, of all blocks alike or of each on its own."""
        alike = self.chance.choice(STRENGTHS) if self._likely(0.5) else ...
        strengths = tuple(self.chance.choice(STRENGTHS) if alike is ... else alike for _ in range(COUNT + 1))
        kept, prefetch = self.chance.choice((0.0, 0.3, 0.6, 0.9, 1.0)), self.chance.randint(1, 4)
        self.wanted = kept, prefetch, self.can_pack and self._likely(0.5), strengths
        self.load_again()

    def load_again(self) -> None:
        """The same, as when someone tries once more."""
        if not self.wanted:
            return
        *how, strengths = self.wanted
        plan = plan_for(self.session, *how)
        fails_at = self.chance.randint(0, 2 * COUNT) if self._likely(0.2) else None
        is_short = self._likely(0.15)
        if is_short:
            self.device.budget_bytes = int(self.chance.random() * plan.device_bytes)
        is_refused = self.device.is_counting = self._likely(0.2)
        self.device.left = self.chance.randint(0, 6 * COUNT) if is_refused else -1
        self.disk.left = self.chance.randint(0, 30) if self._likely(0.15) else None
        may_fail = {
            BrokenOff: fails_at is not None,
            torch.OutOfMemoryError: is_short or is_refused,
            HostMemoryFull: self.ceilings.total_bytes is not None,
            OSError: self.disk.left is not None,
        }
        self.strength_of = {
            weight: strength
            for block, strength in zip((*self.session.parts.blocks, self.session.parts.outside), strengths, strict=True)
            for weight in block.weights
        }
        calls = 0

        def changed(weight: Weight) -> torch.Tensor | None:
            nonlocal calls
            if not self._changes(weight):
                return None
            calls += 1
            if fails_at is not None and calls > fails_at:
                raise BrokenOff
            there = self.session.home_on_device(weight)
            return (weight.home if there is None else there) * self.strength_of[weight]

        failed: type[BaseException] | None = None
        try:
            marks, afresh = Marks(strengths[:COUNT], strengths[COUNT]), self._likely(0.2)
            self.session.load(plan, marks=marks, changed=changed, will_change=self._changes, afresh=afresh)
        except tuple(may_fail) as error:
            failed = type(error)
        self.device.budget_bytes, self.device.is_counting, self.disk.left = CARD_BYTES, False, None
        self.is_loaded = failed is None
        self.done.append(str(how) if failed is None else failed.__name__)
        if failed is None:
            self._change_resident(strengths)
        else:
            assert may_fail[failed] and self.session.plan is None

    def _changes(self, weight: Weight) -> bool:
        return self.strength_of[weight] is not None and weight.keys[0].endswith(CHANGED)

    def _change_resident(self, strengths: tuple[float | None, ...]) -> None:
        for name, tensor in self.resident.named_parameters():
            _, index, *_ = name.split(".")
            strength = strengths[int(index) if name.startswith("blocks.") else COUNT]
            is_changed = strength is not None and name.endswith(CHANGED)
            tensor.copy_(self.originals[name] * strength if is_changed else self.originals[name])

    def run_passes(self) -> None:
        """The same way a few times, which may leave blocks out or go through them again, and may break off."""
        if not self.is_loaded:
            return
        order = list(range(COUNT))
        if self._likely(0.3):
            order = self.chance.choices(order, k=self.chance.randint(0, 2 * COUNT))
        self.walker.order = self.resident.order = order
        expected = self.resident(self.input)
        breaks_at = self.chance.randrange(COUNT) if self._likely(0.2) else None
        error = self.chance.choice((BrokenOff, Ended))

        def break_off(*_: object) -> None:
            raise error

        for _ in range(self.chance.randint(1, 3)):
            handles = []
            if breaks_at is not None:
                handles.append(self.walker.blocks[breaks_at].up.register_forward_hook(break_off))
            self.disk.left = self.chance.randint(0, 20) if self._likely(0.15) else None
            try:
                with self.session.one_pass():
                    found = self.walker(self.input)
            except (BrokenOff, Ended):
                assert breaks_at in order
            except OSError:
                assert self.disk.has_failed
                self.disk.has_failed = False
            else:
                assert torch.equal(found, expected)
            self.disk.left = None
            for handle in handles:
                handle.remove()

    def evict(self) -> None:
        if not self.is_loaded:
            return
        before = self.device.used_bytes
        freed = self.session.evict(int(self.chance.random() * self.session.resident_bytes))
        assert before - self.device.used_bytes >= freed
        self.is_loaded = freed == 0

    def begin_run(self) -> None:
        if self.is_loaded:
            self.session.begin_run()

    def end_run(self) -> None:
        self.session.end_run()

    def discard(self) -> None:
        self.session.discard_fetched()

    def unload(self) -> None:
        self.session.unload()
        self.is_loaded = False

    def close(self) -> None:
        self.session.close()
        self.is_loaded = False

    def shelve(self) -> None:
        self.session.shelve()

    def bound(self) -> None:
        """Other ceilings on host memory: what may be locked, be taken at all, and be taken by copies."""
        shares = (self.chance.random() * most if self._likely(0.4) else None for most in (1, 2, 1))
        sizes = (None if share is None else int(share * self.session.total_bytes) for share in shares)
        self.ceilings = Ceilings(*sizes)

    # -- what holds ------------------------------------------------------------------------------------------------

    def assert_original(self) -> None:
        for name, tensor in self.walker.named_parameters():
            assert torch.equal(tensor, self.originals[name]), name

    def end(self) -> None:
        self.session.close()
        self.assert_original()
        del self.session
        gc.collect()
        assert self.device.used_bytes == self.device.locked_bytes == self.host_memory.total_bytes == 0
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in self.walker.modules())


@pytest.mark.skipif(sys.platform == "win32", reason="reads are made to fail where Windows has no such call")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_order_of_steps_gives_the_bits_of_the_resident_model(monkeypatch, tmp_path, seed):
    monkeypatch.setattr(bounce, "WORTH_BYTES", 1000)
    monkeypatch.setattr(bounce, "BUFFER_BYTES", 100_000)
    monkeypatch.setattr(bounce, "BUFFERS", 3)
    monkeypatch.setattr(mapped, "PIECE_BYTES", 30_000)
    monkeypatch.setattr(originals, "WORTH_BYTES", 1000)
    monkeypatch.setattr(originals, "LEFT_BYTES", 100_000)
    monkeypatch.setattr(store, "WORTH_LOCKING_BYTES", 0)
    walk = SessionWalk(seed, Disk(monkeypatch), tmp_path)
    try:
        walk.go(STEPS)
    finally:
        print(*walk.done, sep=", ")
    walk.end()
