"""Models for which RAM has no room are read from their file in every pass, with the bits of the resident run."""

from __future__ import annotations

import random
from dataclasses import replace

import comfy.model_management
import psutil
import pytest
import torch
from layerstream.streaming.engine import staging
from layerstream.streaming.engine.plan import GIB, TINY_BYTES, Packing
from layerstream.streaming.engine.store import HostStore
from layerstream.streaming.host.budget import Budget, host_memory
from layerstream.streaming.host.gguf_loading import load_diffusion_model
from layerstream.streaming.host.report_text import report_text
from layerstream.streaming.host.settings import Patching

from gguf_models import detect_narrow, load_resident, narrow_weights, write_gguf
from loras import apply, make_lora, on_low_memory
from scripts.division import narrow_units
from scripts.tiny_models import build_tiny_model, sample_tiny
from streamed import give_ram, on_simulated_card, stream

NAME, ARCHITECTURE = "flux", "flux"


@pytest.fixture(autouse=True)
def one_buffer(monkeypatch):
    """Several would hold much of models as small as these."""
    monkeypatch.setattr(staging, "BUFFERS", 1)


@pytest.fixture
def gguf_file(monkeypatch, tmp_path):
    """A model of a GGUF file, and the latent that its weights give when dequantised by the reference."""
    on_simulated_card(monkeypatch, seed=3)
    detect_narrow(monkeypatch, NAME)
    path = tmp_path / "model.gguf"
    weights = write_gguf(path, narrow_weights(NAME), ARCHITECTURE)
    with narrow_units(), torch.inference_mode():
        yield load_diffusion_model(path, dtype=torch.float32), sample_tiny(load_resident(weights), NAME)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("kept", [0.0, 0.4])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_ram_has_no_room_for_stays_in_the_file(monkeypatch, gguf_file, share, kept):
    model, expected = gguf_file
    give_ram(monkeypatch, int(share * (1 - kept) * model.model_size()))
    before_bytes = host_memory().total_bytes
    streamed = stream(model, kept)
    for _ in range(2):
        assert torch.equal(sample_tiny(streamed, NAME), expected)
        report, session = streamed.streaming_report(), streamed.stream.session
        in_file_bytes = report["in_file_bytes_per_step"]
        assert in_file_bytes >= (1 - share) * report["streamed_bytes_per_step"]
        assert in_file_bytes < report["streamed_bytes_per_step"] or not share
        assert session.host_bytes <= share * report["streamed_bytes_per_step"]
        assert report["unplaced"] == report["broken_passes"] == 0
    streamed.detach()
    assert host_memory().total_bytes - before_bytes == session.host_bytes, "buffers are left"


def test_a_ceiling_of_the_budget_counts_as_ram(gguf_file):
    model, expected = gguf_file
    budget = Budget(ram_gib=(0.5 * model.model_size() + host_memory().total_bytes) / GIB)
    streamed = stream(model, 0.0)
    streamed.settings = replace(streamed.settings, budget=budget)
    assert torch.equal(sample_tiny(streamed, NAME), expected)
    assert streamed.streaming_report()["in_file_bytes_per_step"] > 0
    assert host_memory().total_bytes <= budget.ram_gib * GIB


def test_with_room_it_is_read_once(monkeypatch, gguf_file):
    model, expected = gguf_file
    give_ram(monkeypatch, 2 * model.model_size())
    streamed = stream(model, 0.0)
    for _ in range(2):
        assert torch.equal(sample_tiny(streamed, NAME), expected)
        assert streamed.streaming_report()["in_file_bytes_per_step"] == 0


def test_ram_that_comes_and_goes_changes_where_weights_are_and_no_bit(monkeypatch, gguf_file):
    model, expected = gguf_file
    streamed, held = stream(model, 0.0), []
    for share in (1.5, 0.0, 0.5, 1.5):
        give_ram(monkeypatch, int(share * model.model_size()) - (held[-1] if held else 0))
        assert torch.equal(sample_tiny(streamed, NAME), expected)
        held.append(streamed.stream.session.host_bytes)
    assert held[0] == held[3] > held[2] > held[1] == 0


def test_ram_that_wobbles_has_little_of_it_read_again(monkeypatch, gguf_file):
    model, expected = gguf_file
    streamed, built, chance = stream(model, 0.0), [], random.Random(0)
    build = HostStore.build
    monkeypatch.setattr(HostStore, "build", lambda *args: (built.append(args[1]), build(*args))[1])
    full_bytes = model.model_size() // 2
    give_ram(monkeypatch, full_bytes)
    sample_tiny(streamed, NAME)
    at_first = len(built)
    for _ in range(10):
        wobble_bytes = int(chance.uniform(-0.01, 0.01) * full_bytes)
        give_ram(monkeypatch, full_bytes + wobble_bytes - streamed.stream.session.host_bytes)
        assert torch.equal(sample_tiny(streamed, NAME), expected)
        assert streamed.stream.session.in_file_bytes > 0
    assert at_first > 4 and len(built) <= at_first + 2


def test_the_report_and_the_log_say_so(monkeypatch, gguf_file, caplog):
    from layerstream.streaming.host.advice import advice, sentence

    caplog.set_level("INFO", logger="layerstream")
    model, _ = gguf_file
    give_ram(monkeypatch, 0)
    streamed = stream(model, 0.0)
    sample_tiny(streamed, NAME)
    report = streamed.streaming_report()
    assert "of it from its file" in caplog.text
    assert "are read from its file in every pass" in sentence(advice([report]))
    host = dict.fromkeys(("ram_total_bytes", "ram_free_bytes", "slab_bytes", "page_locked_bytes"), 0)
    state = {"sessions": [report], "advice": ("nothing", {}), "now": {"card": None, "host": host}}
    assert "read from its file" in report_text(state)


