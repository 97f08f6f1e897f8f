"""Every kind of patch on every kind of weight gives the bits that ComfyUI gives, baked or at run time.

Baked is compared with ComfyUI's full load, run time with its low-memory way, both of the same weights. Those of GGUF
files are only patched at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import pytest
import torch
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED
from layerstream.streaming.host.gguf_loading import load_diffusion_model
from layerstream.streaming.host.settings import Patching

from gguf_models import load_resident, narrow_weights, write_gguf
from lora_kinds import PATCHES
from loras import on_low_memory
from scripts.division import narrow_units
from scripts.tiny_models import build_tiny_model, sample_tiny
from streamed import on_simulated_card, stream

FAMILY = "sd35-medium"
LARGE_ELEMENTS = 2**16


class Table(NamedTuple):
    """A model, how patches reach it, what its streamed results are compared with, and another model to merge with."""

    model: Any
    patching: Patching
    reference: Any
    other: Any
    plain: torch.Tensor


def of_type(dtype: torch.dtype, folder: Path) -> Any:
    return build_tiny_model(FAMILY, dtype=dtype)


def of_scaled_fp8(folder: Path) -> Any:
    """As files have it whose large weights are to be multiplied with scales; the newer host makes them its own."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in narrow_weights(FAMILY).items():
        tensors[name] = weight
        if name.startswith("joint_blocks.") and weight.ndim == 2 and weight.numel() >= LARGE_ELEMENTS:
            scale = weight.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
    return comfy.sd.load_diffusion_model_state_dict(tensors)


def of_gguf(folder: Path) -> tuple[Any, Any]:
    path = folder / "model.gguf"
    weights = write_gguf(path, narrow_weights(FAMILY), FAMILY, kinds=(*QUANTISED, "F32"))
    return load_diffusion_model(path, dtype=torch.float32), on_low_memory(load_resident(weights))


WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "bf16": partial(of_type, torch.bfloat16),
    "fp16": partial(of_type, torch.float16),
    "fp8": partial(of_type, torch.float8_e4m3fn),
    "scaled fp8": of_scaled_fp8,
}
CASES = [*((name, way) for name in WEIGHTS for way in (Patching.BAKED, Patching.RUN_TIME)), ("GGUF", Patching.RUN_TIME)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1].value}")
def table(request, tmp_path_factory) -> Iterator[Table]:
    name, way = request.param
    with pytest.MonkeyPatch.context() as patched, narrow_units(), torch.inference_mode():
        on_simulated_card(patched, seed=9)
        folder = tmp_path_factory.mktemp("table")
        if name == "GGUF":
            model, reference = of_gguf(folder)
        else:
            model = WEIGHTS[name](folder)
            reference = model if way is Patching.BAKED else on_low_memory(model.clone())
        other = build_tiny_model(FAMILY, seed=1, dtype=torch.float32)
        yield Table(model, way, reference, other, sample(reference))
    comfy.model_management.unload_all_models()


def sample(model: Any) -> torch.Tensor:
    return sample_tiny(model, FAMILY, steps=1)


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_of_every_kind(table, kind, caplog):
    """On a clone, from which other nodes have made another one."""
    patch = PATCHES[kind]
    expected = sample(patch(table.reference, table.other))
    assert not [record for record in caplog.records if "ERROR" in record.getMessage()], "ComfyUI did not apply it"
    assert expected.isfinite().all() and not torch.equal(expected, table.plain)
    streamed = stream(table.model, 0.5)
    streamed.settings = replace(streamed.settings, patching=table.patching)
    patched = patch(streamed, table.other).clone()
    PATCHES["negative lora"](patched, table.other)
    assert torch.equal(sample(patched), expected)
    session = streamed.stream.session
    assert session.plan.streamed_bytes > 0 and any(not form.is_streamed for form in session.plan.forms)
    assert_applied_as_said(patched, table.patching)
    assert torch.equal(sample(streamed), table.plain)


def assert_applied_as_said(patched: Any, patching: Patching) -> None:
    """Patches of GGUF weights are always applied at run time, those of others as was asked for where a layer can."""
    weights = {f"diffusion_model.{name}": weight for name, weight in patched.model.diffusion_model.named_parameters()}
    gguf = {name for name, weight in weights.items() if isinstance(weight, GgufTensor)}
    assert patched.weight_wrapper_patches.keys() <= gguf and patched.patches.keys().isdisjoint(gguf)
    of_layers = {name for name in patched.patches if name.endswith((".weight", ".bias"))}
    assert patched.run_time_patches.keys() == (of_layers if patching is Patching.RUN_TIME else set())
