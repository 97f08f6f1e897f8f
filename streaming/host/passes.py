"""The wrappers that bracket ComfyUI's sampling: one forward pass, and what is known of a run before it loads.

They are plain functions, the same for every model, because ComfyUI copies them from patcher to patcher; each finds the
patcher that runs through the object it wraps.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import comfy.sampler_helpers

from ..engine.python_stack import on_one_chunk
from .beside import give_way, models_beside
from .streams import Way

WRAPPER_KEY = "layerstream"

# ComfyUI puts conditional and unconditional into one batch only where this many times their estimate is free.
BATCH_MARGIN = 1.5


def stream_pass(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL: run one pass of the model in its patcher's scope."""
    patcher = executor.class_obj.current_patcher
    stream = getattr(patcher, "stream", None)
    if stream is None:
        return executor(*args, **kwargs)
    patcher.come_back()
    if not stream.is_in_place:
        return executor(*args, **kwargs)
    with patcher.passing():
        result = executor(*args, **kwargs)
    if not stream.session.is_running:
        stream.batch = max(stream.batch, len(args[0]))  # only now is it known to fit
    return result


def begin_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: note whether the run is guided, so that memory for both halves of a batch is left free; what it
    calls has room on Python's stack.
    """
    guider = executor.class_obj
    stream = getattr(guider.model_patcher, "stream", None)
    if stream is not None:
        stream.is_guided = is_guided(guider)
    return on_one_chunk(executor, *args, **kwargs)


def is_guided(guider: Any) -> bool:
    """Whether a run needs passes with more than one kind of conditioning.

    Of two kinds ComfyUI leaves the negative one out at a scale of 1, unless something asks for its result.
    """
    kinds = {name for name, conds in guider.conds.items() if conds}
    may_be_left_out = not (kinds - {"positive", "negative"} or guider.model_options.get("disable_cfg1_optimization"))
    return len(kinds) > 1 and not (may_be_left_out and math.isclose(getattr(guider, "cfg", 1.0), 1.0))


def note_memory(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING: note what the run needs besides this model's weights, before the models load."""
    stream = getattr(model, "stream", None)
    if stream is not None:
        model.make_room()
    if stream is not None and stream.device.holds_activations:
        both, single = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
        others, extra_bytes = models_beside(model, conds, kwargs.get("model_options"))
        walks = sum(map(len, conds.values())) if stream.is_guided else 1
        estimates: tuple[Way, ...] = (Way(walks, int(single + extra_bytes)),)
        if walks > 1:
            estimates = (Way(1, int(both * BATCH_MARGIN + extra_bytes), is_batch=True), *estimates)
        stream.estimates, stream.beside = estimates, weakref.WeakSet(others)
        stream.whole_batch = walks * noise_shape[0]
        sizes = tuple(sorted(other.model_size() for other in others))
        stream.begin_run((tuple(noise_shape), both, walks, sizes, extra_bytes))
        give_way(model)
    return executor(model, noise_shape, conds, *args, **kwargs)