def test_loras_of_gguf_weights_are_applied_all_the_same(monkeypatch, gguf_file):
    model, _ = gguf_file
    lora = make_lora(model, seed=1)
    expected = sample_tiny(on_low_memory(apply(model, lora, 0.8)), NAME)
    give_ram(monkeypatch, 0)
    assert torch.equal(sample_tiny(apply(stream(model, 0.0), lora, 0.8), NAME), expected)


class TestSafetensors:
    """Of the newer ComfyUI, which maps them."""

    @pytest.fixture
    def streamed(self, monkeypatch, mapped_model):
        on_simulated_card(monkeypatch, seed=5)
        return stream(mapped_model, 0.0)

    def test_they_stay_in_their_file_too(self, monkeypatch, streamed, mapped_model, sample):
        expected = sample(mapped_model)
        give_ram(monkeypatch, mapped_model.model_size() // 2)
        for _ in range(2):
            assert torch.equal(sample(streamed), expected)
            assert 0 < streamed.stream.session.in_file_bytes < streamed.stream.session.link_bytes

    def test_packed_ones_have_room_for_more(self, monkeypatch, mapped_model, sample):
        on_simulated_card(monkeypatch, seed=5, is_packed=True)
        expected = sample(mapped_model)
        streamed, in_file = stream(mapped_model, 0.0), []
        give_ram(monkeypatch, mapped_model.model_size() // 2)
        for packing in (Packing.NEVER, Packing.AUTO):
            streamed.settings = replace(streamed.settings, packing=packing)
            assert torch.equal(sample(streamed), expected)
            in_file.append(streamed.stream.session.in_file_bytes)
        assert 0 < in_file[1] < in_file[0]

    def test_ram_that_wobbles_packs_nothing_anew(self, monkeypatch, mapped_model, sample):
        on_simulated_card(monkeypatch, seed=5, is_packed=True)
        expected, size_bytes = sample(mapped_model), mapped_model.model_size()
        streamed = stream(mapped_model, 0.0)
        device, packed = streamed.stream.device, []
        monkeypatch.setattr(device, "has_clock", True)  # with one, nothing is packed without a reason
        encode = device.packer.encode
        monkeypatch.setattr(device.packer, "encode", lambda *args: (packed.append(1), encode(*args))[1])
        for share, is_packed in ((1.3, False), (0.95, True), (1.0, True), (1.1, True), (0.9, True), (1.3, False)):
            packed.clear()
            held_bytes = streamed.stream.session.host_bytes if streamed.stream.is_open else 0
            give_ram(monkeypatch, int(share * size_bytes) - held_bytes)
            assert torch.equal(sample(streamed), expected)
            assert streamed.stream.session.is_packed == is_packed
            assert bool(packed) == (share == 0.95)

    def test_loras_are_baked_where_there_is_room_and_else_at_run_time(
        self, monkeypatch, streamed, mapped_model, sample
    ):
        lora = make_lora(mapped_model, seed=1)
        ways = {}
        for way in (Patching.BAKED, Patching.RUN_TIME):
            streamed.settings = replace(streamed.settings, patching=way)
            ways[way] = sample(apply(streamed, lora, 0.8))
        assert not torch.equal(ways[Patching.BAKED], ways[Patching.RUN_TIME])
        streamed.settings = replace(streamed.settings, patching=Patching.AUTO)
        for room, way in ((2.0, Patching.BAKED), (0.2, Patching.RUN_TIME)):
            give_ram(monkeypatch, int(room * mapped_model.model_size()) - streamed.stream.session.host_bytes)
            assert torch.equal(sample(apply(streamed, lora, 0.8)), ways[way])
            assert (streamed.stream.session.in_file_bytes > 0) == (way is Patching.RUN_TIME)

    def test_loras_are_baked_though_what_stays_on_the_card_is_not_mapped(
        self, monkeypatch, streamed, mapped_model, sample
    ):
        lora = make_lora(mapped_model, seed=1)
        baked = sample(apply(mapped_model, lora, 0.8))
        tiny = [weight for weight in mapped_model.model.diffusion_model.parameters() if weight.nbytes < TINY_BYTES]
        for weight in tiny:
            weight.data = weight.data.clone()
        real = psutil.virtual_memory()
        # There is less free than what is not mapped would have to leave.
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=16 * GIB))
        give_ram(monkeypatch, 2 * mapped_model.model_size())
        assert torch.equal(sample(apply(streamed, lora, 0.8)), baked)
        assert tiny and streamed.stream.session.changed_bytes > 0

    def test_scheduled_loras_have_slabs(self, monkeypatch, streamed, mapped_model):
        import comfy.hooks

        from plugged import sample as sample_plugged
        from test_plugins_weights import scheduled

        lora = make_lora(mapped_model, seed=3)
        change = scheduled(comfy.hooks.create_hook_lora(lora, 1.0, 1.0))
        expected = sample_plugged(build_tiny_model("zimage"), "zimage", change, steps=4)
        give_ram(monkeypatch, 0)
        assert torch.equal(sample_plugged(streamed, "zimage", change, steps=4), expected)
