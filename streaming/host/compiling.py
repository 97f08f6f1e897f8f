"""What torch.compile has to do with a streamed model: it serves the model while all of it is on the card, and rests
while any of it streams.

A streamed weight comes to its module in a hook, from a stream of its own, and lies where others lay before it. Compiled
code would have to stop at every such hook; the compiler traces the hooks instead and fails over what it finds there.
So a pass that streams runs uncompiled, with the same bits, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("layerstream")

Wrapper = Callable[..., Any]


def unless_streaming(compiling: Wrapper) -> Wrapper:
    """APPLY_MODEL: ComfyUI's wrapper that puts a compiled model in, passed over while the model streams."""
    said = False

    def compile_what_stays(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal said
        stream = getattr(executor.class_obj.current_patcher, "stream", None)
        if stream is None or not stream.is_streaming:
            return compiling(executor, *args, **kwargs)
        if not said:
            said = True
            logger.warning(
                "LayerStream: %s runs uncompiled, because torch.compile cannot serve weights that arrive while it runs."
                " It would be compiled if all of it fitted on the card; otherwise remove the node that compiles it",
                type(executor.class_obj).__name__,
            )
        return executor(*args, **kwargs)

    return compile_what_stays


def is_compiled(obj: Any) -> bool:
    """Whether a pack has compiled this module or function, to put it in the place of one of the model's."""
    return hasattr(obj, "_orig_mod") or hasattr(obj, "_torchdynamo_orig_callable")
