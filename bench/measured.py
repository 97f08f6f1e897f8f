"""What one contender's process measures, before it is compared with anything.

Plain values that every way to run a model can give; `bench.worker` turns them into a row of the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.processor import loop_times_ms

if TYPE_CHECKING:
    import torch


class SamplingRun(NamedTuple):
    """`first_step_s` runs from the call to the first step's end and so includes the load; `steps_s` are the others.
    `loop_ms` is how fast the processor was (`bench.processor`). Of several runs in one, `latent` has theirs stacked."""

    latent: torch.Tensor
    first_step_s: float
    steps_s: list[float]
    calls_per_step: float
    next_first_step_s: float | None = None
    loop_ms: float | None = None


class Residency(NamedTuple):
    """Where the weights are after sampling. Streamed bytes are weights that are not on the card; moved bytes are what
    crossed the link for them, fewer when they travel packed. Both are per step."""

    resident_bytes: int
    streamed_bytes_per_step: int
    moved_bytes_per_step: int
    details: dict[str, Any]


class Measured(NamedTuple):
    """`prepare_s` is the time to make the model object from its file, before sampling loads it to the card. `facts`
    are what ran: class names, type, version; `trace` is a step's timeline where one was asked for."""

    run: SamplingRun
    prepare_s: float
    residency: Residency
    facts: dict[str, Any]
    trace: dict[str, Any] | None = None


def timed_run(sample: Callable[[], SamplingRun], runs: int) -> SamplingRun:
    """Sample `runs` times. The first step is the first run's and the other times are the last run's, when whatever
    learns has learned; the processor's speed is taken right before and right after that one. All latents are kept: what
    learns does so in the runs that are not timed."""
    import torch

    earlier = [sample() for _ in range(runs - 1)]
    before_ms = loop_times_ms()
    last = sample()
    loop_ms = statistics.median([*before_ms, *loop_times_ms()])
    all_runs = [*earlier, last]
    return last._replace(
        latent=torch.stack([run.latent for run in all_runs]),
        first_step_s=all_runs[0].first_step_s,
        next_first_step_s=last.first_step_s,
        loop_ms=loop_ms,
    )
