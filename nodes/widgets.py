"""Inputs that several nodes have, with the same names, ranges and words, and what the streaming nodes do with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..streaming.host.patcher import NothingToStream
from ..streaming.host.settings import MOST_PREFETCH, Mode, StreamingSettings

logger = logging.getLogger("layerstream")

BudgetType = io.Custom("LAYERSTREAM_BUDGET")


def streaming_inputs(what: str, parts: str) -> list[io.Input]:
    """What is set on a node that streams `what` ("model"), which is made of `parts` ("blocks").

    Saved workflows have values by place: the order must not change.
    """
    return [
        io.Combo.Input(
            "mode",
            options=[mode.value for mode in Mode],
            default=Mode.AUTO.value,
            tooltip=(
                f"auto: keep as much on the card as fits and stream the rest. always: stream all {parts}, for the "
                f"smallest use of the card. off: leave the {what} as it is."
            ),
        ),
        io.Int.Input(
            "prefetch_blocks",
            default=0,
            min=0,
            max=MOST_PREFETCH,
            tooltip=(
                f"How many of the largest {parts} are fetched ahead of the one that computes. More evens out uneven "
                "ones and takes more of the card. 0: what measures best."
            ),
        ),
        vram_input(f"this {what}'s weights may take"),
        min_free_input(),
        budget_input(),
    ]


def vram_input(whose: str) -> io.Input:
    """A bound on the card in GiB, of what `whose` says."""
    return io.Float.Input(
        "vram_gb",
        default=0.0,
        min=-64.0,
        max=256.0,
        step=0.1,
        tooltip=(
            f"Most GiB of the card that {whose}. 0: all that is free, with room left for the work. Negative: what is "
            "free less that many GiB."
        ),
    )


def min_free_input() -> io.Input:
    """MiB of the card that are left alone."""
    return io.Int.Input(
        "min_free_mb",
        default=256,
        min=0,
        max=65536,
        step=64,
        tooltip="MiB of the card that always stay free for everything else.",
    )


def budget_input() -> io.Input:
    """The input with which a node is put under a budget."""
    return BudgetType.Input(
        "budget", optional=True, tooltip="A bound on the card that is shared with everything else connected to it."
    )


def streamed_or_unchanged(
    what: str, source: Any, stream: Callable[[Any, StreamingSettings], Any], settings: StreamingSettings
) -> io.NodeOutput:
    """`source`, streamed as set; as it is where that is off, and where nothing can stream, which the log says."""
    if settings.mode is Mode.OFF:
        return io.NodeOutput(source)
    try:
        return io.NodeOutput(stream(source, settings))
    except NothingToStream as reason:
        logger.warning("LayerStream: the %s passes through unchanged: %s", what, reason)
        return io.NodeOutput(source)
