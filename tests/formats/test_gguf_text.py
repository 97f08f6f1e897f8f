"""Text encoders in llama.cpp's names come out with the names and weights of the model they were made from."""

from __future__ import annotations

import json

import gguf
import numpy
import pytest
import sentencepiece
import torch
from gguf.constants import MODEL_ARCH
from layerstream.streaming.formats.gguf_file import GgufError, GgufFile
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.gguf_text import text_encoder_weights, vision_file_for

LAYERS = 2
HEADS, KEY_HEADS, WIDTH = 4, 2, 64

T5 = [
    "shared.weight",
    "encoder.final_layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    *(
        f"encoder.block.{layer}.{part}.weight"
        for layer in range(LAYERS)
        for part in (
            *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
            "layer.0.layer_norm",
            "layer.1.layer_norm",
            *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
        )
    ),
]
T5_OLD = [name.replace("wi_1", "wi") for name in T5 if "wi_0" not in name]
LLAMA_PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def llama(*more: str, biases: bool = False) -> list[str]:
    layers = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in (*LLAMA_PARTS, *more)]
    if biases:
        layers += [f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in range(LAYERS) for name in "qkv"]
    return ["model.embed_tokens.weight", "model.norm.weight", *layers]


NORMS = ("self_attn.q_norm", "self_attn.k_norm")
GEMMA = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

ENCODERS = {
    "t5": (MODEL_ARCH.T5, T5),
    "t5encoder": (MODEL_ARCH.T5ENCODER, T5),
    "llama": (MODEL_ARCH.LLAMA, llama()),
    "qwen2vl": (MODEL_ARCH.QWEN2VL, llama(biases=True)),
    "qwen3": (MODEL_ARCH.QWEN3, [*llama(*NORMS), "lm_head.weight"]),
    "gemma2": (MODEL_ARCH.GEMMA2, llama(*GEMMA)),
    "gemma3": (MODEL_ARCH.GEMMA3, llama(*NORMS, *GEMMA)),
}


