"""Budgets: what a setting allows, and plans that hold still when free memory wavers."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.sampler_helpers
import pytest
import torch
from layerstream.streaming.engine.forecast import Forecast, Form
from layerstream.streaming.engine.plan import Packing, Plan
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.planning import choose_plan
from layerstream.streaming.host.settings import GIB, MIB, Mode, StreamingSettings
from layerstream.streaming.host.streams import Way

from streamed import on_simulated_card, stream


@pytest.mark.parametrize(
    ("vram_gib", "free", "allowed", "reserve", "expected"),
    [
        (0.0, 10 * GIB, 9 * GIB, 0, 9 * GIB),
        (0.0, 10 * GIB, 9 * GIB, 3 * GIB, 7 * GIB),
        (0.0, 10 * GIB, float("inf"), 0, 10 * GIB - 256 * MIB),
        (4.0, 10 * GIB, 1 * GIB, 0, 4 * GIB),
        (12.0, 10 * GIB, 9 * GIB, 0, 10 * GIB - 256 * MIB),
        (-3.0, 10 * GIB, 1 * GIB, 0, 7 * GIB),
        (-0.1, 10 * GIB, 1 * GIB, 0, 10 * GIB - 256 * MIB),
    ],
)
def test_the_budget_of_a_setting(vram_gib, free, allowed, reserve, expected):
    settings = StreamingSettings(Mode.AUTO, vram_gib=vram_gib)
    assert settings.budget_bytes(free, allowed, reserve) == expected


def test_a_plan_stays_when_free_memory_wavers(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    expected = sample(model)
    streamed = StreamingModelPatcher.from_patcher(model, StreamingSettings(Mode.AUTO, min_free_mib=0))
    device = streamed.stream.device
    monkeypatch.setattr(device, "holds_activations", True, raising=False)
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (0, 0))
    limit = streamed.model_size() * 0.8
    monkeypatch.setattr(device, "free_bytes", lambda: int(limit) - device.used_bytes)
    assert torch.equal(sample(streamed), expected)
    plan = streamed.stream.session.plan
    assert not plan.is_resident
    limit -= 0.02 * streamed.model_size()
    assert torch.equal(sample(streamed), expected)
    assert streamed.stream.session.plan is plan
    limit -= 0.2 * streamed.model_size()
    assert torch.equal(sample(streamed), expected)
    assert streamed.stream.session.plan.device_bytes < plan.device_bytes


def test_a_smaller_budget_of_ones_own_is_obeyed_at_once(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    expected = sample(model)
    large, small = stream(model, 0.9), stream(model, 0.1)
    assert torch.equal(sample(large), expected)
    more = large.loaded_size()
    assert torch.equal(sample(small), expected)
    assert small.loaded_size() < more
    assert small.stream.session.plan.device_bytes <= small.streaming_report()["budget_bytes"]


def test_weights_that_do_not_pack_are_tried_once_and_travel_raw(monkeypatch, load, sample):
    on_simulated_card(monkeypatch, is_packed=True)
    model = load("flux", size="tiny")
    for parameter in model.model.diffusion_model.parameters():
        if parameter.ndim == 2:  # exponents all over the range
            parameter.data.mul_(torch.exp(torch.randn(parameter.shape) * 8).to(parameter.dtype))
    streamed = stream(model, 0.0)
    sample(streamed)
    session = streamed.stream.session
    assert not session.is_packed and session.link_bytes == session.plan.streamed_bytes
    slabs = {name: tensor.data_ptr() for name, tensor in model.model.state_dict().items() if tensor.nbytes > 2**16}
    monkeypatch.setattr(streamed.stream.device.packer, "encode", lambda *_: pytest.fail("packed again"))
    sample(streamed)
    assert not session.is_packed
    after = model.model.state_dict()
    assert all(after[name].data_ptr() == address for name, address in slabs.items()), "read or locked again"


@pytest.mark.parametrize(("link_ms", "is_taken"), [(30.0, True), (55.0, False)])
def test_a_plan_as_fast_is_taken_where_it_leaves_much_of_the_link_alone(link_ms, is_taken):
    def plan(resident_bytes: int, link_ms: float) -> Plan:
        expected = Forecast(step_ms=100.0, compute_ms=100.0, restore_ms=0.0, link_ms=link_ms)
        return Plan((Form.STREAMED,), 0, resident_bytes, 2 * GIB, 2 * GIB, MIB, 0, expected)

    present, lighter = plan(MIB, 60.0), plan(GIB, link_ms)
    session = SimpleNamespace(
        plan=present,
        total_bytes=4 * GIB,
        propose=lambda *_, **__: lighter,
        expect=lambda plan: plan.expected,
    )
    settings = StreamingSettings(Mode.AUTO)
    stream = SimpleNamespace(
        session=session,
        settings=(settings, Packing.AUTO),
        is_in_place=True,
        ways=[Way(0)],
        fitting_bytes=None,
        patch_bytes=0,
        device=SimpleNamespace(free_bytes=lambda: 2 * GIB, holds_activations=True),
    )
    chosen = choose_plan(stream, settings, 2 * GIB, 0, Packing.AUTO, ())
    assert chosen is (lighter if is_taken else present)
