"""Launches a Triton kernel without Triton's own launcher.

At each launch Triton works out anew which compiled variant of a kernel its arguments need, for 0.1 ms of the host's
time in the midst of a model. So variants are kept here, and launched themselves.
"""

from __future__ import annotations

from typing import Any


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
        if variant is None or not self._launch(variant, programs, arguments):
            self._variants[key] = self._kernel[(programs,)](*arguments, **self._options)

    def _launch(self, variant: Any, programs: int, arguments: tuple[object, ...]) -> bool:
        """Launch a compiled variant; False where this version of Triton wants other arguments."""
        if self._can_launch_variants:
            try:
                variant[(programs, 1, 1)](*arguments)
            except TypeError:
                self._can_launch_variants = False
        return self._can_launch_variants


def variant_of(number: int) -> tuple[bool, bool, bool]:
    """What of a number Triton compiles into a kernel."""
    return number == 1, number % 16 == 0, number >> 31 > 0
