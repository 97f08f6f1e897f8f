"""Running out of memory where ComfyUI only logs it: what applies a LoRA catches all errors, and goes on with the weight
as it was. An image without its LoRA would come of that, and nothing would give way.

In: a piece of work. Out: the error that was logged in it, raised after it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or what it is driven by, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


class _Listener(logging.Handler):
    """Remembers the first error that is logged while it is handled."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if self.error is None and error is not None and is_out_of_memory(error):
            self.error = error


@contextmanager
def raising_swallowed() -> Iterator[None]:
    """The scope in which running out of memory shall not be lost. Raises what was logged of it at the scope's end."""
    listener = _Listener()
    logging.getLogger().addHandler(listener)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(listener)
    if listener.error is not None:
        raise listener.error
