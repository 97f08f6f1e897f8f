"""The ladder: each rung by an injected out-of-memory, the result unchanged, the rung told and remembered."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import comfy.model_management
import pytest
import torch
from layerstream.streaming.host.ladder import Rung
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import GIB, Mode, StreamingSettings
from layerstream.streaming.host.staged import streamed_text

from governed import ENCODER, Workflow, governed, held_bytes, make_parts
from scripts.division import narrow_units
from scripts.tiny_components import tokens_for
from streamed import on_simulated_card

SEEDS = itertools.count(5000)


@pytest.fixture
def parts(monkeypatch, load):
    on_simulated_card(monkeypatch, seed=next(SEEDS))
    yield make_parts(load)
    comfy.model_management.unload_all_models()


class Shortage:
    """Runs out of memory in a module's forward whenever `is_short` says so; counts how often."""

    def __init__(self, module: torch.nn.Module, is_short: Callable[..., bool]) -> None:
        self.times = 0
        self._is_short = is_short
        self._handle = module.register_forward_pre_hook(self._look)

    def _look(self, module: torch.nn.Module, args: tuple) -> None:
        if self._is_short(*args):
            self.times += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def end(self) -> None:
        self._handle.remove()


def streaming(model) -> StreamingModelPatcher:
    return StreamingModelPatcher.from_patcher(model, StreamingSettings(Mode.AUTO, min_free_mib=0))


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]


def lines(*rungs: Rung, stage: str = "sampling") -> list[str]:
    return [f"LayerStream: {stage} ran out of memory; trying again: {rung.value}" for rung in rungs]


def test_evicting_what_is_idle(parts, sample, caplog):
    expected = sample(parts.model)
    workflow = governed(parts, sample, mode="auto")
    workflow.encode()
    shortage = Shortage(parts.model.model.diffusion_model, lambda *_: held_bytes(workflow.clip.patcher) > 0)
    assert torch.equal(workflow.sample(), expected)
    assert told(caplog) == lines(Rung.EVICT) and shortage.times == 1
    workflow.encode()
    assert torch.equal(workflow.sample(), expected)
    assert shortage.times == 1, "remembered: the idle leave before the run"
    assert workflow.model.streaming_report()["rungs"] == ["evict"]
    shortage.end()


@pytest.mark.parametrize(
    ("share", "rungs"),
    [(0.8, (Rung.EVICT, Rung.DEMOTE)), (0.2, (Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.STREAM))],
    ids=["some", "all"],
)
def test_residents_that_are_too_many_leave(parts, sample, caplog, share, rungs):
    expected = sample(parts.model)
    patcher = streaming(parts.model)
    most = share * patcher.model_size()
    shortage = Shortage(parts.model.model.diffusion_model, lambda *_: held_bytes(patcher) > most)
    assert torch.equal(sample(patcher), expected)
    assert told(caplog) == lines(*rungs)
    assert 0 < patcher.stream.session.resident_bytes <= most
    again = shortage.times
    assert torch.equal(sample(patcher), expected) and shortage.times == again
    assert torch.equal(sample(patcher, pixels=128), sample(parts.model, pixels=128)), "other work begins at the top"
    assert shortage.times > again
    shortage.end()


def test_what_stays_is_brought_anew_after_all_has_left(parts, sample, monkeypatch):
    """Between holes of what left, an allocator finds no large piece."""
    expected = sample(parts.model)
    patcher = streaming(parts.model)
    device = patcher.stream.device
    most, left = 0.8 * patcher.model_size(), []
    shortage = Shortage(parts.model.model.diffusion_model, lambda *_: held_bytes(patcher) > most)
    trim = device.trim
    monkeypatch.setattr(device, "trim", lambda: (trim(), left.append((shortage.times, device.used_bytes))))
    assert torch.equal(sample(patcher), expected)
    assert shortage.times == 2 and (2, 0) in left
    shortage.end()


def test_fetching_less_ahead(parts, sample, caplog):
    expected = sample(parts.model)
    patcher = StreamingModelPatcher.from_patcher(parts.model, StreamingSettings(Mode.ALWAYS, prefetch_blocks=3))
    ring = []

    def is_short(*_) -> bool:
        ring.append(patcher.stream.session.ring_bytes)
        return ring[-1] > 0.75 * max(ring)

    shortage = Shortage(parts.model.model.diffusion_model.final_layer, is_short)
    assert torch.equal(sample(patcher), expected)
    assert told(caplog) == lines(Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH)
    shortage.end()


def test_splitting_guidance(parts, sample, caplog):
    patcher = streaming(parts.model)
    expected = sample(patcher, cfg=4.0)
    batches = []

    def is_short(x, *_) -> bool:
        batches.append(x.shape[0])
        return x.shape[0] > 1

    shortage = Shortage(parts.model.model.diffusion_model, is_short)
    assert torch.allclose(sample(patcher, cfg=4.0), expected, atol=1e-3)
    assert told(caplog) == lines(Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.SPLIT)
    assert batches[-4:] == [1, 1, 1, 1], "two steps of two halves"
    assert patcher.streaming_report()["rungs"] == ["demote", "evict", "prefetch", "split"]
    shortage.end()


