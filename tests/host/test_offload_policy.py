"""The Offload Policy node: what it takes and refuses, what none leaves alone, and that auto moves what is short."""

from __future__ import annotations

import logging

import comfy.model_management
import pytest
import torch
from layerstream.nodes.offload_policy import OffloadPolicy
from layerstream.streaming.host.govern import Parts, govern
from layerstream.streaming.host.policy import OVERRIDES, PolicyMode, PolicySettings
from layerstream.streaming.host.settings import GIB, MIB
from layerstream.streaming.host.stages import MARGIN_BYTES

from governed import Workflow, governed, held_bytes, make_parts
from streamed import on_simulated_card
from test_stages import equal

DEFAULTS = {
    "mode": "auto",
    "estimation": "formula",
    "log": True,
    **{name: "auto" for name in OVERRIDES},
}


@pytest.fixture
def parts(monkeypatch, load):
    on_simulated_card(monkeypatch, seed=5)
    return make_parts(load)


def fingerprint(patcher) -> tuple:
    """What a hook, a wrapper or another placement would change."""
    modules = list(patcher.model.modules())
    return (
        type(patcher),
        {name: (tensor.data_ptr(), str(tensor.device)) for name, tensor in patcher.model.state_dict().items()},
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        {kind: list(table) for kind, table in patcher.wrappers.items()},
        {kind: list(table) for kind, table in patcher.callbacks.items()},
        dict(patcher.attachments),
    )


def test_the_schema_is_complete():
    schema = OffloadPolicy.define_schema()
    assert schema.node_id == "LayerStreamOffloadPolicy"
    widgets = ["mode", *OVERRIDES, "estimation", "log"]
    assert [item.id for item in schema.inputs] == ["model", "clip", "vae", *widgets, "budget"]
    assert all(item.tooltip for item in schema.inputs)
    assert {item.id for item in schema.inputs}.isdisjoint(item.id for item in schema.outputs)


def test_none_gives_the_very_objects_and_leaves_them_alone(parts, sample):
    expected = Workflow(parts, sample).run()
    patchers = (parts.model, parts.clip.patcher, parts.vae.patcher)
    before = [fingerprint(patcher) for patcher in patchers]
    given = OffloadPolicy.execute(**{**DEFAULTS, "mode": "none"}, **parts._asdict()).args
    assert all(one is other for one, other in zip(given, parts, strict=True))
    assert equal(Workflow(Parts(*given), sample).run(), expected)
    assert [fingerprint(patcher) for patcher in patchers] == before


