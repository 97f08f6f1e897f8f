"""The ladder: what a stage that ran out of memory gives up, one rung at a time, before it is tried again.

In: a stage as a function that can be called again, and which rungs it has. Out: its result, or an out-of-memory error
that names the smallest change that would help. Rungs that were taken are said in the log and the report, and remembered
for the same work of the same model, so that the next prompt starts there.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import comfy.model_management
import torch

from ..engine.plan import BudgetTooSmall
from .leaving import make_leave
from .policy import Stage
from .restraint import FREE, Restraint
from .settings import GIB
from .streams import live_streams
from .swallowed import is_out_of_memory

logger = logging.getLogger("layerstream")

# What a model may still take of the card, as a share of what it took, after it was made to give up residents.
DEMOTED_SHARE = 0.7

Result = TypeVar("Result")


class Rung(Enum):
    """What can be given up, from what costs least; the value is how a person reads it."""

    EVICT = "everything idle leaves the card"
    DEMOTE = "less of the model stays on the card"
    PREFETCH = "less is fetched ahead"
    SPLIT = "the two halves of guidance run one after the other"
    TILE = "the image is worked on in tiles"
    STREAM = "all of the model streams"


STREAMED_RUNGS = (Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.STREAM)
SAMPLING_RUNGS = (Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.SPLIT, Rung.STREAM)
VAE_RUNGS = (Rung.EVICT, Rung.TILE)


class Standing(NamedTuple):
    """How far down some work is."""

    rungs: tuple[Rung, ...] = ()
    restraint: Restraint = FREE


# What each model had to give up, by the work that asked for it.
_standings: weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, Standing]] = weakref.WeakKeyDictionary()


def climb_down(
    kind: Stage,
    patcher: Any,
    work: Hashable,
    rungs: Sequence[Rung],
    attempt: Callable[[Standing], Result],
    remedy: Callable[[], str],
) -> Result:
    """Call `attempt` until it has the memory it needs, one rung further down each time.

    `work` is what of the stage decides how much it needs. Raises torch.OutOfMemoryError with `remedy()` when no rung
    is left; other errors pass.
    """
    stream = getattr(patcher, "stream", None)
    known = _standings.setdefault(patcher.model, {})
    standing = known.get((kind, work), Standing())
    if Rung.EVICT in standing.rungs:
        _evict_idle(patcher)
    while True:
        if stream is not None:
            stream.restraint = standing.restraint
        try:
            result = attempt(standing)
            break
        except (RuntimeError, BudgetTooSmall) as error:
            if not is_out_of_memory(error) and not (isinstance(error, BudgetTooSmall) and standing.rungs):
                raise
            said = str(error).partition("\n")[0]
        # Only here, with the error gone, is what it referred to free.
        left = [rung for rung in rungs if rung not in standing.rungs]
        if not left:
            if stream is not None:
                stream.restraint = FREE
            raise torch.OutOfMemoryError(_final(kind, standing, remedy(), said))
        standing = _take(left[0], standing, patcher)
        logger.warning("LayerStream: %s ran out of memory; trying again: %s", kind.value, left[0].value)
    if standing.rungs:
        known[kind, work] = standing
    spilled_bytes = stream.device.spilled_bytes() if stream is not None else 0
    if spilled_bytes and any(rung not in standing.rungs for rung in rungs):
        rung = next(rung for rung in rungs if rung not in standing.rungs)
        known[kind, work] = _take(rung, standing, patcher)
        logger.warning(
            "LayerStream: the driver moved %.2f GiB of %s to RAM, which is slow; next time %s",
            spilled_bytes / GIB,
            kind.value,
            rung.value,
        )
    return result


def rungs_taken(model: torch.nn.Module) -> list[str]:
    """What the work of a model gives up, for the report, which any thread may make."""
    standings = tuple(_standings.get(model, {}).values())
    return sorted({rung.name.lower() for standing in standings for rung in standing.rungs})


def _take(rung: Rung, standing: Standing, patcher: Any) -> Standing:
    """Go down to `rung`."""
    restraint = standing.restraint
    stream = getattr(patcher, "stream", None)
    if rung is Rung.EVICT:
        _evict_idle(patcher)
    elif rung is Rung.DEMOTE and stream is not None:
        plan = stream.session.plan if stream.is_open else None
        held_bytes = plan.device_bytes if plan is not None else stream.budget_bytes
        restraint = replace(restraint, most_bytes=int(DEMOTED_SHARE * held_bytes))
    elif rung is Rung.PREFETCH:
        restraint = replace(restraint, prefetch_blocks=1)
    elif rung is Rung.SPLIT:
        restraint = replace(restraint, is_split=True)
    elif rung is Rung.STREAM:
        restraint = replace(restraint, most_bytes=None, is_all_streamed=True)
    return Standing((*standing.rungs, rung), restraint)


def _evict_idle(patcher: Any) -> None:
    """Have everything leave the card but the model of `patcher`."""
    for stream in live_streams():
        if stream.model is not patcher.model:
            make_leave(stream, None)
    kept = [
        entry
        for entry in comfy.model_management.current_loaded_models
        if getattr(entry.model, "model", None) is patcher.model
    ]
    if not comfy.model_management.is_device_cpu(patcher.load_device):
        comfy.model_management.free_memory(1e30, patcher.load_device, keep_loaded=kept)
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _final(kind: Stage, standing: Standing, remedy: str, said: str) -> str:
    tried = "; ".join(rung.value for rung in standing.rungs)
    return f"{kind.value} does not fit the card, though {tried}: {remedy}. ({said})"
