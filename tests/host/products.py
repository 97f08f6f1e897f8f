"""Counts how a model multiplies its weights: with which operators, of quantised or of plain matrices."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch.utils._python_dispatch import TorchDispatchMode

Products = collections.Counter[tuple[str, ...]]

DEQUANTISED = ("dequantise",)


class _Counting(TorchDispatchMode):
    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        if "mm" in name or "linear" in name:
            forms = (_form(value) for value in args if isinstance(value, torch.Tensor))
            self._products[(name, *forms)] += 1
        return function(*args, **(kwargs or {}))


def _form(matrix: torch.Tensor) -> str:
    return "quantised" if isinstance(matrix, QuantizedTensor) else str(matrix.dtype)


@contextmanager
def counted_products() -> Iterator[Products]:
    """Count, by operator and what it is given, what is multiplied meanwhile, and how often a weight is dequantised."""
    products: Products = collections.Counter()
    dequantise = QuantizedTensor.dequantize

    def counting(weight: QuantizedTensor) -> torch.Tensor:
        products[DEQUANTISED] += 1
        return dequantise(weight)

    QuantizedTensor.dequantize = counting
    try:
        with _Counting(products):
            yield products
    finally:
        QuantizedTensor.dequantize = dequantise
