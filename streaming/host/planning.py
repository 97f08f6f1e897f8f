"""Which plan a model gets: what the person set, what ComfyUI allows and what was measured, made into one budget.

In: a model's stream, its settings, how much ComfyUI grants. Out: a plan, the present one wherever a new one would gain
little, because a plan that moves costs more than it brings.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Container, Iterator
from functools import partial

import comfy.model_management
from comfy.cli_args import args

from ..engine.plan import BudgetTooSmall, Packing, Plan
from .settings import GIB, Mode, StreamingSettings
from .streams import ModelStream, Way

logger = logging.getLogger("layerstream")

# A plan that still fits is kept unless a new one takes this much less time a step, or, while nothing was timed, keeps
# this much more of the model on the card. Times that plans are made by are the best seen, so they settle.
WORTH_IN_TIME = 0.015
WORTH_IN_SIZE = 0.02

# Or where the new one has the link busy for so much less of a step: copies take of the processor what is not foreseen.
WORTH_IN_TRAFFIC = 0.1

# What free memory may fall by between runs, as a share of the model, before a plan that worked is given up: it reads a
# little lower after a first run, which loads kernels and libraries.
STEADY_SHARE = 0.03


def kept_whole(stream: ModelStream, settings: StreamingSettings, allowed_bytes: float, held_bytes: int) -> Plan | None:
    """The plan in place, where all of the model stays by it and still may; otherwise None. Figures as `choose_plan` has
    them: it would choose the same, but ComfyUI has each model loaded again several times a prompt.
    """
    present = stream.session.plan if stream.is_in_place else None
    if present is None or not present.is_resident or settings.mode is Mode.ALWAYS:
        return None
    for _, budget_bytes in _budgets(stream, settings, allowed_bytes, held_bytes):
        if present.device_bytes <= budget_bytes:
            stream.budget_bytes = budget_bytes + stream.patch_bytes
            return present
    return None


def choose_plan(
    stream: ModelStream,
    settings: StreamingSettings,
    allowed_bytes: float,
    held_bytes: int,
    packing: Packing,
    unpacked: Container[int],
) -> Plan:
    """Give the plan to load, which is the one in place if that does.

    `allowed_bytes` is what ComfyUI grants, `held_bytes` what the model has on the card now, which counts as free.
    Raises BudgetTooSmall when the person's own figure does not hold the least the model needs.
    """
    session = stream.session
    propose = partial(session.propose, packing=packing, unpacked=unpacked)
    least_traffic, budget_bytes, plan = math.inf, 0, None
    too_small: BudgetTooSmall | None = None
    most_bytes = 0
    for way, way_budget_bytes in _budgets(stream, settings, allowed_bytes, held_bytes):
        try:
            found = propose(
                way_budget_bytes, prefetch=settings.prefetch_blocks, stream_all=settings.mode is Mode.ALWAYS
            )
        except BudgetTooSmall as error:
            too_small, most_bytes = too_small or error, max(most_bytes, way_budget_bytes)
            continue
        if way.walks * found.link_bytes < least_traffic or plan is None:
            least_traffic, budget_bytes, plan = way.walks * found.link_bytes, way_budget_bytes, found
    if plan is None:
        assert too_small is not None
        if settings.is_explicit:
            raise too_small
        plan = propose(None, prefetch=1, stream_all=True)
        if not args.novram:  # which grants nothing, and so asks for this plan
            logger.warning(
                "LayerStream: by estimate, %.2f GiB of the card are free for this model, which takes at the least "
                "%.2f GiB: trying with that. Close what else holds the card, or make the image smaller",
                most_bytes / GIB,
                plan.device_bytes / GIB,
            )
        budget_bytes = plan.device_bytes
    present = session.plan if stream.is_in_place else None
    is_asked_for = stream.settings == (settings, packing)
    if present is not None and any(form.is_packed and index in unpacked for index, form in enumerate(present.forms)):
        return plan  # the model itself must hold these blocks' patched weights now
    stream.settings, stream.budget_bytes = (settings, packing), budget_bytes + stream.patch_bytes
    if present is None or present == plan:
        return present or plan
    return present if is_asked_for and _does(stream, settings, present, plan, budget_bytes) else plan


def _does(stream: ModelStream, settings: StreamingSettings, present: Plan, plan: Plan, budget_bytes: int) -> bool:
    """Whether the plan in place fits and a new one would gain too little."""
    if plan.is_resident:
        return False
    total_bytes = stream.session.total_bytes
    is_exact = settings.is_explicit or not stream.device.holds_activations
    slack_bytes = 0 if is_exact else STEADY_SHARE * total_bytes
    if present.device_bytes > max(budget_bytes + slack_bytes, plan.device_bytes):
        return False
    now = stream.session.expect(present)
    if now is not None and plan.expected is not None:
        is_faster = plan.expected.step_ms <= (1 - WORTH_IN_TIME) * now.step_ms
        is_lighter = plan.expected.link_ms <= now.link_ms - WORTH_IN_TRAFFIC * now.step_ms
        return not (is_faster or is_lighter)
    return plan.resident_bytes - present.resident_bytes < WORTH_IN_SIZE * total_bytes


def _budgets(
    stream: ModelStream, settings: StreamingSettings, allowed_bytes: float, held_bytes: int
) -> Iterator[tuple[Way, int]]:
    """For each way to run, the bytes that weights and rings may take: the person's figure, or what is free less what
    compute needs, and less what patches take.

    Once a run of the same kind has shown what fits beside its compute, ComfyUI's estimate is not needed, as long as no
    more is in the way than then; but it is what ComfyUI goes by where we are not asked whether a batch fits.
    """
    free_bytes = stream.device.free_bytes() + held_bytes
    patch_bytes = stream.patch_bytes
    for way in stream.ways:
        if settings.is_explicit:
            yield way, settings.budget_bytes(free_bytes, allowed_bytes, 0) - patch_bytes
            return
        if stream.fitting_bytes is None:
            yield way, settings.budget_bytes(free_bytes, allowed_bytes, way.reserve_bytes) - patch_bytes
            continue
        fitting_bytes = min(stream.fitting_bytes, free_bytes - stream.compute_bytes) - least_left(settings)
        if way.is_batch and not stream.is_batch_sure:
            fitting_bytes = min(fitting_bytes, free_bytes - way.reserve_bytes)
        yield way, fitting_bytes - patch_bytes
        if stream.is_batch_sure:
            return


def has_room_beside(
    stream: ModelStream, settings: StreamingSettings, allowed_bytes: float, held_bytes: int, size_bytes: int
) -> bool:
    """Whether the model can run beside `size_bytes` of patches; the other figures are as `choose_plan` has them."""
    least = stream.session.propose(None, prefetch=settings.prefetch_blocks or 1, stream_all=True)
    budgets = _budgets(stream, settings, allowed_bytes, held_bytes)
    return any(least.device_bytes + size_bytes <= budget_bytes + stream.patch_bytes for _, budget_bytes in budgets)


def least_streamed_bytes(stream: ModelStream, settings: StreamingSettings) -> int:
    """Bytes of the model that the card has no room for even without compute; `settings` as the budget leaves them."""
    total_bytes = stream.session.total_bytes
    if settings.mode is Mode.ALWAYS:
        return total_bytes
    free_bytes = stream.device.free_bytes() + stream.held_bytes
    return max(0, total_bytes - max(0, settings.budget_bytes(free_bytes, math.inf, 0) - stream.patch_bytes))


def least_left(settings: StreamingSettings) -> int:
    """Bytes of the card that shall stay free at the peak of compute.

    A driver of Windows moves what does not fit to RAM without a word, so as much stays free there as ComfyUI leaves.
    """
    if sys.platform == "win32":
        return max(settings.min_free_bytes, int(comfy.model_management.extra_reserved_memory()))
    return max(settings.min_free_bytes, int((args.reserve_vram or 0.0) * GIB))
