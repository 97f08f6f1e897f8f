"""LoRAs on convolutions give the bits that ComfyUI gives, baked or at run time.

Baked is compared with ComfyUI's full load, run time with its low-memory way, both of the same weights. Those of GGUF
files are only patched at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management
import pytest
import torch
from layerstream.streaming.formats.kinds import QUANTISED
from layerstream.streaming.host.gguf_loading import load_diffusion_model
from layerstream.streaming.host.settings import Patching

from gguf_models import detect_narrow, load_resident, narrow_weights, write_gguf
from lora_convolutions import KINDS, SOMETIMES_REFUSED, make_file
from loras import apply, on_low_memory
from scripts.division import narrow_units
from scripts.tiny_models import build_tiny_model, sample_tiny
from streamed import on_simulated_card, stream
from test_lora_table import assert_applied_as_said


class Case(NamedTuple):
    family: str
    patching: Patching
    is_gguf: bool = False

    def __str__(self) -> str:
        return f"{self.family} {'GGUF ' * self.is_gguf}{self.patching.value}"


SD15_BAKED, SD15_RUN_TIME = Case("sd15", Patching.BAKED), Case("sd15", Patching.RUN_TIME)
SDXL_BAKED, SDXL_RUN_TIME = Case("sdxl", Patching.BAKED), Case("sdxl", Patching.RUN_TIME)
SD15_GGUF = Case("sd15", Patching.RUN_TIME, is_gguf=True)


class Pair(NamedTuple):
    """A model, how patches reach it, and what its streamed results are compared with."""

    case: Case
    model: Any
    reference: Any
    plain: torch.Tensor

    def sample(self, model: Any) -> torch.Tensor:
        return sample_tiny(model, self.case.family, steps=1)

    def streamed(self, kept: float) -> Any:
        streamed = stream(self.model, kept)
        streamed.settings = replace(streamed.settings, patching=self.case.patching)
        return streamed


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    case = request.param
    with pytest.MonkeyPatch.context() as patched, narrow_units(), torch.inference_mode():
        if case.is_gguf:
            detect_narrow(patched, case.family)
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            weights = narrow_weights(case.family)
            weights = write_gguf(path, weights, case.family, reshapes=True, kinds=(*QUANTISED, "F32"))
            model, reference = load_diffusion_model(path, dtype=torch.float32), on_low_memory(load_resident(weights))
        else:
            model = build_tiny_model(case.family)
            reference = on_low_memory(model.clone()) if case.patching is Patching.RUN_TIME else model
        yield Pair(case, model, reference, sample_tiny(reference, case.family, steps=1))
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("kind", [*KINDS, *SOMETIMES_REFUSED], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("pair", [SD15_BAKED, SD15_RUN_TIME], ids=str, indirect=True)
def test_every_kind(monkeypatch, pair, kind, caplog):
    on_simulated_card(monkeypatch, seed=9)
    lora = make_file(pair.model, kind)
    expected = pair.sample(apply(pair.reference, lora, 0.8))
    is_refused = any("ERROR" in message for message in caplog.messages)
    assert not is_refused or kind in SOMETIMES_REFUSED
    assert expected.isfinite().all() and torch.equal(expected, pair.plain) == is_refused
    patched = apply(pair.streamed(0.5), lora, 0.8)
    assert torch.equal(pair.sample(patched), expected)
    assert_applied_as_said(patched, pair.case.patching)
    plan = patched.stream.session.plan
    assert plan.streamed_bytes > 0 and any(not form.is_streamed for form in plan.forms)
    assert torch.equal(pair.sample(pair.streamed(0.5)), pair.plain)


@pytest.mark.parametrize(
    ("pair", "kept", "is_packed"),
    [
        (SD15_BAKED, 0.0, True),
        (SD15_RUN_TIME, 0.5, True),
        (SDXL_BAKED, 0.5, False),
        (SDXL_RUN_TIME, 0.0, False),
        (SD15_GGUF, 0.5, False),
    ],
    ids=str,
    indirect=["pair"],
)
def test_a_file_of_all_kinds(monkeypatch, pair, kept, is_packed, caplog):
    on_simulated_card(monkeypatch, seed=9, is_packed=is_packed)
    lora = make_file(pair.model, *KINDS)
    expected = pair.sample(apply(pair.reference, lora, -0.7))
    assert not [message for message in caplog.messages if "ERROR" in message or "not loaded" in message]
    assert expected.isfinite().all() and not torch.equal(expected, pair.plain)
    patched = apply(pair.streamed(kept), lora, -0.7)
    assert torch.equal(pair.sample(patched), expected)
    assert patched.stream.session.is_packed == is_packed
    assert_applied_as_said(patched, pair.case.patching)
