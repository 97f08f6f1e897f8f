"""Launches a Triton kernel without Triton's own launcher.

At each launch Triton works out anew which compiled variant of a kernel its arguments need, for 0.1 ms of the host's
time in the midst of a model. So variants are kept here, and launched themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

logger = logging.getLogger("layerstream")


@triton.jit
def probe_kernel(number):
    tl.program_id(0)


@cache
def can_launch() -> bool:
    """Whether Triton makes kernels for this machine; where it is there and does not, the log says why. Raises
    RuntimeError when the card is out of memory.

    It has C compiled for what launches a kernel. On Windows it is often there without the headers and libraries that
    this takes, which ComfyUI's embedded Python does not have.
    """
    try:
        probe_kernel[(1,)](2)
    except Exception as reason:  # compilers, drivers and processes that are started raise what they like
        if "out of memory" in str(reason).lower():
            raise  # the card is full, which says nothing of Triton: it is tried again
        logger.warning(
            "LayerStream: Triton is installed but makes no kernel here, so weights travel raw and GGUF weights are "
            "dequantised at a fraction of the speed: %s: %s",
            type(reason).__name__,
            str(reason).partition("\n")[0],
        )
        return False
    return True


class Launcher:
    """One kernel, compiled with `options` for whatever devices and arguments it is launched with."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel = kernel
        self._options = options
        self._variants: dict[tuple[object, ...], Any] = {}
        self._can_launch_variants = True

    def __call__(self, programs: int, arguments: tuple[object, ...], key: tuple[object, ...]) -> None:
        """Run `programs` of the kernel on the current device and stream.

        `key` tells apart what Triton compiles apart: the device, dtypes, constants, whether pointers are aligned to 16
        bytes, and `variant_of` numbers.
        """
        variant = self._variants.get(key)
        if variant is None or not self._launch(torch.cuda.current_stream(), variant, programs, arguments):
            self._variants[key] = self._kernel[(programs,)](*arguments, **self._options)

    def prepared(
        self, programs: int, arguments: tuple[object, ...], key: tuple[object, ...]
    ) -> Callable[[torch.cuda.Stream], None]:
        """What runs `programs` of the kernel on a stream, to be called again and again while the memory that
        `arguments` name lies where it is now.

        Which device a tensor is on and which stream is current are asked for once: that takes longer than the launch.
        """
        addresses = tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments)

        def launch(stream: torch.cuda.Stream) -> None:
            variant = self._variants.get(key)
            if variant is None or not self._launch(stream, variant, programs, addresses):
                with torch.cuda.stream(stream):
                    self(programs, arguments, key)

        return launch

    def _launch(self, stream: torch.cuda.Stream, variant: Any, programs: int, arguments: tuple[object, ...]) -> bool:
        """Launch a compiled variant on `stream`, whichever is current; False where Triton wants other arguments."""
        if self._can_launch_variants:
            about = stream.cuda_stream, variant.function, variant.packed_metadata
            try:
                variant.run(programs, 1, 1, *about, None, None, None, *arguments)
            except TypeError:
                self._can_launch_variants = False
        return self._can_launch_variants


def variant_of(number: int) -> tuple[bool, bool, bool]:
    """What of a number Triton compiles into a kernel."""
    return number == 1, number % 16 == 0, number >> 31 > 0
