"""A LoRA is not lost where memory runs out while it is applied, which ComfyUI logs and goes on after."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from layerstream.streaming.host.settings import Patching
from layerstream.streaming.host.swallowed import raising_swallowed

from loras import apply, make_lora, on_low_memory
from streamed import on_simulated_card, stream


@pytest.fixture
def run_out(monkeypatch):
    """A function that has the next product of a LoRA's matrices run out of memory."""
    multiply, left = torch.mm, [0]

    def multiply_or_fail(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)")
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", multiply_or_fail)
    return lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("patching", [Patching.BAKED, Patching.RUN_TIME])
def test_a_lora_is_applied_after_memory_ran_out_in_it(monkeypatch, load, sample, run_out, caplog, patching, is_packed):
    on_simulated_card(monkeypatch, seed=5, is_packed=is_packed)
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    plain = sample(model)
    patched = apply(model, lora, 0.8)
    expected = sample(patched if patching is Patching.BAKED else on_low_memory(patched))
    streamed = stream(model, 0.3)
    streamed.settings = replace(streamed.settings, patching=patching)
    run_out(3)
    found = sample(apply(streamed, lora, 0.8))
    assert "ERROR lora" in caplog.text, "nothing ran out"
    assert torch.equal(found, expected) and not torch.equal(found, plain)


def test_only_running_out_of_memory_is_raised_and_only_in_its_scope():
    def log(error: Exception) -> None:
        try:
            raise error
        except Exception as caught:
            logging.error("ERROR %s", caught)

    with raising_swallowed():
        log(ValueError("shapes differ"))
    with pytest.raises(torch.OutOfMemoryError, match="first"), raising_swallowed():
        log(torch.OutOfMemoryError("the first"))
        log(torch.OutOfMemoryError("the second"))
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"), raising_swallowed():
        log(RuntimeError("CUDA error: out of memory"))
    log(torch.OutOfMemoryError("nobody listens"))
    with pytest.raises(KeyError), raising_swallowed():
        log(torch.OutOfMemoryError("what is raised itself comes first"))
        raise KeyError