def test_parts_that_are_not_connected_come_out_as_nothing(parts):
    model, clip, vae = OffloadPolicy.execute(**DEFAULTS, vae=parts.vae).args
    assert model is None and clip is None and vae is not parts.vae


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "none", "offload_diffusion": "on"}, "offload_diffusion is on: set it to auto"),
        ({"mode": "cond_only", "offload_cond_stage": "off", "reload_cond_stage": "on"}, "set offload_cond_stage to on"),
        ({"mode": "cond_only", "reload_diffusion": "on"}, "set offload_diffusion to on"),
        ({"mode": "layer_streaming", "reload_diffusion": "on"}, "choose cond_diffusion"),
        ({"mode": "fast"}, "fast"),
        ({"offload_diffusion": "maybe"}, "maybe"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicySettings(**settings)


def test_a_text_encoder_without_its_model_is_refused(parts):
    with pytest.raises(ValueError, match="connect the model to the same"):
        govern(Parts(None, parts.clip, parts.vae), PolicySettings())
    with pytest.raises(ValueError, match="nothing is connected"):
        govern(Parts(None, None, None), PolicySettings())


def test_an_override_keeps_the_text_encoder_or_makes_the_model_leave(parts, sample):
    workflow = governed(parts, sample, mode="cond_diffusion", offload_cond_stage="off")
    workflow.run()
    assert workflow.on_card() == set(), "a part that never leaves is ComfyUI's"
    workflow = governed(parts, sample, mode="cond_only", offload_diffusion="on")
    workflow.encode(), workflow.sample()
    assert workflow.on_card() == {"model"}
    workflow.decode()
    assert workflow.on_card() == set()


def test_reload_on_brings_the_text_encoder_back_when_the_image_is_done(parts, sample, caplog):
    workflow = governed(parts, sample, mode="cond_only", reload_cond_stage="on")
    with caplog.at_level(logging.INFO, "layerstream"):
        workflow.run()
    assert workflow.on_card() == {"clip"}
    assert "text encoder left the card before sampling: 0.03 GiB in" in caplog.text
    assert "text encoder is back on the card: 0.03 GiB in" in caplog.text and "GiB/s" in caplog.text
    moves = workflow.clip.patcher.stream.moves
    workflow.encode()
    assert moves.returns.count == 1


def test_an_image_is_not_lost_where_what_should_come_back_finds_no_room(parts, sample, caplog):
    caplog.set_level(logging.INFO)
    expected = Workflow(parts, sample).run()
    workflow = governed(parts, sample, mode="cond_only", reload_cond_stage="on")
    workflow.encode()
    workflow.sample()
    device = workflow.clip.patcher.stream.device
    device.limit(device.taken_bytes())
    assert torch.equal(workflow.decode(), expected.image)
    assert "text encoder comes back when it is needed" in caplog.text and "trying again" not in caplog.text
    device.limit(None)
    assert equal(workflow.run(), expected)


def test_reload_off_streams_the_text_encoder(parts, sample):
    expected = Workflow(parts, sample).run()
    workflow = governed(parts, sample, mode="cond_only", reload_cond_stage="off")
    assert equal(workflow.run(), expected) and equal(workflow.run(), expected)
    assert workflow.clip.patcher.stream.session.meter.passes == 4


def test_silence(parts, sample, caplog):
    workflow = governed(parts, sample, mode="cond_only", is_logged=False)
    with caplog.at_level(logging.INFO, "layerstream"):
        workflow.run()
    assert "left the card" not in caplog.text


@pytest.fixture
def small_card(monkeypatch, load, sample):
    """Makes an auto workflow on a card that lacks `short` bytes for text encoder and model together."""

    def make(short: int) -> Workflow:
        parts = make_parts(load)
        size = parts.model.model_size() + parts.clip.patcher.model_size() + MARGIN_BYTES - short
        on_simulated_card(monkeypatch, size_gib=size / GIB)
        return governed(parts, sample, mode=PolicyMode.AUTO)

    return make


def test_auto_moves_only_what_is_short(small_card):
    workflow = small_card(short=2 * MIB)
    workflow.encode()
    workflow.sample()
    kept = held_bytes(workflow.clip.patcher)
    whole = workflow.clip.patcher.model_size()
    assert workflow.model.stream.session.plan.is_resident
    assert 0 < kept < whole and whole - kept < 6 * MIB
    workflow.encode()
    assert held_bytes(workflow.clip.patcher) >= whole
    assert 0 < held_bytes(workflow.model) < workflow.model.model_size()
    assert workflow.model.stream.moves.departures.bytes < 8 * MIB


def test_auto_streams_a_model_that_does_not_fit_alone(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    parts = make_parts(load)
    expected = Workflow(parts, sample).run()
    on_simulated_card(monkeypatch, size_gib=(0.7 * parts.model.model_size() + MARGIN_BYTES) / GIB)
    workflow = governed(parts, sample, mode="auto")
    for _ in range(2):
        assert equal(workflow.run(), expected)
    assert not workflow.model.stream.session.plan.is_resident
    comfy.model_management.unload_all_models()


def test_without_a_card_parts_stay_comfyuis_and_the_log_says_so(monkeypatch, load, sample, caplog):
    on_simulated_card(monkeypatch)
    monkeypatch.delenv("LAYERSTREAM_SIMULATE_GIB")
    parts = make_parts(load)
    expected = Workflow(parts, sample).run()
    with caplog.at_level(logging.WARNING, "layerstream"):
        workflow = governed(parts, sample, mode="cond_diffusion")
    assert "stays where ComfyUI puts it" in caplog.text
    assert equal(workflow.run(), expected)
