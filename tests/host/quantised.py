"""Narrow diffusion model files in the quantised formats that ComfyUI loads, with random values.

In: the name of a kind. Out: a file with the keys that ComfyUI's own loader goes by, and how that loads it. A host must
be open before anything here is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd
import torch
from layerstream.streaming.engine.codec import flattened
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scripts import host_layouts
from scripts.hosts import Host
from scripts.model_configurations import MODELS, NEWER, OLDER

Tensors = dict[str, torch.Tensor]

# Beside what makes a model narrow: wide enough for the weights of four bits to stream.
SETTINGS: dict[str, dict[str, Any]] = {
    "wan21-t2v": {**MODELS["wan21-t2v"].narrow, "dim": 512, "num_heads": 4, "ffn_dim": 1024, "num_layers": 2},
    "ltxv": MODELS["ltxv"].narrow,
}
IN_BLOCKS = re.compile(r"(block|blocks|layers)\.\d")
LEAST_ELEMENTS = 2**16
INPUT_SCALE = 0.02


class File(NamedTuple):
    tensors: Tensors
    metadata: dict[str, str] = {}

    def bytes_of(self, layer: str) -> list[int]:
        """Bytes of a layer's weight, first, and of what it is scaled with."""
        own = {name: tensor.nbytes for name, tensor in self.tensors.items() if name.startswith(f"{layer}.")}
        scales = [size for name, size in own.items() if "weight_" in name or name.endswith("scale_weight")]
        return [own[f"{layer}.weight"], *scales]


class Kind(NamedTuple):
    """How a file of the weights is written, and what the loader is told.

    `computes_in_fp8`: as on a card that multiplies fp8 matrices, which a processor can too.
    """

    write: Callable[[Tensors, Sequence[str]], File]
    options: dict[str, Any] = {}
    computes_in_fp8: bool = False
    since: str = OLDER


def plain(weights: Tensors, layers: Sequence[str]) -> File:
    return File(weights)


def fp8_by_key(weights: Tensors, layers: Sequence[str], *, with_inputs: bool) -> File:
    """The older way: a tensor called `scaled_fp8` says that the layers' weights are to be multiplied with scales."""
    tensors = {"scaled_fp8": torch.zeros(0 if with_inputs else 2, dtype=torch.float8_e4m3fn), **weights}
    for layer in layers:
        tensors[f"{layer}.weight"], tensors[f"{layer}.scale_weight"] = in_fp8(weights[f"{layer}.weight"])
        if with_inputs:
            tensors[f"{layer}.scale_input"] = torch.tensor(INPUT_SCALE)
    return File(tensors)


def fp8_by_metadata(weights: Tensors, layers: Sequence[str], *, with_inputs: bool) -> File:
    """The header's metadata name the layers and their format."""
    tensors, said = dict(weights), {}
    for layer in layers:
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = in_fp8(weights[f"{layer}.weight"])
        if with_inputs:
            tensors[f"{layer}.input_scale"] = torch.tensor(INPUT_SCALE)
        said[layer] = {"format": "float8_e4m3fn"}
    return File(tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": said})})


def by_layers(
    weights: Tensors, layers: Sequence[str], layout: str, options: dict[str, Any], said: dict[str, Any]
) -> File:
    """Each layer has a tensor of its own that says its format, as the newer host saves them."""
    from comfy.quant_ops import QuantizedTensor

    tensors = dict(weights)
    for layer in layers:
        quantised = QuantizedTensor.from_float(tensors.pop(f"{layer}.weight"), layout, **options)
        tensors |= quantised.state_dict(f"{layer}.weight")
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return File(tensors)


def by_layout(layout: str, name: str, *, said: dict[str, Any] | None = None, **options: Any) -> Kind:
    return Kind(partial(by_layers, layout=layout, options=options, said={"format": name, **(said or {})}), since=NEWER)


ROTATED = {"convrot": True, "convrot_groupsize": 256}

KINDS: dict[str, Kind] = {
    "fp8_e4m3fn": Kind(plain, {"dtype": torch.float8_e4m3fn}),
    "fp8_e5m2": Kind(plain, {"dtype": torch.float8_e5m2}),
    "fp8_e4m3fn_fast": Kind(plain, {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}, computes_in_fp8=True),
    "scaled_fp8": Kind(partial(fp8_by_key, with_inputs=False)),
    "scaled_fp8 with inputs": Kind(partial(fp8_by_key, with_inputs=True), computes_in_fp8=True),
    "metadata": Kind(partial(fp8_by_metadata, with_inputs=False)),
    "metadata with inputs": Kind(partial(fp8_by_metadata, with_inputs=True), computes_in_fp8=True),
    "float8_e4m3fn": by_layout("TensorCoreFP8E4M3Layout", "float8_e4m3fn", scale="recalculate"),
    "float8_e5m2": by_layout("TensorCoreFP8E5M2Layout", "float8_e5m2", scale="recalculate"),
    "float8_e4m3fn computed": by_layout("TensorCoreFP8E4M3Layout", "float8_e4m3fn", scale="recalculate")._replace(
        computes_in_fp8=True
    ),
    "nvfp4": by_layout("TensorCoreNVFP4Layout", "nvfp4", scale="recalculate"),
    "mxfp8": by_layout("TensorCoreMXFP8Layout", "mxfp8"),
    "int8": by_layout("TensorWiseINT8Layout", "int8_tensorwise"),
    "int8 by rows": by_layout("TensorWiseINT8Layout", "int8_tensorwise", per_channel=True),
    "int8 rotated": by_layout("TensorWiseINT8Layout", "int8_tensorwise", said=ROTATED, per_channel=True, convrot=True),
    "convrot_w4a4": by_layout("TensorCoreConvRotW4A4Layout", "convrot_w4a4"),
    "asym_w4a8_int8": by_layout("AsymW4A8Int8Layout", "asym_w4a8_int8"),
}


def in_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8_e4m3fn and the scale, float32, that it is to be multiplied with."""
    scale = weight.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def layers_of(weights: Tensors) -> list[str]:
    """The linear layers that published files quantise: the large ones of the blocks."""
    return [
        key.removesuffix(".weight")
        for key, weight in weights.items()
        if key.endswith(".weight") and IN_BLOCKS.search(key) and weight.ndim == 2 and weight.numel() >= LEAST_ELEMENTS
    ]


def random_weights(name: str, seed: int = 0) -> Tensors:
    """bf16 values for the diffusion model file of `name`, by their names in it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: (tensor.center + tensor.spread * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for tensor in host_layouts.diffusion_model(name, SETTINGS[name])
    }


def parts_of(weight: Any) -> Tensors:
    """The tensors that a quantised weight is made of, by name; none for any other."""
    return flattened(weight)[0] if is_traceable_wrapper_subclass(weight) else {}


def is_in(host: Host, kind: str) -> bool:
    """Whether a host loads the kind."""
    return KINDS[kind].since == OLDER or host.version != OLDER


def write(name: str, kind: str, folder: Path) -> tuple[File, Path]:
    """Write the file of a model in a kind; give what is in it and where it is."""
    weights = random_weights(name)
    file, path = KINDS[kind].write(weights, layers_of(weights)), folder / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in file.tensors.items()}, path, file.metadata)
    return file, path


def load(path: Path, kind: str) -> Any:
    """A patcher of the model in a file, as the node that loads diffusion models makes it."""
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options=dict(KINDS[kind].options))
