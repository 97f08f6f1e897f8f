"""Text encoders from GGUF files encode to the bits of the same encoders with every weight dequantised."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import gguf
import pytest
import torch
from gguf.constants import MODEL_ARCH
from layerstream.nodes.layer_stream_clip import LayerStreamClip
from layerstream.streaming.formats.gguf_file import GgufError
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.host.gguf_loading import load_diffusion_model, load_text_encoders

from gguf_models import write_gguf
from opened import HOST
from scripts import checkpoint_cache
from streamed import give_ram, on_simulated_card

# The fewest weights that ComfyUI takes for these encoders: it knows them by a depth or a width.
_T5_WIDTHS = {"d_model": 64, "d_ff": 10240} if HOST.version != "0.3.75" else {"d_model": 4096, "d_ff": 64}
T5 = {**_T5_WIDTHS, "vocab_size": 512, "d_kv": 16, "num_heads": 4, "num_layers": 24}
QWEN3 = {"vocab_size": 512, "num_hidden_layers": 3, "intermediate_size": 256}
OPTIONS = {
    "dtype": torch.float32,
    "t5xxl_model_config": T5,
    "qwen3_4b_model_config": QWEN3,
    "clip_qwen3_4b_model_config": QWEN3,
}
TOKENS = [[(token, 1.0) for token in (5, 77, 130, 2, 500)]]


@pytest.fixture(autouse=True)
def forget():
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()
    gc.collect()


def random_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in module.state_dict().items():
        values = torch.randn(weight.shape, generator=generator)
        weights[name] = 1 + 0.1 * values if "norm" in name else values / math.sqrt(weight.shape[-1])
    return weights


def write(path: Path, architecture: str, number: MODEL_ARCH, layers: int, weights) -> dict[str, torch.Tensor]:
    """Write under llama.cpp's names; give what the file holds under the original ones."""
    table = gguf.get_tensor_name_map(number, layers)
    names = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in weights}
    written = write_gguf(path, {name: weights[original] for name, original in names.items()}, architecture)
    return {names[name]: weight for name, weight in written.items()}


def load_reference(states, clip_type: str):
    kind = comfy.sd.CLIPType[clip_type.upper()]
    return comfy.sd.load_text_encoder_state_dicts(states, clip_type=kind, model_options=dict(OPTIONS))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    config = json.loads((Path(comfy.text_encoders.t5.__file__).parent / "t5_config_xxl.json").read_text())
    model = comfy.text_encoders.t5.T5(config | T5, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    path = tmp_path_factory.mktemp("t5") / "t5-Q4_K_M.gguf"
    return path, write(path, "t5", MODEL_ARCH.T5, 24, random_weights(model))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    model = comfy.text_encoders.llama.Qwen3_4B(QWEN3, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    path = tmp_path_factory.mktemp("qwen3") / "qwen3-Q4_K_M.gguf"
    return path, write(path, "qwen3", MODEL_ARCH.QWEN3, 3, random_weights(model))


def held(clip) -> int:
    return sum(isinstance(weight, GgufTensor) for weight in clip.cond_stage_model.parameters())


def test_a_t5_encodes_to_the_references_bits(t5):
    path, weights = t5
    clip, reference = load_text_encoders([path], "pixart", **OPTIONS), load_reference([dict(weights)], "pixart")
    expected = reference.encode_from_tokens({"t5xxl": TOKENS})
    assert expected.isfinite().all() and expected.std() > 0 and held(clip) > 100
    assert torch.equal(clip.encode_from_tokens({"t5xxl": TOKENS}), expected)
    assert clip.patcher.model_size() < 1.3 * path.stat().st_size


def test_a_qwen3_encodes_to_the_references_bits(qwen3):
    path, weights = qwen3
    clip, reference = load_text_encoders([path], "lumina2", **OPTIONS), load_reference([dict(weights)], "lumina2")
    expected = reference.encode_from_tokens({"qwen3_4b": TOKENS})
    assert expected.isfinite().all() and expected.std() > 0 and held(clip) > 5
    assert torch.equal(clip.encode_from_tokens({"qwen3_4b": TOKENS}), expected)


def test_a_gguf_file_beside_a_safetensors_file(t5):
    """As for FLUX, in either order."""
    path, weights = t5
    clip_l = next(path for name, path in checkpoint_cache.workflow_models().items() if "text_encoder" in name)
    plain = comfy.utils.load_torch_file(str(clip_l))
    reference = load_reference([plain, dict(weights)], "flux")
    tokens = reference.tokenize("a cat") | {"t5xxl": TOKENS}
    expected = reference.encode_from_tokens(tokens, return_pooled=True)
    for paths in ([clip_l, path], [path, clip_l]):
        clip = load_text_encoders(paths, "flux", **OPTIONS)
        found = clip.encode_from_tokens(tokens, return_pooled=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_encoder_that_ram_has_no_room_for_is_read_from_its_file(t5, monkeypatch):
    on_simulated_card(monkeypatch, seed=2)
    clip = load_text_encoders([t5[0]], "pixart", **OPTIONS)
    expected = clip.encode_from_tokens({"t5xxl": TOKENS})
    give_ram(monkeypatch, 0)
    streamed = LayerStreamClip.execute(clip, mode="always", prefetch_blocks=0, vram_gb=0.0, min_free_mb=0).args[0]
    for _ in range(2):
        assert torch.equal(streamed.encode_from_tokens({"t5xxl": TOKENS}), expected)
        session = streamed.patcher.stream.session
        assert session.in_file_bytes == session.link_bytes > 0 == session.host_bytes


def test_a_lora_on_a_text_encoder(qwen3):
    path, _ = qwen3
    clip = load_text_encoders([path], "lumina2", **OPTIONS)
    plain = clip.encode_from_tokens({"qwen3_4b": TOKENS})
    patched = clip.clone()
    key = next(name for name, weight in clip.cond_stage_model.named_parameters() if isinstance(weight, GgufTensor))
    weight = dict(clip.cond_stage_model.named_parameters())[key]
    patched.add_patches({key: ("diff", (torch.randn(weight.shape),))}, 0.5)
    assert not torch.equal(patched.encode_from_tokens({"qwen3_4b": TOKENS}), plain)
    assert torch.equal(clip.encode_from_tokens({"qwen3_4b": TOKENS}), plain)


def test_wrong_files_are_refused_by_name(t5, tmp_path):
    path, _ = t5
    with pytest.raises(GgufError, match=r"t5-Q4_K_M.gguf is a text encoder \(t5\): load it with Load CLIP"):
        load_diffusion_model(path)
    with pytest.raises(ValueError, match="no text encoders of type `nothing`"):
        load_text_encoders([path], "nothing")
    tower = tmp_path / "mmproj.gguf"
    write_gguf(tower, {"v.blk.0.ln1.weight": torch.ones(32)}, "clip")
    with pytest.raises(GgufError, match=r"mmproj.gguf is a vision tower: choose the text encoder"):
        load_text_encoders([tower], "qwen_image")
    strange = tmp_path / "strange.gguf"
    write_gguf(strange, {"blk.0.attn_q.weight": torch.ones(32, 32)}, "qwen3")
    with pytest.raises(GgufError, match=r"strange.gguf \(qwen3\) holds no text encoder"):
        load_text_encoders([strange], "lumina2")
    with pytest.raises(GgufError, match=r"strange.gguf \(unnamed\) holds no diffusion model"):
        write_gguf(strange, {"some.weight": torch.ones(32, 32)}, "")
        load_diffusion_model(strange)
