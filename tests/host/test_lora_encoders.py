"""LoRAs on a model and its text encoder at once give what ComfyUI gives with the same LoRAs on both resident.

Baked is compared with ComfyUI's full load, run time with its low-memory way, both of the same weights. Those of GGUF
files are only patched at run time.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.text_encoders.sa_t5
import comfy.text_encoders.z_image
import gguf
import pytest
import torch
from gguf.constants import MODEL_ARCH
from layerstream.nodes.layer_stream_clip import LayerStreamClip
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED
from layerstream.streaming.host.gguf_loading import load_text_encoders
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import Patching

from gguf_models import write_gguf
from loras import make_lora, make_text_lora, on_low_memory
from scripts.division import narrow_units
from scripts.tiny_components import tiny_clip, tokens_for
from scripts.tiny_models import build_tiny_model, fill, sample_tiny
from streamed import on_simulated_card, stream

MODEL = "sd35-medium"


class Encoder(NamedTuple):
    """A text encoder of a GGUF file: ComfyUI's class, its narrow configuration, and what it is called where."""

    make: Any
    configuration: dict[str, Any]
    clip_type: str
    architecture: str
    number: MODEL_ARCH
    layers: int


GGUF = {
    "t5base": Encoder(
        comfy.text_encoders.sa_t5.SAT5Model,
        {"vocab_size": 512, "num_layers": 4, "d_model": 256, "d_ff": 512, "num_heads": 4, "is_gated_act": True},
        "stable_audio",
        "t5",
        MODEL_ARCH.T5,
        4,
    ),
    # ComfyUI knows it by its real width.
    "qwen3_4b": Encoder(
        comfy.text_encoders.z_image.ZImageTEModel,
        {
            "vocab_size": 512,
            "num_hidden_layers": 3,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "lumina2",
        "qwen3",
        MODEL_ARCH.QWEN3,
        3,
    ),
}
GGUF_TOKENS = [[(token, 1.0) for token in (5, 77, 130, 2, 500)]]
CASES = [
    *((name, way) for name in ("clip_l", "t5xxl", "qwen3_4b") for way in (Patching.BAKED, Patching.RUN_TIME)),
    *((name, None) for name in GGUF),
]


class Both(NamedTuple):
    """A model and a text encoder, resident or streamed."""

    model: Any
    clip: Any

    def with_lora(self, lora: dict[str, torch.Tensor], strength: float, text_strength: float) -> Both:
        """As the node LoraLoader does."""
        return Both(*comfy.sd.load_lora_for_models(self.model, self.clip, lora, strength, text_strength))


class Pair(NamedTuple):
    """A model and a text encoder, what they are compared with, and how patches reach them."""

    given: Both
    reference: Both
    tokens: dict[str, Any]
    way: Patching | None

    def run(self, both: Both) -> list[torch.Tensor]:
        """What the encoder and the model make."""
        with torch.inference_mode():
            found = both.clip.encode_from_tokens(self.tokens, return_pooled=True, return_dict=True)
        texts = [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        return [*texts, sample_tiny(both.model, MODEL, steps=1)]

    def streamed(self, both: Both, kept: float = 0.5) -> Both:
        """Streamed by the nodes, with patches in the way of this pair."""
        with narrow_units():
            model = stream(both.model, kept)
            clip = LayerStreamClip.execute(both.clip, mode="always", prefetch_blocks=0, vram_gb=0.0, min_free_mb=0)
        clip = clip.args[0]
        for patcher in (model, clip.patcher):
            patcher.settings = replace(patcher.settings, patching=self.way or Patching.AUTO)
        return Both(model, clip)


@pytest.fixture
def pair(request, monkeypatch, tmp_path) -> Iterator[Pair]:
    name, way = request.param
    on_simulated_card(monkeypatch, seed=6)
    with torch.inference_mode():
        model = build_tiny_model(MODEL)
        resident = model
        if way is None:
            clip, reference = load_gguf(name, tmp_path / "encoder.gguf")
            tokens = {name: GGUF_TOKENS}
        else:
            clip, tokens = tiny_clip(name), tokens_for(name)
            reference = clip.clone()
        if way is not Patching.BAKED:
            on_low_memory(reference.patcher)
        if way is Patching.RUN_TIME:
            resident = on_low_memory(model.clone())
    yield Pair(Both(model, clip), Both(resident, reference), tokens, way)
    gc.collect()
    comfy.model_management.unload_all_models()


def load_gguf(name: str, path: Path) -> tuple[Any, Any]:
    """A text encoder from a GGUF file with llama.cpp's names, and one of the same weights dequantised."""
    encoder = GGUF[name]
    options = {"dtype": torch.float32, f"{name}_model_config": encoder.configuration}
    options |= {f"clip_{name}_model_config": encoder.configuration}
    model = encoder.make(dtype=torch.float32, model_options={**options, "custom_operations": comfy.ops.manual_cast})
    fill(model, seed=0)
    weights = getattr(model, name if hasattr(model, name) else model.clip).transformer.state_dict()
    table = gguf.get_tensor_name_map(encoder.number, encoder.layers)
    names = {table.get_name(original, try_suffixes=(".weight", ".bias")): original for original in weights}
    written = write_gguf(
        path, {n: weights[original] for n, original in names.items()}, encoder.architecture, kinds=(*QUANTISED, "F32")
    )
    kind = comfy.sd.CLIPType[encoder.clip_type.upper()]
    state = {names[n]: weight for n, weight in written.items()}
    reference = comfy.sd.load_text_encoder_state_dicts([state], clip_type=kind, model_options=dict(options))
    return load_text_encoders([path], encoder.clip_type, **options), reference


def make_file(both: Both, seed: int) -> dict[str, torch.Tensor]:
    return make_lora(both.model, seed) | make_text_lora(both.clip, seed)


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def name_of(case: tuple[str, Patching | None]) -> str:
    return f"{case[0]} {case[1].value if case[1] else 'GGUF'}"


def assert_streamed(clip: Any, way: Patching | None) -> None:
    """With patches applied in the way of the pair."""
    patcher = clip.patcher
    assert patcher.stream.session.plan.streamed_bytes > 0
    weights = dict(patcher.model.named_parameters())
    of_gguf = {name for name, weight in weights.items() if isinstance(weight, GgufTensor)}
    assert bool(of_gguf) == (way is None) and patcher.weight_wrapper_patches.keys() <= of_gguf
    assert bool(patcher.weight_wrapper_patches) == (way is None)
    assert patcher.run_time_patches.keys() == (patcher.patches.keys() if way is Patching.RUN_TIME else set())


@pytest.mark.parametrize("pair", CASES, ids=name_of, indirect=True)
def test_on_both_at_once_before_and_after_the_nodes(pair, caplog):
    lora = make_file(pair.given, seed=1)
    plain = pair.run(pair.reference)
    expected = pair.run(pair.reference.with_lora(lora, 0.8, 0.5))
    assert not [message for message in caplog.messages if "ERROR" in message or "not loaded" in message.lower()]
    for one, other in zip(expected, plain, strict=True):
        assert one.isfinite().all() and not torch.equal(one, other)
    streamed = pair.streamed(pair.given)
    after = streamed.with_lora(lora, 0.8, 0.5)
    assert equal(pair.run(after), expected)
    assert_streamed(after.clip, pair.way)
    assert equal(pair.run(pair.streamed(pair.given.with_lora(lora, 0.8, 0.5))), expected)
    assert equal(pair.run(streamed), plain)
    assert equal(pair.run(pair.reference), plain), "something of the LoRA is left in the resident ones"


@pytest.mark.parametrize("pair", [*CASES[::2], CASES[3]], ids=name_of, indirect=True)
def test_changed_strengths_a_second_lora_and_none(pair):
    before = [stored_of(patcher) for patcher in (pair.given.model, pair.given.clip.patcher)]
    first, second = make_file(pair.given, seed=1), make_file(pair.given, seed=2)
    plain, results = pair.run(pair.reference), []
    streamed = pair.streamed(pair.given)
    for strengths in ((1.0, 0.5, -0.3), (1.0, -0.5, -0.3), (0.2, -0.5, 0.0)):
        both = [whole.with_lora(first, *strengths[:2]) for whole in (pair.reference, streamed)]
        expected, found = (pair.run(whole.with_lora(second, 0.4, strengths[2])) for whole in both)
        assert equal(found, expected)
        results.append(expected)
    assert not any(equal(one, other) for one, other in itertools.combinations(results, 2))
    assert equal(pair.run(streamed), plain)
    for patcher, weights in zip((streamed.model, streamed.clip.patcher), before, strict=True):
        patcher.detach()
        after = stored_of(patcher)
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def stored_of(patcher: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of the model behind a patcher, those of GGUF files as they are stored."""
    weights = {name: tensor.detach() for name, tensor in patcher.model.state_dict().items()}
    return {name: getattr(weight, "stored", weight).to("cpu", copy=True) for name, weight in weights.items()}


@pytest.mark.parametrize("pair", CASES[::3], ids=name_of, indirect=True)
def test_a_text_encoder_that_gets_memory_at_its_second_try(pair):
    lora = make_file(pair.given, seed=1)
    expected = pair.run(pair.reference.with_lora(lora, 0.8, 0.5))
    streamed = pair.streamed(pair.given)
    pair.run(streamed)
    blocks, calls = streamed.clip.patcher.stream.session.parts.blocks, itertools.count()

    def fail_once(*_):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("in mid-layer")

    handle = blocks[len(blocks) // 2].module.register_forward_hook(fail_once)
    patched = streamed.with_lora(lora, 0.8, 0.5)
    assert equal(pair.run(patched), expected)
    handle.remove()
    assert next(calls) > 1 and patched.clip.patcher.streaming_report()["rungs"]
    assert equal(pair.run(patched), expected)


@pytest.mark.parametrize("pair", [("t5xxl", Patching.BAKED)], ids=name_of, indirect=True)
def test_a_text_encoder_that_runs_out_of_memory_while_a_lora_is_baked(pair, monkeypatch):
    lora = make_file(pair.given, seed=1)
    plain, expected = pair.run(pair.reference), pair.run(pair.reference.with_lora(lora, 0.8, 0.5))
    streamed = pair.streamed(pair.given)
    assert equal(pair.run(streamed), plain)
    bake, bakes = StreamingModelPatcher.patch_weight_to_device, itertools.count()

    def bake_or_fail(self, *arguments, **options):
        if self.model is pair.given.clip.patcher.model and next(bakes) == 7:
            raise torch.OutOfMemoryError("while baking")
        return bake(self, *arguments, **options)

    monkeypatch.setattr(StreamingModelPatcher, "patch_weight_to_device", bake_or_fail)
    assert equal(pair.run(streamed.with_lora(lora, 0.8, 0.5)), expected)
    assert next(bakes) > 8
    assert equal(pair.run(streamed), plain)
