"""Narrow models as GGUF files, with the same model's weights as the reference dequantises them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import gguf
import numpy
import torch
from layerstream.streaming.formats.kinds import QUANTISED, Kind

from scripts.tiny_models import build_model, build_tiny_model, loads_from_file

Weights = dict[str, torch.Tensor]

EVERY_KIND = (*QUANTISED, "F16", "BF16", "F32")
# As in published files: these keep their type, and so do vectors.
KEPT_PLAIN = 1024


class Turns:
    """Kinds in turn, so that a file has all that its shapes allow."""

    def __init__(self, kinds: Sequence[str]) -> None:
        fitting = {row: [kind for kind in kinds if row % ELEMENTS[kind] == 0] for row in (1, 32, 256)}
        self._kinds = {row: itertools.cycle(fit) for row, fit in fitting.items()}

    def kind_for(self, weight: torch.Tensor, row: int) -> str:
        if weight.ndim < 2 or weight.numel() <= KEPT_PLAIN:
            return "F32"
        return next(self._kinds[256 if row % 256 == 0 else 32 if row % 32 == 0 else 1])


ELEMENTS = {"F16": 1, "BF16": 1, "F32": 1} | {name: kind.elements for name, kind in QUANTISED.items()}


def write_gguf(
    path: Path, weights: Weights, architecture: str, *, reshapes: bool = False, kinds: Sequence[str] = EVERY_KIND
) -> Weights:
    """Write `weights` in `kinds` as they fit; give what the reference makes of the file, in float32.

    `reshapes` gives weights rows of 256 where theirs fit no block, as converters of UNets do.
    """
    writer = gguf.GGUFWriter(path, architecture)
    turns, chance, expected = Turns(kinds), numpy.random.default_rng(0), {}
    for name, weight in weights.items():
        values = weight.detach().float().numpy()
        if reshapes and weight.ndim > 1 and values.size % 256 == 0 and values.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in values.shape])
            values = values.reshape(-1, 256)
        kind = gguf.GGMLQuantizationType[turns.kind_for(weight, values.shape[-1] if values.ndim else 1)]
        stored = _quantise(values, kind, chance)
        writer.add_tensor(name, stored, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()).view(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _quantise(values: numpy.ndarray, kind: gguf.GGMLQuantizationType, chance: numpy.random.Generator) -> numpy.ndarray:
    """The reference quantises few kinds; of the others, random blocks of about the same size of values."""
    try:
        return gguf.quants.quantize(numpy.ascontiguousarray(values), kind)
    except NotImplementedError:
        return _random_blocks(values, QUANTISED[kind.name], chance)


# Where the float16 scales of a block lie, and what one of them multiplies at most.
_SCALES = {
    "IQ4_NL": ((0, 127),),
    "IQ4_XS": ((0, 127 * 32),),
    "Q2_K": ((80, 3 * 15), (82, 15)),
    "Q3_K": ((108, 4 * 32),),
    "Q4_K": ((0, 15 * 63), (2, 63)),
    "Q5_K": ((0, 31 * 63), (2, 63)),
    "Q6_K": ((208, 32 * 128),),
}


def _random_blocks(values: numpy.ndarray, kind: Kind, chance: numpy.random.Generator) -> numpy.ndarray:
    blocks = values.size // kind.elements
    stored = chance.integers(0, 256, (blocks, kind.size_bytes), dtype=numpy.uint8)
    reach = 2 * float(numpy.abs(values).mean() + 1e-6)
    for place, factor in _SCALES[kind.name]:
        scales = (reach / factor * chance.uniform(0.5, 1.5, (blocks, 1))).astype(numpy.float16)
        stored[:, place : place + 2] = scales.view(numpy.uint8)
    return stored.reshape(*values.shape[:-1], -1)


def detect_narrow(monkeypatch: Any, name: str) -> None:
    """Have ComfyUI's loaders find the configuration of the narrow model `name`, whose widths it takes for known."""
    if loads_from_file(name):
        return

    def configuration(*_: Any, **__: Any) -> Any:
        return build_model(name, dtype=torch.float32, device="meta", narrow=True).model_config

    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", configuration)


def narrow_weights(name: str) -> Weights:
    return build_tiny_model(name).model.diffusion_model.state_dict()


def load_resident(weights: Weights) -> Any:
    """ComfyUI's own model of these weights, all of them float32."""
    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": torch.float32})
