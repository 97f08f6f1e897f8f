"""How fast the processor was is taken at both ends of the prompt that is timed, and said where contenders differ."""

from typing import Any

import pytest
import torch

from bench import measured
from bench.measured import SamplingRun, timed_run
from bench.processor import loop_times_ms
from bench.table import format_table
from turns import Turn


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in order, on a processor that slows down while a prompt runs."""
    happened: list[str] = []

    def loop() -> list[float]:
        happened.append("loop")
        return [10.0, 11.0] if happened.count("loop") == 1 else [18.0, 19.0]

    monkeypatch.setattr(measured, "loop_times_ms", loop)
    return happened


def sampler(events: list[str]):
    def sample() -> SamplingRun:
        events.append("sample")
        number = events.count("sample")
        return SamplingRun(torch.tensor([number]), 10.0 * number, [1.0 * number], 1.0)

    return sample


def test_the_loop_runs_right_before_and_right_after_the_prompt_that_is_timed(events: list[str]) -> None:
    run = timed_run(sampler(events), 3)
    assert events == ["sample", "sample", "loop", "sample", "loop"]
    assert run.loop_ms == 14.5
    assert (run.first_step_s, run.next_first_step_s, run.steps_s) == (10.0, 30.0, [3.0])
    assert run.latent.tolist() == [[1], [2], [3]]


def test_a_single_prompt_is_first_and_timed(events: list[str]) -> None:
    run = timed_run(sampler(events), 1)
    assert events == ["loop", "sample", "loop"]
    assert (run.first_step_s, run.next_first_step_s, run.steps_s) == (10.0, 10.0, [1.0])
    assert run.latent.tolist() == [[1]]


def test_the_loop_takes_a_time_that_a_clock_can_tell() -> None:
    times_ms = loop_times_ms()
    assert len(times_ms) > 2 and all(1 < time_ms < 1000 for time_ms in times_ms)


def said(rows: dict[str, dict[str, Any]]) -> list[str]:
    return [line for line in format_table(list(rows.values())).splitlines() if "processor" in line]


def test_a_processor_that_was_slower_for_some_is_said_with_names_and_factors(rows_of) -> None:
    rows = rows_of(resident=[Turn(loop_ms=10.0)], layerstream=[Turn(loop_ms=16.0)], lowvram=[Turn(loop_ms=10.9)])
    assert said(rows) == ["the processor was 1.6 times slower while layerstream ran: repeat with --rounds 3"]
    rows = rows_of(resident=[Turn(loop_ms=18.0)], layerstream=[Turn(loop_ms=10.0)], lowvram=[Turn(loop_ms=12.0)])
    assert said(rows) == [
        "the processor was 1.8 times slower while resident ran, 1.2 times slower while lowvram ran: "
        "repeat with --rounds 3"
    ]


def test_a_processor_that_was_as_fast_for_all_in_their_best_rounds_is_not_spoken_of(rows_of) -> None:
    assert said(rows_of(resident=[Turn(loop_ms=10.0)], layerstream=[Turn(loop_ms=11.0)])) == []
    slow_and_fast = [Turn(loop_ms=18.0), Turn(loop_ms=10.0)]
    assert said(rows_of(resident=list(slow_and_fast), layerstream=slow_and_fast[::-1])) == []
    assert said(rows_of(resident=[Turn()], layerstream=[Turn(error="out of memory")])) == []


def test_more_rounds_are_advised_than_there_were(rows_of) -> None:
    rows = rows_of(resident=[Turn() for _ in range(3)], layerstream=[Turn(loop_ms=15.0) for _ in range(3)])
    assert said(rows) == ["the processor was 1.5 times slower while layerstream ran: repeat with --rounds 5"]
