"""Sampling that can be tried again, and guidance in two halves: the ladder at ComfyUI's wrapper points.

A run starts again from its first step, with the same random numbers and the same conditioning, so its result is that
of a run that had the memory at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import estimate
from .ladder import SAMPLING_RUNGS, Rung, Standing, climb_down
from .passes import is_guided
from .policy import Stage
from .settings import GIB

# Sides of images that every model takes.
MULTIPLE = 16

# How much smaller to make an image whose estimate was too low.
FITTING_SHARE = 0.5

WRAPPER_KEY = "layerstream.ladder"


def retry_sampling(executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: a run, tried again with less where it runs out of memory."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    conds = guider.conds
    is_on_card = patcher.load_device.type == "cuda"
    before = torch.get_rng_state(), torch.cuda.get_rng_state(patcher.load_device) if is_on_card else None

    def attempt(standing: Standing) -> Any:
        guider.conds = {name: [cond.copy() for cond in entries] for name, entries in conds.items()}
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], patcher.load_device)
        return executor(noise, *args, **kwargs)

    guided = is_guided(guider)
    is_streamed = hasattr(patcher, "stream")
    rungs = [rung for rung in SAMPLING_RUNGS if guided or rung is not Rung.SPLIT] if is_streamed else [Rung.EVICT]
    work = (tuple(noise.shape), guided)

    def remedy() -> str:
        needed_bytes = estimate.sampling_bytes(patcher, noise.shape, conds, is_guided=False)
        return smaller_image(patcher, needed_bytes, noise.shape[-2:])

    return climb_down(Stage.SAMPLING, patcher, work, rungs, attempt, remedy)


def split_guidance(executor: Any, model: Any, conds: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    """CALC_COND_BATCH: one pass for each kind of conditioning, where the ladder asks for it."""
    stream = getattr(getattr(model, "current_patcher", None), "stream", None)
    if stream is None or not stream.restraint.is_split:
        return executor(model, conds, *args, **kwargs)
    results = []
    for index in range(len(conds)):
        alone = [cond if other == index else None for other, cond in enumerate(conds)]
        results.append(executor(model, alone, *args, **kwargs)[index])
    return results


def smaller_image(patcher: Any, needed_bytes: int, side: Any) -> str:
    """The remedy of a stage whose work is too large: by estimate, how much to free or how much smaller to make it."""
    stream = getattr(patcher, "stream", None)
    if stream is None:
        return "make the image smaller, or connect the model to Layer-Stream Model"
    free_bytes = stream.device.free_bytes() + stream.held_bytes
    least_bytes = stream.session.propose(None, prefetch=1, stream_all=True).device_bytes if stream.is_open else 0
    if least_bytes > free_bytes:
        return (
            f"its weights alone take {least_bytes / GIB:.2f} GiB of the card at the least and {free_bytes / GIB:.2f} "
            f"GiB are free, so no smaller image would do: free {(least_bytes - free_bytes) / GIB + 0.01:.2f} GiB more "
            "(raise vram_gb where a budget is set), or load a smaller or quantised file of this model"
        )
    missing_bytes = needed_bytes + least_bytes - free_bytes
    fits = missing_bytes <= 0
    share = FITTING_SHARE if fits else max(0.0, (free_bytes - least_bytes) / max(1, needed_bytes))
    height, width = (max(MULTIPLE, int(8 * length * math.sqrt(share)) // MULTIPLE * MULTIPLE) for length in side)
    needed_gib = (needed_bytes + least_bytes) / GIB
    found = f"it needs {needed_gib:.2f} GiB of the card by estimate and {free_bytes / GIB:.2f} GiB"
    if fits:
        return f"{found} are free, so it needs more than the estimate: make the image {width}x{height}"
    return (
        f"{found} are free: free {missing_bytes / GIB + 0.01:.2f} GiB more (raise vram_gb where a budget is set), or "
        f"make the image {width}x{height}"
    )
