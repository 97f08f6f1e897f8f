"""Estimates: a dry run tells what the real run holds, takes no memory, is made once a shape, and says why it is not."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sampler_helpers
import pytest
import torch
from layerstream.streaming.engine.live_bytes import LiveBytes, peak_of
from layerstream.streaming.host import dryrun, estimate
from layerstream.streaming.host.policy import Estimation
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.estimates import PUBLISHED_LATENT, published_vae
from governed import governed, make_parts
from scripts import tiny_models
from scripts.model_configurations import MODELS
from scripts.tiny_components import ENCODERS, tiny_clip, tiny_vae, tokens_for
from streamed import on_simulated_card, weights_of

CPU = torch.device("cpu")
SAMPLED = (
    "flux",
    "flux2",
    "zimage",
    "qwen-image",
    "sdxl",
    "sd35-medium",
    "wan21-t2v",
    "hunyuan-video",
    "ltxv",
    "cascade-c",
)
CLOSE = 0.02
MIB = 1024**2


def real_peak(work: dryrun.Work) -> int:
    with torch.inference_mode(), LiveBytes(CPU) as live:
        work.run()
    return live.peak_bytes


def assert_close(work: dryrun.Work) -> None:
    before = {name: id(tensor) for name, tensor in work.module.named_parameters()}
    found = peak_of(*work)
    assert {name: id(tensor) for name, tensor in work.module.named_parameters()} == before
    assert found == pytest.approx(real_peak(work), rel=CLOSE)


@pytest.mark.parametrize("side", [8, 24])
def test_decoding_and_encoding(side):
    with torch.inference_mode():
        vae = tiny_vae()
    assert_close(dryrun.decode(vae, (1, 4, side, side)))
    assert_close(dryrun.encode(vae, (1, 3, 8 * side, 8 * side)))


@pytest.mark.parametrize(
    ("shape", "channels", "size", "options", "expected_mib"),
    [
        ((1, 512, 128, 128), 512, 3, {}, 16 + 16 + 4.5),
        ((1, 256, 1024, 1024), 128, 3, {}, 512 + 256 + 0.5625),
        ((1, 192, 3, 240, 416), 96, 3, {}, 109.6875 + 54.84375 + 0.94921875),
        ((1, 256, 1024, 1024), 128, 1, {}, 0),
        ((1, 3, 1024, 1024), 128, 3, {}, 0),
        ((1, 256, 64, 64), 256, 3, {"memory_format": torch.channels_last}, 0),
    ],
)
def test_a_convolution_takes_what_cudnn_was_seen_to_take(shape, channels, size, options, expected_mib):
    with FakeTensorMode():
        given = torch.empty(shape, dtype=torch.bfloat16).to(**options)
        weight = torch.empty(channels, shape[1], *[size] * (len(shape) - 2), dtype=torch.bfloat16)
        convolve = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv3d
        for device, taken_mib in (("cuda", expected_mib), ("cpu", 0)):
            with LiveBytes(torch.device(device)) as live:
                given, weight = given.to(device), weight.to(device)
                before = live.live_bytes
                result = convolve(given, weight, padding=size // 2)
                assert live.peak_bytes - before - result.nbytes == pytest.approx(taken_mib * MIB, rel=1e-3), device


def test_a_dry_run_of_decoding_has_a_convolution_at_its_peak(monkeypatch):
    """FLUX's published VAE, of 1024x1024 in bf16, took 2193.6 MiB on an H200."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args: 64 * 1024 * MIB)
    with torch.inference_mode():
        vae = published_vae()
        vae.first_stage_model.to(torch.bfloat16)
    vae.device, vae.vae_dtype = torch.device("cuda"), torch.bfloat16
    assert peak_of(*dryrun.decode(vae, PUBLISHED_LATENT)) / MIB == pytest.approx(2193.6, rel=CLOSE)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "qwen25_7b"])
def test_encoding_text(name):
    with torch.inference_mode():
        clip = tiny_clip(name)
    assert_close(dryrun.encode_text(clip, tokens_for(name)))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampling(name, guided):
    model = MODELS[name]
    with torch.inference_mode():
        patcher = tiny_models.build_tiny_model(name)
        generator = torch.Generator().manual_seed(0)
        conds = {
            side: comfy.sampler_helpers.convert_cond(tiny_models.conditioning(model, generator))
            for side in ("positive", "negative")
        }
    assert_close(dryrun.sample(patcher, (1, *model.latent), conds, guided))


def test_a_dry_run_is_made_once_a_shape_and_falls_back_with_a_reason(monkeypatch, caplog):
    with torch.inference_mode():
        vae, clip = tiny_vae(), tiny_clip("qwen25_7b")
    runs = []
    prepare = dryrun.decode
    monkeypatch.setattr(dryrun, "decode", lambda *args: (runs.append(args), prepare(*args))[1])
    for side in (8, 8, 16, 8):
        found = estimate.decode_bytes(vae, torch.empty(2, 4, side, side), Estimation.DRYRUN)
        assert 0 < found < vae.memory_used_decode((1, 4, side, side), vae.vae_dtype)
    assert len(runs) == 2
    with caplog.at_level(logging.WARNING, "layerstream"):
        for _ in range(2):
            found = estimate.text_bytes(clip, tokens_for("qwen25_7b"), Estimation.DRYRUN)
    assert found == estimate.text_bytes(clip, tokens_for("qwen25_7b"))
    assert caplog.text.count("no dry run of text of QwenImageTEModel") == 1


def test_by_formula_estimates_are_comfyuis_own():
    with torch.inference_mode():
        vae = tiny_vae()
    pixels = torch.rand(1, 70, 64, 3)
    dtype = vae.vae_dtype
    assert estimate.decode_bytes(vae, torch.empty(1, 4, 8, 8)) == int(vae.memory_used_decode((1, 4, 8, 8), dtype))
    assert estimate.encode_bytes(vae, pixels) == int(vae.memory_used_encode((1, 3, 64, 64), dtype))


def test_a_policy_that_estimates_by_dry_run_leaves_weights_and_results_alone(monkeypatch, load, sample, caplog):
    on_simulated_card(monkeypatch, seed=61)
    parts = make_parts(load)
    workflow = governed(parts, sample, mode="auto", estimation="dryrun")
    device = workflow.model.stream.device
    monkeypatch.setattr(device, "holds_activations", True, raising=False)
    before = weights_of(parts.model)
    first = workflow.run()
    monkeypatch.setattr(device, "free_bytes", lambda: 0)  # so that every estimate is asked for
    for one, other in zip(workflow.run(), first, strict=True):
        assert torch.equal(one, other)
    monkeypatch.undo()
    assert "no dry run" not in caplog.text
    workflow.model.detach()
    after = weights_of(parts.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
