"""How fast the processor was is taken at both ends of the prompt that is timed, and said where contenders differ."""

import pytest
import torch

from bench import measured
from bench.measured import SamplingRun, timed_run
from bench.processor import loop_times_ms


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
    assert run.latent.item() == 3


def test_a_single_prompt_is_first_and_timed(events: list[str]) -> None:
    run = timed_run(sampler(events), 1)
    assert events == ["loop", "sample", "loop"]
    assert (run.first_step_s, run.next_first_step_s, run.steps_s) == (10.0, 10.0, [1.0])


def test_the_loop_takes_a_time_that_a_clock_can_tell() -> None:
    times_ms = loop_times_ms()
    assert len(times_ms) > 2 and all(1 < time_ms < 1000 for time_ms in times_ms)
