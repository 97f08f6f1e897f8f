"""Text encoders in GGUF files, by the names and in the form in which ComfyUI knows them.

In: an open file with llama.cpp's names of weights. Out: a state dict with the names that published safetensors files
have; what llama.cpp's converter changed of weights is changed back. Files with the original names pass as they are.

Source of the names: `gguf.constants.TENSOR_NAMES`; of what is changed: `modify_tensors` of the models in llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from .gguf_file import GgufError, GgufFile
from .gguf_tensor import GgufTensor
from .gguf_tokenizer import sentencepiece_model, tekken_model

Weights = dict[str, torch.Tensor]

_LAYER = re.compile(r"^(enc\.|v\.)?blk\.(\d+)\.(\w+)\.(weight|bias)$")

_T5 = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_VISION = {
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ln1": "norm1",
    "ln2": "norm2",
}
_OUTSIDE = {
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "mm.0.weight": "visual.merger.mlp.0.weight",
    "mm.0.bias": "visual.merger.mlp.0.bias",
    "mm.2.weight": "visual.merger.mlp.2.weight",
    "mm.2.bias": "visual.merger.mlp.2.bias",
    "v.patch_embd": "visual.patch_embed.proj.weight",
    "v.post_ln.weight": "visual.merger.ln_q.weight",
}
# What files have that ComfyUI computes itself or does not use.
_UNUSED = ("rope_freqs.weight", "dec.", "v.position_embd")

# llama.cpp interleaves the halves of heads of these, and adds 1 to norms of those.
_INTERLEAVED = ("llama", "mistral3")
_NORMS_PLUS_ONE = ("gemma2", "gemma3")

# ComfyUI has the tokenizers of all other encoders, or their weights tell it which.
UMT5_TOKENS = 256384
TEKKEN_TOKENS = 131072


def text_encoder_weights(file: GgufFile) -> Weights:
    """The state dict of a text encoder or of its vision tower, tokenizer included where ComfyUI wants one in the file.

    Raises GgufError for weights that nothing here has a name for.
    """
    if not any(_LAYER.match(name) for name in file.entries):
        return file.tensors()
    architecture = file.architecture or ""
    weights = dict(_renamed(file, architecture))
    if architecture in _INTERLEAVED:
        _separate_halves(file, architecture, weights)
    if architecture in _NORMS_PLUS_ONE:
        for name in weights:
            if name.endswith("norm.weight"):
                weights[name] = weights[name].to(torch.float32) - 1
    return weights | _tokenizer(file, architecture)


def _renamed(file: GgufFile, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    names = _LLAMA if architecture not in _NORMS_PLUS_ONE else _GEMMA
    tensors = file.tensors()
    is_t5 = any(name.startswith("enc.blk.") for name in tensors)
    _join_vision(tensors)
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED):
            continue
        if name in _OUTSIDE:
            yield "shared.weight" if is_t5 and name == "token_embd.weight" else _OUTSIDE[name], tensor
            continue
        layer = _LAYER.match(name)
        prefix, number, part, kind = layer.groups() if layer else ("", "", "", "")
        table, place = {"enc.": (_T5, "encoder.block"), "v.": (_VISION, "visual.blocks")}.get(
            prefix, (names, "model.layers")
        )
        if part not in table:
            raise GgufError(
                f"{file.path.name} ({architecture}) has the weight `{name}`, which no encoder of this kind has: load "
                "it from a safetensors file"
            )
        full_name = table[part]
        if prefix == "enc." and part == "ffn_up" and f"enc.blk.{number}.ffn_gate.weight" not in tensors:
            full_name = "layer.1.DenseReluDense.wi"
        yield f"{place}.{number}.{full_name}.{kind}", tensor


def _join_vision(tensors: Weights) -> None:
    """Join what llama.cpp keeps apart of Qwen2.5-VL's vision tower: query, key and value, and two frames' patches."""
    for name in [name for name in tensors if name.startswith("v.blk.") and ".attn_q." in name]:
        parts = [tensors.pop(name.replace(".attn_q.", f".attn_{part}.")) for part in "qkv"]
        tensors[name.replace(".attn_q.", ".attn_qkv.")] = _joined(parts)
    if "v.patch_embd.weight" in tensors:
        frames = [tensors.pop(name).to(torch.float32) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")]
        tensors["v.patch_embd"] = torch.stack(frames, dim=2)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    kinds = {part.kind if isinstance(part, GgufTensor) else part.dtype for part in parts}
    first = parts[0]
    if isinstance(first, GgufTensor) and len(kinds) == 1:
        stored = torch.cat([part.stored for part in parts])  # type: ignore[attr-defined]
        return GgufTensor(stored, first.kind, (sum(len(part) for part in parts), *first.shape[1:]))
    return torch.cat(parts if len(kinds) == 1 else [part.to(torch.float32) for part in parts])


def _separate_halves(file: GgufFile, architecture: str, weights: Weights) -> None:
    heads = file.value(f"{architecture}.attention.head_count", int)
    key_heads = file.value(f"{architecture}.attention.head_count_kv", int) or heads
    if not heads or not key_heads:
        raise GgufError(f"{file.path.name} does not say how many heads it has: its metadata is incomplete")
    for name, weight in weights.items():
        count = {"q_proj": heads, "k_proj": key_heads}.get(name.split(".")[-2])
        if count is not None:
            rows = len(weight)
            order = torch.arange(rows).view(count, rows // count // 2, 2).transpose(1, 2).reshape(-1)
            weights[name] = _with_rows(weight, order)


def _with_rows(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, GgufTensor):
        return weight[order]
    return GgufTensor(weight.stored.view(len(weight), -1)[order].view(-1), weight.kind, tuple(weight.shape))


def _tokenizer(file: GgufFile, architecture: str) -> Weights:
    tokens = file.values("tokenizer.ggml.tokens", str) or []
    if architecture in _NORMS_PLUS_ONE or (architecture in ("t5", "t5encoder") and len(tokens) == UMT5_TOKENS):
        return {"spiece_model": as_bytes(sentencepiece_model(file))}
    if architecture in _INTERLEAVED and len(tokens) == TEKKEN_TOKENS:
        return {"tekken_model": as_bytes(tekken_model(file))}
    return {}


def as_bytes(content: bytes) -> torch.Tensor:
    """As ComfyUI's own files have a tokenizer."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def vision_file_for(path: Path) -> Path | None:
    """The file of a vision tower beside its encoder's: named mmproj and after the encoder without its quantisation."""
    stem = re.sub(r"[-_.](ud-)?i?q\d(_\w+)?$|[-_.](bf16|f16|f32)$", "", path.stem.lower())
    beside = [other for other in path.parent.glob("*.gguf") if "mmproj" in other.name.lower()]
    return min((other for other in beside if stem in other.stem.lower()), default=None)
