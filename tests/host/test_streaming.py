"""Streamed sampling through ComfyUI's own sampler gives the resident result, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from streamed import on_simulated_card, stream

FAMILIES = ("zimage", "flux")
RUNS = tuple(itertools.product((1, 2), (1.0, 4.0)))
"""Batch and guidance."""


@pytest.fixture(scope="module")
def resident() -> dict[tuple[str, int, float], torch.Tensor]:
    """What models on the card make, by family and run: worked out once for all ways to stream them."""
    return {}


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95], ids=["all streamed", "half", "nearly all resident"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_bits(monkeypatch, load, sample, resident, family, kept, prefetch):
    for seed, (batch, cfg) in enumerate(RUNS):
        model = load(family, size="tiny")
        if (family, batch, cfg) not in resident:
            resident[family, batch, cfg] = sample(model, batch=batch, cfg=cfg)
        expected = resident[family, batch, cfg]
        assert expected.isfinite().all()
        on_simulated_card(monkeypatch, seed, is_packed=seed % 2 == 1)
        streamed = stream(model, kept, prefetch)
        assert torch.equal(sample(streamed, batch=batch, cfg=cfg), expected)
        report = streamed.streaming_report()
        assert report["backend"] == "simulated" and report["family_listed"]
        session = streamed.stream.session
        least, most = (0.6, 0.8) if report["is_packed"] else (1, 1)
        streamed_bytes = report["streamed_bytes_per_step"]
        assert least * streamed_bytes <= session.link_bytes <= most * streamed_bytes
        assert (report["moved_bytes_per_step"] > 0) == (session.link_bytes > session.plan.ring_bytes)
        assert report["misses"] == report["departures"] == report["unplaced"] == report["broken_passes"] == 0
        assert report["passes"] == 2, "guidance must not walk the model twice"
        streamed.stream.session.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_bits_through_the_file_loader(monkeypatch, load, sample, family):
    model = load(family, size="narrow")
    expected = sample(model, steps=1)
    on_simulated_card(monkeypatch)
    streamed = stream(model, 0.5)
    assert torch.equal(sample(streamed, steps=1), expected)
    assert streamed.streaming_report()["streamed_bytes_per_step"] > 0
    assert torch.equal(sample(model, steps=1), expected)


def test_every_weight_matters_to_this_comparison(monkeypatch, load, sample):
    """The comparison above could not fail if a streamed block did not reach the result."""
    model = load("zimage", size="tiny")
    on_simulated_card(monkeypatch)
    streamed = stream(model, 0.0)
    expected = sample(streamed)
    for name, unit in streamed.stream.family.units:
        largest = max(unit.parameters(), key=torch.numel)
        kept = largest.data.clone()
        largest.data.mul_(1.5)
        assert not torch.equal(sample(streamed), expected), name
        largest.data.copy_(kept)
    assert torch.equal(sample(streamed), expected)


def test_a_model_that_fits_is_simply_resident(monkeypatch, load, sample):
    model = load("flux", size="tiny")
    expected = sample(model)
    on_simulated_card(monkeypatch)
    from layerstream.streaming.host.patcher import StreamingModelPatcher
    from layerstream.streaming.host.settings import StreamingSettings

    streamed = StreamingModelPatcher.from_patcher(model, StreamingSettings(min_free_mib=0))
    assert torch.equal(sample(streamed), expected)
    report = streamed.streaming_report()
    assert report["streamed_bytes_per_step"] == report["ring_bytes"] == report["host_bytes"] == 0
    assert streamed.loaded_size() >= report["resident_bytes"] > 0


def test_an_unlisted_family_is_discovered(monkeypatch, load, sample):
    from layerstream.streaming.host import families

    model = load("zimage", size="tiny")
    expected = sample(model)
    monkeypatch.setattr(families, "FAMILIES", {})
    on_simulated_card(monkeypatch)
    streamed = stream(model, 0.3)
    assert not streamed.stream.family.is_listed
    assert torch.equal(sample(streamed), expected)
    assert len(streamed.stream.family.units) == 10
    # the first pass taught the order, which is not the one the lists are written in
    misses = streamed.streaming_report()["misses"]
    assert torch.equal(sample(streamed), expected)
    assert streamed.streaming_report()["misses"] == misses


def test_a_listed_block_list_that_does_not_exist_is_an_error(monkeypatch, load):
    from layerstream.streaming.host import families

    monkeypatch.setitem(families.FAMILIES, "Flux", ("double_blocks", "singel_blocks"))
    on_simulated_card(monkeypatch)
    with pytest.raises(AttributeError, match="singel_blocks"):
        stream(load("flux", size="tiny"), 0.5)