def random_weights(names: list[str]) -> dict[str, torch.Tensor]:
    """Rows of half that are exact in Q8_0: scale times whole numbers, the largest 127."""
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        if "norm" in name or name.endswith("bias"):
            return torch.randint(-64, 64, (WIDTH,), generator=generator) / 64
        rows = {"k": KEY_HEADS, "v": KEY_HEADS}.get(name.split("_proj")[0][-1], HEADS) * 16
        values = torch.randint(-126, 127, (rows, WIDTH // 32, 32), generator=generator).float()
        values[..., 0] = 127
        return values.view(rows, WIDTH) / 64

    return {name: make(name) for name in names}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As convert_hf_to_gguf.py's LlamaModel.permute does."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(architecture: str, name: str, weight: torch.Tensor) -> torch.Tensor:
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return interleaved(weight, HEADS if "q_proj" in name else KEY_HEADS)
    return weight + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else weight


def write(path, architecture, tensors, *, kind="Q8_0", fields=lambda writer: None) -> GgufFile:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    fields(writer)
    for name, tensor in tensors.items():
        number = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def add_spiece(writer) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>"])
    writer.add_token_scores([0.0])
    writer.add_token_types([2])


@pytest.mark.parametrize("architecture", ENCODERS)
def test_names_and_weights_are_those_of_the_original(architecture, tmp_path):
    """llama.cpp's names are taken from the gguf package's own table."""
    number, names = ENCODERS[architecture]
    table = gguf.get_tensor_name_map(number, LAYERS)
    weights = random_weights(names)
    tensors = {
        table.get_name(name, try_suffixes=(".weight", ".bias")): converted(architecture, name, weight)
        for name, weight in weights.items()
    }
    assert None not in tensors and len(tensors) == len(weights)
    tensors["rope_freqs.weight"] = torch.ones(8)
    spiece = add_spiece if architecture.startswith("gemma") else lambda writer: None
    found = text_encoder_weights(write(tmp_path / "encoder.gguf", architecture, tensors, fields=spiece))
    found.pop("spiece_model", None)
    assert found.keys() == weights.keys()
    for name, weight in found.items():
        assert isinstance(weight, GgufTensor) == (weight.ndim == 2), name
        assert torch.equal(weight.to(torch.float32), weights[name]), name


def test_a_t5_without_gates(tmp_path):
    weights = random_weights(T5_OLD)
    table = gguf.get_tensor_name_map(MODEL_ARCH.T5, LAYERS)
    tensors = {table.get_name(name, try_suffixes=(".weight",)): weight for name, weight in weights.items()}
    assert text_encoder_weights(write(tmp_path / "t5.gguf", "t5", tensors)).keys() == weights.keys()


def test_original_names_pass_as_they_are(tmp_path):
    tensors = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 32)}
    assert text_encoder_weights(write(tmp_path / "clip.gguf", "clip", tensors)).keys() == tensors.keys()


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_vision_tower_is_put_together(kind, tmp_path):
    """llama.cpp keeps query, key and value apart, and the two frames of a patch."""
    generator = torch.Generator().manual_seed(1)
    parts = {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in "qkv"}
    frames = [torch.randn(8, 3, 14, 14, generator=generator) for _ in range(2)]
    tensors = {f"v.blk.0.attn_{name}.weight": weight for name, weight in parts.items()}
    tensors |= {f"v.blk.0.attn_{name}.bias": weight[0] for name, weight in parts.items()}
    tensors |= {"v.patch_embd.weight": frames[0], "v.patch_embd.weight.1": frames[1], "mm.2.bias": torch.ones(4)}
    tensors |= {"v.blk.0.ln1.weight": torch.ones(4), "v.post_ln.weight": torch.ones(4)}
    found = text_encoder_weights(write(tmp_path / "mmproj.gguf", "clip", tensors, kind=kind))
    assert set(found) == {
        "visual.blocks.0.attn.qkv.weight",
        "visual.blocks.0.attn.qkv.bias",
        "visual.blocks.0.norm1.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.2.bias",
        "visual.merger.ln_q.weight",
    }
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(torch.cat(list(parts.values())).numpy(), number)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, number))
    assert torch.equal(found["visual.blocks.0.attn.qkv.weight"].to(torch.float32), expected)
    assert torch.equal(found["visual.blocks.0.attn.qkv.bias"], torch.cat([parts[name][0] for name in "qkv"]))
    assert torch.equal(found["visual.patch_embed.proj.weight"], torch.stack(frames, dim=2))


@pytest.mark.parametrize("quantisation", ["Q4_K_M", "q8_0", "UD-Q6_K_XL", "IQ4_XS", "BF16", "f16"])
def test_a_vision_tower_is_found_beside_its_encoder(quantisation, tmp_path):
    for name in ("Qwen2.5-VL-7B-mmproj-BF16.gguf", "Other-mmproj.gguf", "Qwen2.5-VL-7B-Q4_0.gguf"):
        (tmp_path / name).touch()
    found = vision_file_for(tmp_path / f"Qwen2.5-VL-7B-{quantisation}.gguf")
    assert found is not None and found.name == "Qwen2.5-VL-7B-mmproj-BF16.gguf"
    assert vision_file_for(tmp_path / f"Qwen2.5-VL-3B-{quantisation}.gguf") is None


def test_what_no_name_is_known_for_is_refused(tmp_path):
    tensors = {"blk.0.attn_q.weight": torch.ones(4, 32), "blk.0.ssm_conv1d.weight": torch.ones(4, 32)}
    with pytest.raises(GgufError, match=r"odd\.gguf \(qwen3\).*`blk\.0\.ssm_conv1d\.weight`.*safetensors"):
        text_encoder_weights(write(tmp_path / "odd.gguf", "qwen3", tensors))
    with pytest.raises(GgufError, match="has no tokenizer"):
        text_encoder_weights(write(tmp_path / "bare.gguf", "gemma3", {"blk.0.attn_q.weight": torch.ones(4, 32)}))


# -- tokenizers --------------------------------------------------------------------------------------------------------

TEXT = [
    "A photo of a café, naïve résumé!",
    "  two  spaces\nand a line",
    "unseen: \u732b \u2603 \U0001f600",
    "the cat sat on it",
]


