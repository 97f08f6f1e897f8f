"""Has text encoders look words up before they cast: of a table stored in 8 bits, ComfyUI casts all for a few rows.

In: a text encoder. Out: while it encodes, its tables of plain fp8 numbers give the rows that are asked for as they are
stored, and those are cast, number by number, to the same bits. The whole table in float32 would be 0.5 GiB of the card
for T5-XXL and 1.4 GiB for Qwen3-4B, more than all else that encoding needs beside weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

METHOD = "forward_comfy_cast_weights"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@contextmanager
def looking_up_first(model: torch.nn.Module) -> Iterator[None]:
    """The scope in which the tables of `model` look up before they cast."""
    tables = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and hasattr(module, METHOD) and METHOD not in vars(module)
    ]
    for table in tables:
        vars(table)[METHOD] = partial(_embed, table)
    try:
        yield
    finally:
        for table in tables:
            del vars(table)[METHOD]


def _embed(module: Any, ids: torch.Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    """Rows `ids` [...] of the module's table in `out_dtype` [..., width]."""
    table = module.weight
    is_plain = table.dtype in FLOAT8 and not hasattr(table, "_qdata")
    is_changed = module.weight_function or module.max_norm is not None
    if not is_plain or is_changed or out_dtype is None or table.device != ids.device:
        return getattr(type(module), METHOD)(module, ids, out_dtype=out_dtype, **options)
    rows = table.view(torch.uint8).index_select(0, ids.reshape(-1)).view(table.dtype)
    return rows.view(*ids.shape, table.shape[1]).to(out_dtype)
