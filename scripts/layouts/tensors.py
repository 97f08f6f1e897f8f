"""The vocabulary of the layouts: one tensor of a file, and the usual modules as lists of tensors.

A value is drawn as `center + spread * normal`. Spreads keep activations of order one through any depth, so that
sampling stays finite, and no tensor is constant or zero, so that every wrong weight changes the result.
"""

import math
from typing import NamedTuple

BIAS_SPREAD = 0.05
GAIN_SPREAD = 0.1


class TensorLayout(NamedTuple):
    """One tensor of a model file: its name there, its shape, and the distribution of its random values."""

    name: str
    shape: tuple[int, ...]
    center: float
    spread: float

    @property
    def elements(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> list[TensorLayout]:
    """A linear layer that maps values of variance one to values of variance `gain` squared."""
    tensors = [TensorLayout(f"{name}.weight", (outputs, inputs), 0.0, gain / math.sqrt(inputs))]
    if bias:
        tensors.append(TensorLayout(f"{name}.bias", (outputs,), 0.0, BIAS_SPREAD))
    return tensors


def convolution(name: str, inputs: int, outputs: int, *, kernel: int = 3, gain: float = 1.0) -> list[TensorLayout]:
    """A square two-dimensional convolution with bias."""
    spread = gain / math.sqrt(inputs * kernel * kernel)
    return [
        TensorLayout(f"{name}.weight", (outputs, inputs, kernel, kernel), 0.0, spread),
        TensorLayout(f"{name}.bias", (outputs,), 0.0, BIAS_SPREAD),
    ]


def norm(name: str, width: int, *, bias: bool = False) -> list[TensorLayout]:
    """A normalisation whose gains lie around one."""
    tensors = [TensorLayout(f"{name}.weight", (width,), 1.0, GAIN_SPREAD)]
    if bias:
        tensors.append(TensorLayout(f"{name}.bias", (width,), 0.0, BIAS_SPREAD))
    return tensors


def scale(name: str, width: int) -> list[TensorLayout]:
    """The gains of an RMS norm as FLUX files name them."""
    return [TensorLayout(f"{name}.scale", (width,), 1.0, GAIN_SPREAD)]


def embedding(name: str, rows: int, width: int, *, spread: float) -> list[TensorLayout]:
    """A table of `rows` vectors."""
    return [TensorLayout(f"{name}.weight", (rows, width), 0.0, spread)]
