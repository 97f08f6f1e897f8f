"""Tokenizers out of GGUF metadata, in the forms that ComfyUI reads.

In: an open file. Out: the bytes of a sentencepiece model, or of Mistral's Tekken file.

Source: gguf-py's `Keys.Tokenizer`; sentencepiece's sentencepiece_model.proto for the numbers of fields; Tekken's JSON
as ComfyUI's `from_tekken_json` reads it.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from .gguf_file import GgufError, GgufFile

# `llama_token_type`; sentencepiece numbers its own in the same way.
CONTROL = 3

UNIGRAM, BPE = 1, 2


def sentencepiece_model(file: GgufFile) -> bytes:
    """A serialized `ModelProto` with the file's pieces, scores and types. Raises GgufError where there are none."""
    tokens, scores = _tokens(file), file.values("tokenizer.ggml.scores", float)
    types = file.values("tokenizer.ggml.token_type", int)
    if scores is None or types is None or not len(tokens) == len(scores) == len(types):
        raise GgufError(f"{file.path.name} has no scores and types for its {len(tokens)} tokens")
    model = file.value("tokenizer.ggml.model", str)
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _number(3, UNIGRAM if model == "t5" else BPE) + _number(4, len(tokens)) + _number(35, 1)
    for field, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        number = file.value(f"tokenizer.ggml.{name}_token_id", int)
        trainer += b"" if number is None else _number(field, number)
    normalizer = _number(3, bool(file.value("tokenizer.ggml.add_space_prefix", bool)))
    normalizer += _number(4, bool(file.value("tokenizer.ggml.remove_extra_whitespaces", bool))) + _number(5, 1)
    rules = file.values("tokenizer.ggml.precompiled_charsmap", int)
    if rules:
        normalizer += _message(2, bytes(number & 0xFF for number in rules))
    return pieces + _message(2, trainer) + _message(3, normalizer)


def tekken_model(file: GgufFile) -> bytes:
    """Tekken's JSON with the file's tokens, whose rank is their number. Raises GgufError where there are none."""
    tokens, types = _tokens(file), file.values("tokenizer.ggml.token_type", int)
    if types is None or len(types) != len(tokens):
        raise GgufError(f"{file.path.name} has no types for its {len(tokens)} tokens")
    special: list[dict[str, Any]] = []
    vocabulary: list[dict[str, Any]] = []
    byte_of = _bytes_of_characters()
    for rank, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == CONTROL:
            special.append({"rank": rank, "token_str": token, "is_control": True})
            continue
        content = bytes(byte_of[character] for character in token)
        vocabulary.append(
            {
                "rank": len(vocabulary),
                "token_bytes": base64.b64encode(content).decode("ascii"),
                "token_str": content.decode("utf-8", errors="replace"),
            }
        )
    if [token["rank"] for token in special] != list(range(len(special))):
        raise GgufError(f"{file.path.name} has special tokens among the others, which no Tekken tokenizer has")
    config = {
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(tokens),
        "default_num_special_tokens": len(special),
    }
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special}).encode()


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.values("tokenizer.ggml.tokens", str)
    if not tokens:
        raise GgufError(f"{file.path.name} has no tokenizer, which ComfyUI needs for this encoder: take another file")
    return tokens


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones of Latin-1 for themselves, those from 256 on for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


# -- protocol buffers --------------------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
