"""Giving the card back when a person asks for it, between runs.

In: the body of a request. Out: bytes freed. ComfyUI's memory manager does it, which asks the streamed models as it
would for memory of its own.
"""

from __future__ import annotations

import json
import math
from typing import Any

import comfy.model_management

from .memory import is_streamed
from .settings import GIB

FIELD = "gib"
ALL_BYTES = 2.0**60
MOST_GIB = 4096.0


class BadRequest(ValueError):
    """The request cannot be understood; the message says what to send."""


class RunUnderWay(RuntimeError):
    """A prompt is executed, and its models are in use."""


def bytes_to_free(body: bytes) -> float:
    """How much a request asks for: `{"gib": number}`; nothing, or `{}`, is all.

    Raises BadRequest for anything else.
    """
    if not body.strip():
        return ALL_BYTES
    try:
        asked = json.loads(body)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f'the body is no JSON ({error}): send {{"{FIELD}": 2.5}}, or nothing to free all') from None
    if not isinstance(asked, dict):
        raise BadRequest(f'the body is {type(asked).__name__}, not an object: send {{"{FIELD}": 2.5}}')
    unknown = sorted(set(asked) - {FIELD})
    if unknown:
        raise BadRequest(f"`{unknown[0]}` is not known: the one field is `{FIELD}`, how many GiB to free")
    gib = asked.get(FIELD)
    if FIELD not in asked:
        return ALL_BYTES
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not math.isfinite(gib):
        raise BadRequest(f"`{FIELD}` is {json.dumps(gib)}: it must be a number of GiB")
    if not 0 < gib <= MOST_GIB:
        raise BadRequest(f"`{FIELD}` is {gib}: it must be above 0 and at most {MOST_GIB:.0f}")
    return gib * GIB


def free_streamed(queue: Any, size_bytes: float) -> int:
    """Have streamed models leave the card until `size_bytes` are freed, or all of them have; give the bytes freed.

    `queue` is ComfyUI's queue of prompts; none can be taken up meanwhile. Raises RunUnderWay when one is executed.
    """
    with queue.mutex:
        if queue.currently_running:
            raise RunUnderWay("a prompt runs and its models are in use: wait until it is done, or cancel it")
        loaded = tuple(comfy.model_management.current_loaded_models)
        streamed = [entry for entry in loaded if entry.model is not None and is_streamed(entry.model)]
        others = [entry for entry in loaded if entry not in streamed]
        before = _held(streamed)
        for device in {entry.device for entry in streamed}:
            free_bytes = comfy.model_management.get_free_memory(device)
            comfy.model_management.free_memory(free_bytes + size_bytes, device, keep_loaded=others)
        return before - _held(streamed)


def _held(entries: list[Any]) -> int:
    """Bytes that the streamed models of these entries hold on the card."""
    patchers = (entry.model for entry in entries)
    return sum(int(patcher.loaded_size()) for patcher in patchers if patcher is not None and is_streamed(patcher))
