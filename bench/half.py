"""Half of a model: how much memory `--free-gib half` leaves free.

    half of the weights + the activations at the resident run's peak + what its process takes beside its allocator

The last two are measured, in the same result: the peak of what the resident run's allocator handed out, less the
weights; and its use of the card as the holder saw it, less what its allocator had reserved (the CUDA context and the
libraries' own memory). What the allocator reserved and did not hand out is left out. So a contender that computes as
the resident run does has room for half of the weights.

The CPU's simulated card holds weights alone, and a narrow model's few units are large beside it: there it is what the
example workflows are tested with, room for the units in flight and half of the rest.
"""

from __future__ import annotations

from pathlib import Path

from bench.machine import Checkpoint
from bench.results import Row
from bench.spec import GIB, HALF


def read_free(text: str) -> float | None:
    """GiB out of the command line's text; None for half of the model. Raises ValueError for anything else."""
    return None if text == HALF else float(text)


def half_free_gib(checkpoint: Checkpoint, resident: Row) -> float:
    """GiB to leave free, given the row of the resident run."""
    from scripts.example import CARD_SLACK_GIB, half_resident_budget

    weights_gib = checkpoint.bytes / GIB
    if resident["peak_gib"] is None:
        return round(half_resident_budget(Path(checkpoint.path)).vram_gib + CARD_SLACK_GIB, 3)
    activations_gib = max(0.0, resident["allocated_peak_gib"] - weights_gib)
    beside_gib = max(0.0, resident["peak_gib"] - resident["reserved_peak_gib"])
    return round(weights_gib / 2 + activations_gib + beside_gib, 3)
