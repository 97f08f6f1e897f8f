"""Which blocks stay in their file for want of room, what buffers they need, and how much room there is."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from layerstream.streaming.engine.host_memory import GIB, Ceilings, HostMemory
from layerstream.streaming.engine.staging import BUFFERS, choose_left, staging_bytes


def test_those_that_stay_are_spread_evenly_and_stay_while_that_does():
    sizes = dict.fromkeys(range(100), 100)
    buffers_bytes = BUFFERS * 100
    left = choose_left(sizes, 7500 + buffers_bytes, set())
    assert len(left) == 25 and {b - a for a, b in itertools.pairwise(sorted(left))} == {4}
    more = choose_left(sizes, 7400 + buffers_bytes, left)
    assert len(more) == 26 and left < more, "too few"
    assert choose_left(sizes, 8000 + buffers_bytes, left) == left, "hardly too many"
    assert len(choose_left(sizes, 9500 + buffers_bytes, left)) == 5
    assert choose_left(sizes, 10_000, left) == set()
    assert choose_left(sizes, 0.0, set()) == choose_left(sizes, -1e9, set()) == set(sizes)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("sizes", [(96,), (60, 96, 96)], ids=["even", "uneven"])
def test_room_that_wobbles_has_little_read_again(sizes, share):
    sizes = {index: sizes[index % len(sizes)] for index in range(300)}
    total_bytes, chance = sum(sizes.values()), random.Random(0)
    left, read_again_bytes = choose_left(sizes, share * total_bytes, set()), 0
    for _ in range(10):
        before, room_bytes = left, share * total_bytes * (1 + chance.uniform(-0.01, 0.01))
        left = choose_left(sizes, room_bytes, before)
        kept_bytes = sum(size for index, size in sizes.items() if index not in left)
        assert kept_bytes <= room_bytes - staging_bytes(sizes.values()) or left == set()
        read_again_bytes += sum(sizes[index] for index in before ^ left)
    assert read_again_bytes <= 0.02 * total_bytes + 2 * staging_bytes(sizes.values())


def test_a_giant_does_not_keep_the_others_in_the_file():
    sizes = {**dict.fromkeys(range(50), 96), 50: 3000, **dict.fromkeys(range(51, 100), 96)}
    left = choose_left(sizes, 0.9 * sum(sizes.values()), set())
    assert 50 not in left and sum(sizes[index] for index in left) <= 0.1 * sum(sizes.values()) + (BUFFERS + 1) * 96
    assert 50 in choose_left(sizes, 0.1 * sum(sizes.values()), set()), "the others do not suffice"


@pytest.mark.parametrize(("gib", "count"), [(0.1, 4), (0.3, 3), (0.6, 1), (5.0, 1)])
def test_buffers_of_giants_are_few(gib, count):
    size_bytes = int(gib * GIB)
    assert staging_bytes([1000, size_bytes, 1000, 1000, 1000]) == count * size_bytes


def test_of_one_block_and_of_none():
    assert choose_left({}, -1.0, {3}) == choose_left({}, 0.0, set()) == set()
    assert choose_left({7: 100}, 100.0, {7}) == set()
    assert choose_left({7: 100}, 99.0, set()) == choose_left({7: 100}, 99.0, {7}) == {7}


@pytest.mark.parametrize("share", [0.1, 0.37, 0.8])
def test_uneven_ones_make_the_room_that_is_asked_for(share):
    generator = torch.Generator().manual_seed(0)
    sizes = {index: int(size) for index, size in enumerate(torch.randint(1, 1000, (200,), generator=generator))}
    room_bytes = share * sum(sizes.values())
    left = choose_left(sizes, room_bytes, set())
    kept_bytes = sum(size for index, size in sizes.items() if index not in left)
    assert 0.9 * room_bytes - staging_bytes(sizes.values()) <= kept_bytes <= room_bytes


@pytest.mark.parametrize(
    ("ceilings", "room"),
    [
        (Ceilings(), float("inf")),
        (Ceilings(500, None, None), float("inf")),
        (Ceilings(None, 300, 600), 200),
        (Ceilings(1000, 1000, 150), 50),
        (Ceilings(None, 50, None), -50),
    ],
)
def test_copies_may_take_what_every_bound_leaves(ceilings, room):
    memory = HostMemory()
    memory.total_bytes = memory.locked_bytes = 100
    memory._ceilings = lambda: ceilings
    assert memory.room_for_copies() == room
