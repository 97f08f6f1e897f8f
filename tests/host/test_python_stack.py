"""What a streaming model runs has all of Python's stack in one piece, so that no loop in it is slow by where it is."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from scripts.tiny_components import tiny_clip, tokens_for
from stack_loops import CALLS, most_faults
from streamed import on_simulated_card, stream
from test_text_encoders import run as stream_clip


class Watch:
    """The pages that loops inside a model take, wherever they are in it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.faults: list[int] = []
        deepest = max((name for name, _ in model.named_modules()), key=lambda name: name.count("."))
        self._hook = model.get_submodule(deepest).register_forward_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        self.faults.append(most_faults())

    def take(self) -> int:
        self._hook.remove()
        return max(self.faults)


@pytest.fixture(autouse=True)
def unload():
    yield
    comfy.model_management.unload_all_models()


def test_in_a_pass_of_a_sampled_model(monkeypatch, load, sample):
    model = load("zimage", size="tiny")
    on_simulated_card(monkeypatch)
    streamed = stream(model, 0.5)
    watch = Watch(model.model.diffusion_model)
    sample(streamed, steps=2)
    assert watch.take() < CALLS / 2


def test_in_a_pass_of_a_text_encoder(monkeypatch):
    on_simulated_card(monkeypatch)
    with torch.inference_mode():
        clip = tiny_clip("t5xxl")
        streamed = stream_clip(clip)
        watch = Watch(clip.cond_stage_model)
        streamed.encode_from_tokens(tokens_for("t5xxl", 0))
    assert watch.take() < CALLS / 2
