"""The node: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from layerstream.nodes.layer_stream_model import LayerStreamModel
from layerstream.streaming.engine.plan import BudgetTooSmall
from layerstream.streaming.host.devices import SIMULATE_VARIABLE
from layerstream.streaming.host.patcher import StreamingModelPatcher

from streamed import on_simulated_card

DEFAULTS = {"mode": "auto", "prefetch_blocks": 0, "vram_gb": 0.0, "min_free_mb": 0}


def run(model, **inputs):
    return LayerStreamModel.execute(model, **{**DEFAULTS, **inputs}).args[0]


def test_the_schema_is_complete():
    schema = LayerStreamModel.define_schema()
    assert schema.node_id == "LayerStreamModel"
    widgets = ["mode", "prefetch_blocks", "vram_gb", "min_free_mb"]
    assert [item.id for item in schema.inputs] == ["model", *widgets, "budget"]
    assert all(item.tooltip for item in schema.inputs)
    assert {item.id for item in schema.inputs}.isdisjoint(item.id for item in schema.outputs)


def test_off_gives_the_very_model(monkeypatch, load):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    assert run(model, mode="off") is model


def test_a_second_node_replaces_the_settings_of_the_first(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    expected = sample(model)
    first = run(model, mode="always")
    second = run(first, mode="always", prefetch_blocks=3)
    assert first.settings.prefetch_blocks == 0 and second.settings.prefetch_blocks == 3
    assert torch.equal(sample(second), expected)
    assert second.streaming_report()["passes"] == 2, "chained nodes must not run a pass twice"


def test_comfyui_on_the_cpu_passes_the_model_through_and_says_so(monkeypatch, load, caplog):
    monkeypatch.delenv(SIMULATE_VARIABLE, raising=False)
    model = load("flux", size="tiny")
    with caplog.at_level(logging.WARNING, "layerstream"):
        assert run(model) is model
    assert "passes through unchanged" in caplog.text and "on the CPU" in caplog.text


def test_a_model_without_blocks_passes_through_and_says_so(monkeypatch, load, caplog):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    model.model.diffusion_model = torch.nn.Identity()
    with caplog.at_level(logging.WARNING, "layerstream"):
        assert run(model) is model
    assert "no list of blocks" in caplog.text


def test_a_budget_too_small_names_one_that_works(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    model = load("flux", size="tiny")
    expected = sample(model)
    with pytest.raises(BudgetTooSmall) as refused:
        sample(run(model, vram_gb=0.0001, prefetch_blocks=2))
    message = str(refused.value)
    assert "double_blocks.0" in message and "MiB" in message
    enough = float(re.search(r"raise the budget to ([\d.]+) GiB", message)[1])
    assert torch.equal(sample(run(model, vram_gb=enough, prefetch_blocks=2)), expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"prefetch_blocks": -1}, "between 0 and 8"), ({"min_free_mb": -1}, "0 or more"), ({"mode": "fast"}, "fast")],
)
def test_values_that_no_widget_gives_are_refused(load, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(load("flux", size="tiny"), **inputs)


def test_negative_vram_leaves_that_much_free(monkeypatch, load, sample):
    on_simulated_card(monkeypatch, size_gib=0.032)
    model = load("flux", size="tiny")
    streamed = run(model, vram_gb=-0.008)
    sample(streamed)
    budget = streamed.streaming_report()["budget_bytes"]
    assert abs(budget - 0.024 * 1024**3) < 1024
    assert streamed.stream.device.peak_bytes() <= budget


def test_one_line_says_what_was_achieved(monkeypatch, load, sample, caplog):
    on_simulated_card(monkeypatch)
    streamed = run(load("flux", size="tiny"), mode="always")
    with caplog.at_level(logging.INFO, "layerstream"):
        sample(streamed), sample(streamed)
    lines = [record.getMessage() for record in caplog.records if record.name == "layerstream"]
    assert len(lines) == 1, "said once, not at every run"
    for word in ("12 blocks", "resident", "streamed a step", "ring", "host", "simulated"):
        assert word in lines[0]


def test_an_encoder_of_another_kind_is_not_mistaken_for_a_model(monkeypatch, load):
    on_simulated_card(monkeypatch)
    streamed = run(load("flux", size="tiny"))
    assert isinstance(streamed, StreamingModelPatcher)