def test_a_run_that_is_tried_again_draws_the_same_random_numbers(parts, sample):
    patcher = streaming(parts.model)
    drawn = []
    calls = itertools.count()

    def is_short(*_) -> bool:
        drawn.append(torch.randn(1).item())
        return next(calls) == 1

    shortage = Shortage(parts.model.model.diffusion_model, is_short)
    torch.manual_seed(3)
    sample(patcher)
    assert drawn[:2] == drawn[2:4] and len(drawn) == 4
    shortage.end()


def test_tiles_only_after_the_idle_have_left(parts, sample, caplog):
    # Larger than every kind of tile that ComfyUI tries, 64x64, 32x128 and 128x32, and no larger than it has to be.
    samples = torch.randn(1, 4, 72, 40, generator=torch.Generator().manual_seed(1))
    decoder = parts.vae.first_stage_model.decoder
    whole = 72 * 40

    def decode(vae) -> torch.Tensor:
        with torch.inference_mode():
            return vae.decode(samples)

    expected = decode(parts.vae)
    workflow = governed(parts, sample, mode="auto")
    workflow.encode()
    shortage = Shortage(decoder, lambda *_: held_bytes(workflow.clip.patcher) > 0)
    assert torch.equal(decode(workflow.vae), expected), "not in tiles, once there was room"
    assert told(caplog) == lines(Rung.EVICT, stage="decode")
    shortage.end()
    caplog.clear()
    shortage = Shortage(decoder, lambda z, *_: z.shape[-1] * z.shape[-2] >= whole)
    tiled_by_comfyui = decode(parts.vae)
    assert shortage.times == 1
    assert torch.equal(decode(workflow.vae), tiled_by_comfyui)
    assert told(caplog) == lines(Rung.TILE, stage="decode")
    times = shortage.times
    decode(workflow.vae)
    assert shortage.times == times + 1, "the whole image is ComfyUI's own first try; nothing leaves for it again"
    shortage.end()


def test_text_encoding(parts, caplog):
    clip = parts.clip
    with torch.inference_mode():
        expected = clip.encode_from_tokens(tokens_for(ENCODER))
        with narrow_units():
            streamed = streamed_text(clip, StreamingSettings(Mode.AUTO, min_free_mib=0))
        most = 0.8 * clip.patcher.model_size()
        shortage = Shortage(clip.cond_stage_model.clip_l.transformer, lambda *_: held_bytes(streamed.patcher) > most)
        assert torch.equal(streamed.encode_from_tokens(tokens_for(ENCODER)), expected)
    # What of a text encoder this narrow cannot stream is more than demoting leaves it.
    assert told(caplog) == lines(Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.STREAM, stage="text encode")
    shortage.end()


@pytest.mark.parametrize("is_governed", [False, True])
def test_what_never_fits_names_the_smallest_change_and_leaves_the_next_run_right(parts, sample, is_governed):
    expected = sample(parts.model)
    model = governed(parts, sample, mode="cond_only").model if is_governed else parts.model
    patcher = streaming(model)
    shortage = Shortage(parts.model.model.diffusion_model, lambda *_: True)
    with pytest.raises(torch.OutOfMemoryError) as refused:
        sample(patcher)
    shortage.end()
    message = str(refused.value)
    for rung in (Rung.EVICT, Rung.DEMOTE, Rung.PREFETCH, Rung.STREAM):
        assert rung.value in message
    assert "GiB of the card by estimate" in message and "make the image 64x64" in message and "1.00 GiB" in message
    assert shortage.times == 5
    assert torch.equal(sample(patcher), expected)
    assert patcher.streaming_report()["rungs"] == [], "what did not help is not remembered"


@pytest.mark.parametrize("share", [0.05, 0.9], ids=["weights", "ring"])
def test_a_card_too_small_for_the_least_of_the_model_is_told_apart(monkeypatch, parts, sample, share):
    expected = sample(parts.model)
    patcher = streaming(parts.model)
    patcher.stream.open(is_dynamic=False)
    session, device = patcher.stream.session, patcher.stream.device
    least_bytes = session.propose(None, prefetch=1, stream_all=True).device_bytes
    with monkeypatch.context() as small:
        small.setattr(device, "budget_bytes", int(share * least_bytes))
        with pytest.raises(torch.OutOfMemoryError) as refused:
            sample(patcher)
    message = str(refused.value)
    assert f"take {least_bytes / GIB:.2f} GiB of the card at the least" in message and "smaller or quantised" in message
    assert "make the image" not in message and Rung.STREAM.value in message
    assert torch.equal(sample(patcher), expected)


def test_other_errors_pass(parts, sample):
    patcher = streaming(parts.model)

    def fail(*_):
        raise RuntimeError("shapes do not match")

    handle = parts.model.model.diffusion_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sample(patcher)
    handle.remove()


def test_a_model_that_is_comfyuis_has_the_idle_leave(parts, sample, caplog):
    expected = sample(parts.model)
    workflow = governed(parts, sample, mode="cond_only", offload_cond_stage="auto")
    bystander = Workflow(parts, sample)
    shortage = Shortage(parts.model.model.diffusion_model, lambda *_: shortage.times == 0)
    assert torch.equal(workflow.sample(), expected)
    assert told(caplog) == lines(Rung.EVICT)
    shortage.end()
    assert torch.equal(bystander.sample(), expected)
