"""Whatever a person does with a streamed model in whatever order, each sample has the bits of ComfyUI's own way.

Each seed is a walk of steps at random: nodes and LoRAs put on, clones made and dropped, samplers that take turns,
models sent away, runs that fail or are interrupted. A walk that fails says what it did.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import Patching

from loras import apply, make_lora, on_low_memory
from streamed import assert_same_weights, give_ram, on_simulated_card, stream, weights_of

SEEDS, STEPS = 4, 30

FAULTS = (RuntimeError, torch.OutOfMemoryError, InterruptProcessingException)
MOST_BRANCHES = 4
STRENGTHS = (0.8, -0.5)

Put = tuple[tuple[int, float], ...]
"""LoRAs by their seed, each with its strength, in the order in which they were put on."""


def put_on(model: Any, put: Put) -> Any:
    for seed, strength in put:
        model = apply(model, make_lora(model, seed), strength)
    return model


class HostWalk:
    """A model, the streamed patchers that a graph has made of it, and what each of them has put on."""

    def __init__(
        self, seed: int, model: Any, sample: Any, expected: Callable[[Put, Patching], torch.Tensor], monkeypatch: Any
    ) -> None:
        self.chance, self.done = random.Random(seed), list[str]()
        self.sample, self.expected, self.monkeypatch = sample, expected, monkeypatch
        self.branches: list[tuple[StreamingModelPatcher, Put]] = []
        on_simulated_card(monkeypatch, seed, is_packed=self.chance.random() < 0.3)
        self.model = model
        layers = model.model.diffusion_model.named_modules()
        self.layers = [layer for _, layer in layers if isinstance(layer, torch.nn.Linear)]
        self.originals = weights_of(self.model)
        for step in (self.stream, self.put_lora_on, self.stream, self.put_lora_on):
            step()
        self.device = self.branches[0][0].stream.device

    def go(self, steps: int) -> None:
        ways: dict[Callable[[], None], int] = {
            self.stream: 1,
            self.put_lora_on: 3,
            self.clone: 1,
            self.drop: 1,
            self.sample_streamed: 10,
            self.sample_resident: 1,
            self.fail_in_a_layer: 2,
            self.fail_while_patching: 2,
            self.give_up_a_share: 1,
            self.detach: 1,
            self.unload_all: 1,
            self.change_ram: 1,
        }
        for step in self.chance.choices(list(ways), list(ways.values()), k=steps):
            self.done.append(step.__name__)
            step()
        self.sample_streamed()

    def _branch(self) -> tuple[StreamingModelPatcher, Put]:
        number = self.chance.randrange(len(self.branches))
        self.done.append(str(number))
        return self.branches[number]

    def _add(self, patcher: StreamingModelPatcher, put: Put) -> None:
        self.done.append(f"{patcher.settings.patching.value} {put}")
        self.branches.append((patcher, put))
        del self.branches[:-MOST_BRANCHES]

    # -- steps -----------------------------------------------------------------------------------------------------

    def stream(self) -> None:
        """The node, alone or behind a LoRA."""
        put: Put = self.chance.choice(((), ((1, 0.8),)))
        kept, prefetch = self.chance.choice((0.0, 0.2, 0.5, 0.9)), self.chance.randint(1, 3)
        patcher = stream(put_on(self.model, put), kept, prefetch)
        patching = self.chance.choice((Patching.BAKED, Patching.RUN_TIME))
        patcher.settings = replace(patcher.settings, patching=patching)
        self._add(patcher, put)

    def put_lora_on(self) -> None:
        patcher, put = self._branch()
        if len(put) < 2:
            more: Put = ((self.chance.randint(1, 2), self.chance.choice(STRENGTHS)),)
            self._add(put_on(patcher, more), (*put, *more))

    def clone(self) -> None:
        patcher, put = self._branch()
        self._add(patcher.clone(), put)

    def drop(self) -> None:
        if len(self.branches) > 1:
            del self.branches[self.chance.randrange(len(self.branches))]
            gc.collect()

    def sample_streamed(self) -> None:
        patcher, put = self._branch()
        assert torch.equal(self.sample(patcher), self.expected(put, patcher.settings.patching))
        patcher.stream.session.check()

    def sample_resident(self) -> None:
        """Another branch of the graph, without the node."""
        put: Put = self.chance.choice(((), ((2, 0.8),)))
        assert torch.equal(self.sample(put_on(self.model, put)), self.expected(put, Patching.BAKED))

    def fail_in_a_layer(self) -> None:
        """As often as it takes until a run that is out of memory gives up, or less often."""
        (patcher, put), error, calls = self._branch(), self.chance.choice(FAULTS), itertools.count()
        layer, times = self.chance.choice(self.layers), self.chance.randint(1, 9)

        def fail(*_: Any) -> None:
            if next(calls) < times:
                raise error("in mid-layer")

        handle = layer.register_forward_hook(fail)
        self._sample_or_fail(patcher, put, error)
        handle.remove()

    def fail_while_patching(self) -> None:
        (patcher, put), error, calls = self._branch(), self.chance.choice(FAULTS), itertools.count()
        bake, fails_at = StreamingModelPatcher.patch_weight_to_device, self.chance.randint(0, 30)

        def bake_or_fail(*args: Any, **options: Any) -> Any:
            if next(calls) == fails_at:
                raise error("while patching")
            return bake(*args, **options)

        with self.monkeypatch.context() as patched:
            patched.setattr(StreamingModelPatcher, "patch_weight_to_device", bake_or_fail)
            self._sample_or_fail(patcher, put, error)

    def _sample_or_fail(self, patcher: StreamingModelPatcher, put: Put, error: type[Exception]) -> None:
        self.done.append(error.__name__)
        try:
            found = self.sample(patcher)
        except error:
            self.done.append("raised")
        else:
            assert torch.equal(found, self.expected(put, patcher.settings.patching))

    def give_up_a_share(self) -> None:
        patcher, _ = self._branch()
        patcher.partially_unload(patcher.offload_device, int(self.chance.random() * patcher.model_size()))

    def detach(self) -> None:
        self._branch()[0].detach()

    def unload_all(self) -> None:
        comfy.model_management.unload_all_models()

    def change_ram(self) -> None:
        """More or less of it is free; where it is too little, what can be read again stays in its file."""
        give_ram(self.monkeypatch, int(self.chance.choice((0.2, 0.6, 2.0)) * self.model.model_size()))

    # -- what holds ------------------------------------------------------------------------------------------------

    def end(self) -> None:
        self.branches.clear()
        gc.collect()
        comfy.model_management.unload_all_models()
        assert_same_weights(self.model, self.originals)
        del self.model
        gc.collect()
        assert self.device.used_bytes == self.device.locked_bytes == 0


@pytest.fixture
def model(request, load) -> Any:
    return request.getfixturevalue("mapped_model") if request.param == "mapped" else load("flux", size="tiny")


remembered: dict[tuple[str, Put, Patching], torch.Tensor] = {}
"""What ComfyUI gives for a family, with LoRAs in one of its ways; worked out once."""


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("family", "model"), [("flux", "loaded"), ("zimage", "mapped")], indirect=["model"])
def test_any_order_of_steps_gives_the_bits_of_the_host(monkeypatch, load, sample, family, model, seed):
    def expected(put: Put, patching: Patching) -> torch.Tensor:
        key = family, put, patching
        if key not in remembered:
            resident = put_on(load(family, size="tiny"), put)
            remembered[key] = sample(on_low_memory(resident) if patching is Patching.RUN_TIME else resident)
        return remembered[key]

    walk = HostWalk(seed, model, sample, expected, monkeypatch)
    del model
    try:
        walk.go(STEPS)
    finally:
        print(*walk.done, sep=", ")
    walk.end()
