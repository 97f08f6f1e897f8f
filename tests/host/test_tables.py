"""A text encoder's table stored in plain fp8 is looked up before it is cast, to the same bits, without room for it."""

from __future__ import annotations

from contextlib import nullcontext

import comfy.model_management
import pytest
import torch
from layerstream.streaming.engine.live_bytes import LiveBytes
from layerstream.streaming.host import staged
from layerstream.streaming.host.settings import Mode, Patching, StreamingSettings
from layerstream.streaming.host.staged import streamed_text
from layerstream.streaming.host.tables import looking_up_first

from scripts.division import narrow_units
from scripts.tiny_components import tiny_clip, tokens_for
from streamed import on_simulated_card

CPU = torch.device("cpu")
NAMES = ("clip_l", "t5xxl", "qwen3_4b")


@pytest.fixture(autouse=True)
def card(monkeypatch):
    on_simulated_card(monkeypatch, seed=91)
    yield
    comfy.model_management.unload_all_models()


def table_of(clip, name: str) -> torch.nn.Embedding:
    return getattr(clip.cond_stage_model, name).transformer.get_input_embeddings()


def encode(clip, name: str, seed: int = 0):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(tokens_for(name, seed))[0][0]


def peak_of_encoding(clip, name: str) -> int:
    encode(clip, name)
    with LiveBytes(CPU) as live:
        encode(clip, name)
    return live.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3fn", "e5m2"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_cast_and_not_the_table(name, dtype):
    with torch.inference_mode():
        clip = tiny_clip(name)
        table = table_of(clip, name)
        table.weight = torch.nn.Parameter(table.weight.to(dtype), requires_grad=False)
    whole_bytes = 4 * table.weight.numel()
    expected = [encode(clip, name, seed) for seed in (0, 1)]
    assert peak_of_encoding(clip, name) > whole_bytes, "the host casts the table"
    with narrow_units():
        streamed = streamed_text(clip, StreamingSettings(Mode.ALWAYS))
        again = streamed_text(streamed, StreamingSettings(Mode.AUTO, min_free_mib=0))
    assert all(torch.equal(encode(streamed, name, seed), expected[seed]) for seed in (0, 1))
    assert peak_of_encoding(streamed, name) < whole_bytes / 2
    assert torch.equal(encode(again, name), expected[0])
    assert torch.equal(encode(clip, name), expected[0])
    assert peak_of_encoding(clip, name) > whole_bytes, "without the node the model is the host's again"


def test_no_ids_are_no_rows():
    """A prompt may be all images, which are no words."""
    with torch.inference_mode():
        clip = tiny_clip("qwen3_4b")
        table = table_of(clip, "qwen3_4b")
        table.weight = torch.nn.Parameter(table.weight.to(torch.float8_e4m3fn), requires_grad=False)
        ids = torch.zeros(1, 0, dtype=torch.long)
        expected = table(ids, out_dtype=torch.float32)
        with looking_up_first(clip.cond_stage_model):
            rows = table(ids, out_dtype=torch.float32)
    assert (rows.shape, rows.dtype) == (expected.shape, expected.dtype) == ((1, 0, table.embedding_dim), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_table_is_the_hosts_to_cast(name, monkeypatch):
    with torch.inference_mode():
        clip = tiny_clip(name)
        table = table_of(clip, name)
        table.weight = torch.nn.Parameter(table.weight.to(torch.float8_e4m3fn), requires_grad=False)
    plain = encode(clip, name)
    (key,) = [
        key
        for key in clip.get_key_patches()
        if key.endswith("weight") and clip.patcher.get_model_object(key) is table.weight
    ]
    patched = clip.clone()
    patched.add_patches({key: ("diff", (torch.full(table.weight.shape, 0.25),))}, 1.0)
    expected = encode(patched, name)
    assert not torch.equal(expected, plain)
    with narrow_units():
        baked = streamed_text(patched, StreamingSettings(Mode.ALWAYS))
        at_run_time = streamed_text(patched, StreamingSettings(Mode.ALWAYS, patching=Patching.RUN_TIME))
    assert torch.equal(encode(baked, name), expected)
    looked_up = encode(at_run_time, name)
    monkeypatch.setattr(staged, "looking_up_first", lambda model: nullcontext())
    assert torch.equal(looked_up, encode(at_run_time, name)) and not torch.equal(looked_up, plain)
    assert torch.equal(encode(clip, name), plain)
