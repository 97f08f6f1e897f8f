"""The walk learns an order, forgives departures and does not jitter."""

from __future__ import annotations

from layerstream.streaming.engine.walk import Walk


def run(walk: Walk, order: list[int]) -> int:
    """One pass in `order`; gives its departures."""
    walk.begin()
    departures = sum(walk.arrive(index) for index in order)
    walk.finish()
    return departures


def test_the_first_pass_teaches_the_order():
    walk = Walk([0, 1, 2, 3])
    assert run(walk, [3, 1, 0, 2]) == 0
    assert walk.order == (3, 1, 0, 2)
    assert run(walk, [3, 1, 0, 2]) == 0


def test_prediction_goes_on_across_the_end_of_a_pass():
    walk = Walk([0, 1, 2, 3])
    walk.arrive(0), walk.arrive(1), walk.arrive(2)
    assert list(walk.ahead())[:3] == [3, 0, 1]


def test_a_skipped_block_is_one_departure_and_the_rest_is_as_predicted():
    walk = Walk(range(6))
    run(walk, list(range(6)))
    assert run(walk, [0, 1, 4, 5]) == 1


def test_an_order_seen_once_does_not_replace_the_learned_one():
    walk = Walk(range(4))
    run(walk, [0, 1, 2, 3])
    run(walk, [0, 2, 3])
    assert walk.order == (0, 1, 2, 3)
    run(walk, [0, 2, 3])
    assert walk.order == (0, 2, 3)


def test_repeated_blocks_are_predicted_in_place():
    walk = Walk([0, 1])
    run(walk, [0, 0, 1, 0, 1])
    walk.arrive(0)
    assert list(walk.ahead())[:2] == [0, 1]
    assert run(walk, [0, 0, 1, 0, 1]) == 0


def test_an_unknown_block_is_a_departure_until_learned():
    walk = Walk([0, 1])
    run(walk, [0, 1])
    assert run(walk, [0, 7, 1]) == 1
    assert run(walk, [0, 7, 1]) == 1
    assert run(walk, [0, 7, 1]) == 0


def test_a_pass_that_broke_off_teaches_nothing():
    walk = Walk([0, 1, 2])
    walk.begin()
    walk.arrive(2)
    walk.begin()
    assert walk.order == (0, 1, 2) and not walk.is_learned
    assert next(walk.ahead()) == 0
