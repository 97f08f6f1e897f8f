"""Text encoders of quantised files stream through Layer-Stream CLIP with the bits of the resident ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import comfy.utils
import pytest
import torch
from layerstream.nodes.layer_stream_clip import LayerStreamClip
from layerstream.streaming.engine.moving import cut_of

from opened import HOST
from quantised import KINDS, is_in, layers_of, parts_of
from scripts.division import narrow_units
from scripts.model_configurations import OLDER
from scripts.tiny_components import ENCODERS, tiny_clip, tokens_for
from streamed import on_simulated_card


class Loader(NamedTuple):
    """How ComfyUI makes an encoder's class from what it detects in the file, and the layer that is its table."""

    make: Any
    detect: Any
    table: str


LOADERS = {
    "t5xxl": Loader(comfy.text_encoders.flux.flux_clip, comfy.text_encoders.sd3_clip.t5_xxl_detect, "shared"),
    "qwen3_4b": Loader(
        comfy.text_encoders.z_image.te, comfy.text_encoders.hunyuan_video.llama_detect, "model.embed_tokens"
    ),
}
ENCODER_KINDS = ("scaled_fp8", "float8_e4m3fn", "nvfp4", "mxfp8", "int8", "int8 by rows")
# Formats in which the newer host looks rows of a table up.
TABLE_KINDS = ("float8_e4m3fn", "int8")


def quantised_clip(name: str, kind: str) -> Any:
    """ComfyUI's CLIP object around a narrow encoder, made as from a file of `kind`."""
    models, loader = tiny_clip(name).cond_stage_model, LOADERS[name]
    weights = getattr(models, name).transformer.state_dict()
    layers = layers_of(weights) + [loader.table] * (kind in TABLE_KINDS)
    tensors = dict(KINDS[kind].write(weights, layers).tensors)
    if "scaled_fp8" in tensors:
        tensors["scaled_fp8"] = tensors["scaled_fp8"][:0]  # the older host takes no other size in encoders
    if HOST.version != OLDER:
        tensors, _ = comfy.utils.convert_old_quants(tensors, "", metadata={})
    target = SimpleNamespace(
        params={}, clip=loader.make(**loader.detect(tensors)), tokenizer=lambda **_: SimpleNamespace()
    )
    options: dict[str, Any] = {f"{key}_model_config": narrow for key, narrow in ENCODERS[name].configurations.items()}
    options["dtype"] = torch.bfloat16
    files = [tensors]
    if name == "t5xxl":
        files.append(models.clip_l.transformer.state_dict())
    if HOST.version != OLDER:
        return comfy.sd.CLIP(target, state_dict=files, model_options=options)
    clip = comfy.sd.CLIP(target, model_options=options)
    for file in files:
        clip.load_sd(file)
    return clip


def encode(clip: Any, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(tokens_for(name), return_dict=True)["cond"]


@pytest.mark.parametrize("kind", [kind for kind in ENCODER_KINDS if is_in(HOST, kind)])
@pytest.mark.parametrize("name", LOADERS)
def test_a_quantised_encoder_streams_with_equal_bits(monkeypatch, name, kind):
    on_simulated_card(monkeypatch, seed=4)
    with torch.inference_mode():
        clip = quantised_clip(name, kind)
    expected = encode(clip, name)
    assert expected.isfinite().all() and expected.std() > 0
    with narrow_units():
        streamed = LayerStreamClip.execute(clip, mode="always", prefetch_blocks=0, vram_gb=0.0, min_free_mb=0).args[0]
    for _ in range(2):
        assert torch.equal(encode(streamed, name), expected)
    report, session = streamed.patcher.streaming_report(), streamed.patcher.stream.session
    assert report["unplaced"] == report["broken_passes"] == 0 and report["moved_bytes_per_step"] > 0
    moving = sum(cut_of(block) < len(block.weights) for block in session.parts.blocks)
    assert report["hits"] + report["misses"] == report["passes"] * moving, "something is used without a call"
    homes = [weight.home for block in session.parts.blocks for weight in block.weights]
    stored = [next(iter(parts_of(home).values()), home) for home in homes]
    assert sum(tensor.dtype.itemsize == 1 for tensor in stored) >= 8, "little of it is quantised"
    assert torch.equal(encode(clip, name), expected)
    streamed.patcher.detach()
    comfy.model_management.unload_all_models()