@pytest.mark.parametrize(("model_type", "named"), [("unigram", "t5"), ("bpe", "llama")])
def test_a_sentencepiece_tokenizer_gives_the_originals_tokens(model_type, named, tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("\n".join(TEXT[:1] * 20 + ["the cat sat on the mat and saw a photo"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "original"),
        vocab_size=330,
        model_type=model_type,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=named == "t5",
        remove_extra_whitespaces=named == "t5",
        normalization_rule_name="nmt_nfkc" if named == "t5" else "identity",
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "original.model"))

    def type_of(piece: int) -> int:
        kinds = {2: original.is_unknown, 3: original.is_control, 5: original.is_unused, 6: original.is_byte}
        return next((kind for kind, holds in kinds.items() if holds(piece)), 1)

    def add(writer) -> None:
        pieces = range(original.get_piece_size())
        writer.add_tokenizer_model(named)
        writer.add_token_list([original.id_to_piece(piece) for piece in pieces])
        writer.add_token_scores([original.get_score(piece) for piece in pieces])
        writer.add_token_types([type_of(piece) for piece in pieces])
        writer.add_unk_token_id(original.unk_id())
        writer.add_eos_token_id(original.eos_id())
        writer.add_add_space_prefix(named == "t5")
        writer.add_remove_extra_whitespaces(named == "t5")
        rules = charsmap(tmp_path / "original.model")
        if rules:
            writer.add_precompiled_charsmap(rules)

    architecture = "t5" if named == "t5" else "gemma3"
    monkeypatch.setattr("layerstream.streaming.formats.gguf_text.UMT5_TOKENS", original.get_piece_size())
    names = {"enc.blk.0.attn_q.weight" if named == "t5" else "blk.0.attn_q.weight": torch.ones(4, 32)}
    found = text_encoder_weights(write(tmp_path / "with.gguf", architecture, names, fields=add))["spiece_model"]
    assert found.dtype == torch.uint8
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=found.numpy().tobytes())
    for text in TEXT:
        assert rebuilt.encode(text) == original.encode(text), text
    assert (rebuilt.eos_id(), rebuilt.unk_id()) == (original.eos_id(), original.unk_id())


def charsmap(path) -> bytes:
    """The normalisation rules in a model file: field 2 of field 3, by a walk over the top level."""

    def fields(content):
        place = 0
        while place < len(content):
            key, place = varint(content, place)
            if key & 7 == 2:
                length, place = varint(content, place)
                yield key >> 3, content[place : place + length]
                place += length
            elif key & 7 == 0:
                place = varint(content, place)[1]
            else:
                place += 4

    def varint(content, place):
        value = shift = 0
        while True:
            byte = content[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                return value, place

    normalizer = dict(fields(path.read_bytes()))[3]
    return dict(fields(normalizer)).get(2, b"")


def test_a_tekken_tokenizer_has_the_bytes_of_its_tokens(tmp_path, monkeypatch):
    tokens, types = ["<s>", "[INST]", "a", "\u0120cat", "Ã©", "\u010d"], [3, 3, 1, 1, 1, 1]

    def add(writer) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)

    monkeypatch.setattr("layerstream.streaming.formats.gguf_text.TEKKEN_TOKENS", len(tokens))
    weights = {"blk.0.attn_q.weight": torch.ones(32, 32)}
    found = text_encoder_weights(write(tmp_path / "mistral.gguf", "llama", weights, fields=add))["tekken_model"]
    tekken = json.loads(found.numpy().tobytes())
    assert [token["token_str"] for token in tekken["special_tokens"]] == ["<s>", "[INST]"]
    assert [token["token_str"] for token in tekken["vocab"]] == ["a", " cat", "é", "\r"]
    assert [token["rank"] for token in tekken["vocab"]] == [0, 1, 2, 3]
    assert tekken["config"]["default_num_special_tokens"] == 2


def test_numbers_of_the_reference_quantiser_are_exact_here():
    """The tests above rely on it."""
    weight = random_weights(["x.weight"])["x.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    assert numpy.array_equal(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind), weight.numpy())
