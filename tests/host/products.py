"""Counts how a model multiplies its weights: with which operators, of quantised or of plain matrices. And multiplies
matrices of fp8 in the time that plain ones take.
"""

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


def scaled_mm(
    matrix: torch.Tensor,
    other: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`torch._scaled_mm` of one scale a matrix. On processors with AMX but no fp8, oneDNN works that out element by
    element: 10 s for a product of 256 x 256 by 1024 x 256.
    """
    assert scale_a.numel() == scale_b.numel() == 1 and scale_result is None and not use_fast_accum
    product = torch.mm(matrix.float(), other.float()) * (scale_a * scale_b)
    if bias is not None:
        product += bias.float()
    return product.to(out_dtype)
