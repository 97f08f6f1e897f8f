"""Loops run at the same speed wherever on Python's stack they are."""

from __future__ import annotations

import pytest
from layerstream.streaming.engine.python_stack import on_one_chunk

from stack_loops import CALLS, loop, maps_anew, most_faults


@pytest.mark.skipif(not maps_anew, reason="this Python may keep the chunk")
def test_somewhere_a_loop_maps_memory_in_every_call():
    assert most_faults() >= CALLS


def test_on_one_chunk_it_does_so_nowhere():
    assert on_one_chunk(most_faults) < CALLS / 2
    assert most_faults(lambda: on_one_chunk(loop)) < CALLS / 2


def test_nor_where_calls_go_deep():
    assert max(on_one_chunk(_deep, depth) for depth in range(400)) < CALLS / 2


def _deep(depth: int) -> int:
    return loop() if depth == 0 else _deep(depth - 1)


def test_arguments_results_and_errors_pass_through():
    assert on_one_chunk(lambda *args, **kwargs: (args, kwargs), 1, function=2) == ((1,), {"function": 2})
    with pytest.raises(ZeroDivisionError):
        on_one_chunk(lambda: 1 // 0)
