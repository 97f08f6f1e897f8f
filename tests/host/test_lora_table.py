"""Every kind of patch on every kind of weight gives the bits that ComfyUI gives, baked or at run time.

Baked is compared with ComfyUI's full load, run time with its low-memory way, both of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

from gguf_models import load_resident, narrow_weights, write_gguf
from lora_kinds import PATCHES
from scripts.division import narrow_units
from scripts.tiny_models import build_tiny_model, sample_tiny
from streamed import on_simulated_card, stream

FAMILY = "sd35-medium"
LARGE_ELEMENTS = 2**16


class Table(NamedTuple):
    """A model, what its streamed results are compared with, and another one to merge with."""

    model: Any
    reference: Any
    other: Any
    plain: torch.Tensor


def of_type(dtype: torch.dtype, folder: Path) -> tuple[Any, Any]:
    model = build_tiny_model(FAMILY, dtype=dtype)
    return model, model


def of_scaled_fp8(folder: Path) -> tuple[Any, Any]:
    """As files have it whose large weights are to be multiplied with scales; the newer host makes them its own."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in narrow_weights(FAMILY).items():
        tensors[name] = weight
        if name.startswith("joint_blocks.") and weight.ndim == 2 and weight.numel() >= LARGE_ELEMENTS:
            scale = weight.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
    model = comfy.sd.load_diffusion_model_state_dict(tensors)
    return model, model


def of_gguf(folder: Path) -> tuple[Any, Any]:
    path = folder / "model.gguf"
    weights = write_gguf(path, narrow_weights(FAMILY), FAMILY, kinds=(*QUANTISED, "F32"))
    return load_diffusion_model(path, dtype=torch.float32), on_low_memory(load_resident(weights))


def on_low_memory(model: Any) -> Any:
    """Have ComfyUI load the weights of `model` and its clones in its low-memory way, none of them patched in place."""

    class OnLowMemory(type(model)):
        def load(self, device_to=None, lowvram_model_memory=0, **options):
            super().load(device_to, lowvram_model_memory=1, **{**options, "full_load": False})

    model.__class__ = OnLowMemory
    return model


WEIGHTS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "bf16": partial(of_type, torch.bfloat16),
    "fp16": partial(of_type, torch.float16),
    "fp8": partial(of_type, torch.float8_e4m3fn),
    "scaled fp8": of_scaled_fp8,
    "GGUF": of_gguf,
}


@pytest.fixture(scope="module", params=WEIGHTS)
def table(request, tmp_path_factory) -> Iterator[Table]:
    make = WEIGHTS[request.param]
    with pytest.MonkeyPatch.context() as patched, narrow_units(), torch.inference_mode():
        on_simulated_card(patched, seed=9)
        model, reference = make(tmp_path_factory.mktemp("table"))
        other = build_tiny_model(FAMILY, seed=1, dtype=torch.float32)
        yield Table(model, reference, other, sample(reference))
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
    patched = patch(streamed, table.other).clone()
    PATCHES["negative lora"](patched, table.other)
    assert torch.equal(sample(patched), expected)
    session = streamed.stream.session
    assert session.plan.streamed_bytes > 0 and any(not form.is_streamed for form in session.plan.forms)
    assert_applied_as_said(patched)
    assert torch.equal(sample(streamed), table.plain)


def assert_applied_as_said(patched: Any) -> None:
    """Patches of GGUF weights are applied at run time, those of all others are baked."""
    weights = {f"diffusion_model.{name}": weight for name, weight in patched.model.diffusion_model.named_parameters()}
    at_run_time = {name for name, weight in weights.items() if isinstance(weight, GgufTensor)}
    assert patched.weight_wrapper_patches.keys() <= at_run_time
    assert patched.patches.keys().isdisjoint(at_run_time)
