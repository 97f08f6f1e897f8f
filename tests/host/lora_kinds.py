"""Files of every kind of LoRA that ComfyUI knows, with random values, for the linear layers of any model.

In: a model. Out: for each kind, a function that gives the same model with patches of that kind, as ComfyUI's nodes add
them. A host must be open before anything here is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from loras import apply

Tensors = dict[str, torch.Tensor]
Draw = Callable[..., torch.Tensor]
"""Gives random values of a shape."""

RANK = 4
SIDE = 8
"""Of the matrices that turn a weight's rows."""
ALPHA = torch.tensor(2.0)

NORMS = ("ln_q.weight", "ln_k.weight")
"""ComfyUI's low-memory way has them computed by another function where they are patched."""


def lora(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"lora_up.weight": draw(rows, RANK), "lora_down.weight": draw(RANK, columns), "alpha": ALPHA}


def dora(rows: int, columns: int, draw: Draw) -> Tensors:
    return {**lora(rows, columns, draw), "dora_scale": 1 + draw(rows, 1)}


def dora_by_columns(rows: int, columns: int, draw: Draw) -> Tensors:
    return {**lora(rows, columns, draw), "dora_scale": 1 + draw(1, columns)}


def loha(rows: int, columns: int, draw: Draw) -> Tensors:
    pairs = {f"hada_w{n}_a": draw(rows, RANK) for n in (1, 2)} | {f"hada_w{n}_b": draw(RANK, columns) for n in (1, 2)}
    return {**pairs, "alpha": ALPHA}


def lokr(rows: int, columns: int, draw: Draw) -> Tensors:
    small = {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(rows // 2, RANK), "lokr_w2_b": draw(RANK, columns // 2)}
    return {**small, "alpha": ALPHA}


def oft(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"oft_blocks": draw(rows // SIDE, SIDE, SIDE), "alpha": ALPHA}


def boft(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"oft_blocks": draw(2, rows // SIDE, SIDE, SIDE), "rescale": 1 + draw(rows, 1), "alpha": ALPHA}


def glora(rows: int, columns: int, draw: Draw) -> Tensors:
    ways = {"a1": (columns, RANK), "a2": (RANK, columns), "b1": (rows, RANK), "b2": (RANK, columns)}
    return {f"{name}.weight": draw(*shape) for name, shape in ways.items()}


def difference(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"diff": draw(rows, columns)}


def other_weights(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"set_weight": draw(rows, columns)}


def biases(rows: int, columns: int, draw: Draw) -> Tensors:
    return {"diff_b": draw(rows)}


FILES = (lora, dora, dora_by_columns, loha, lokr, oft, boft, glora, difference, other_weights, biases)


def make_file(model: Any, kind: Callable[[int, int, Draw], Tensors], seed: int = 0) -> Tensors:
    """The tensors of a file of `kind` for every second linear layer, in blocks and outside."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape) / shape[0] + 16)

    weights = dict(model.model.diffusion_model.named_parameters())
    layers = {name.removesuffix(".bias") for name in weights if name.endswith(".bias")}
    shapes = {name: weights[f"{name}.weight"].shape for name in sorted(layers)}
    linear = {name: shape for name, shape in shapes.items() if len(shape) == 2 and shape[0] % (2 * SIDE) == 0}
    return {
        f"diffusion_model.{name}.{suffix}": tensor
        for name in list(linear)[::2]
        for suffix, tensor in kind(*linear[name], draw).items()
    }


def one_file(kind: Callable[[int, int, Draw], Tensors], strength: float) -> Callable[[Any, Any], Any]:
    return lambda model, _: apply(model, make_file(model, kind), strength)


def several(model: Any, _: Any) -> Any:
    for seed, (kind, strength) in enumerate(((lora, 0.7), (dora, -0.4), (difference, 1.0), (lora, -1.2))):
        model = apply(model, make_file(model, kind, seed), strength)
    return model


def merge(model: Any, other: Any) -> Any:
    """As the node ModelMergeSimple but for norms, with a LoRA on the result."""
    merged = model.clone()
    for key, weights in other.get_key_patches("diffusion_model.").items():
        if not key.endswith(NORMS):
            merged.add_patches({key: weights}, 0.3, 0.7)
    return apply(merged, make_file(model, lora), 0.5)


PATCHES: dict[str, Callable[[Any, Any], Any]] = {
    **{kind.__name__: one_file(kind, 0.8) for kind in FILES},
    "whole lora": one_file(lora, 1.0),
    "negative lora": one_file(lora, -0.6),
    "negative dora": one_file(dora, -0.6),
    "negative boft": one_file(boft, -0.6),
    "several": several,
    "merge": merge,
}
"""By what it is called, a function of a model and another one of the same shapes."""
