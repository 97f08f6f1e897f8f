"""Files of every kind of LoRA that ComfyUI knows for convolutions, with random values, for any model that has some.

In: a model. Out: the tensors of a file. Kinds for linear layers are in `lora_kinds.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_kinds import ALPHA, RANK, Draw, Tensors

Kind = Callable[[torch.Size, Draw], Tensors]
"""Gives the tensors of one layer whose weight has this shape: rows, columns, and the sides of the kernel."""


def lora(shape: torch.Size, draw: Draw) -> Tensors:
    rows, columns, *kernel = shape
    return {
        "lora_up.weight": draw(rows, RANK, 1, 1),
        "lora_down.weight": draw(RANK, columns, *kernel),
        "alpha": ALPHA,
    }


def lora_with_core(shape: torch.Size, draw: Draw) -> Tensors:
    """The kernel in a small tensor of its own between two that mix channels (CP decomposition)."""
    rows, columns, *kernel = shape
    return {
        "lora_up.weight": draw(rows, RANK, 1, 1),
        "lora_mid.weight": draw(RANK, RANK, *kernel),
        "lora_down.weight": draw(RANK, columns, 1, 1),
        "alpha": ALPHA,
    }


def dora(shape: torch.Size, draw: Draw) -> Tensors:
    return {**lora(shape, draw), "dora_scale": 1 + draw(shape[0], 1, 1, 1)}


def loha(shape: torch.Size, draw: Draw) -> Tensors:
    rows, columns = shape[0], math.prod(shape[1:])
    pairs = {f"hada_w{n}_a": draw(rows, RANK) for n in (1, 2)} | {f"hada_w{n}_b": draw(RANK, columns) for n in (1, 2)}
    return {**pairs, "alpha": ALPHA}


def loha_with_cores(shape: torch.Size, draw: Draw) -> Tensors:
    rows, columns, *kernel = shape
    tensors = {"alpha": ALPHA}
    for number in (1, 2):
        tensors[f"hada_w{number}_a"] = draw(RANK, rows)
        tensors[f"hada_w{number}_b"] = draw(RANK, columns)
        tensors[f"hada_t{number}"] = draw(RANK, RANK, *kernel)
    return tensors


def lokr(shape: torch.Size, draw: Draw) -> Tensors:
    rows, columns, *kernel = shape
    return {"lokr_w1": draw(2, 2), "lokr_w2": draw(rows // 2, columns // 2, *kernel), "alpha": ALPHA}


def lokr_with_core(shape: torch.Size, draw: Draw) -> Tensors:
    rows, columns, *kernel = shape
    return {
        "lokr_w1": draw(2, 2),
        "lokr_w2_a": draw(RANK, rows // 2),
        "lokr_w2_b": draw(RANK, columns // 2),
        "lokr_t2": draw(RANK, RANK, *kernel),
        "alpha": ALPHA,
    }


def difference(shape: torch.Size, draw: Draw) -> Tensors:
    return {"diff": draw(*shape), "diff_b": draw(shape[0])}


KINDS: Sequence[Kind] = (lora, lora_with_core, dora, loha, loha_with_cores, lokr, difference)

SOMETIMES_REFUSED: Sequence[Kind] = (lokr_with_core,)
"""Under some versions of torch ComfyUI's arithmetic for these fails; it logs that and leaves the weights unpatched."""


def make_file(model: Any, *kinds: Kind, seed: int = 0) -> Tensors:
    """The tensors of a file for two in three of the convolutions over images, of `kinds` in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape) / shape[0] + 16)

    turns = itertools.cycle(kinds)
    weights = model.model.diffusion_model.named_parameters()
    convolutions = [(name.removesuffix(".weight"), weight.shape) for name, weight in weights if weight.ndim == 4]
    return {
        f"diffusion_model.{layer}.{suffix}": tensor
        for number, (layer, shape) in enumerate(convolutions)
        if number % 3
        for suffix, tensor in next(turns)(shape, draw).items()
    }
