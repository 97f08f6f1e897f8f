"""Kernels are launched without Triton's own launcher where that can be done, and with it where not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from layerstream.streaming.engine.triton_launch import Launcher


class Variant:
    """A compiled kernel that notes how it was launched; `takes` are the ways it knows."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, takes: set[str], launches: list[tuple[Any, ...]]) -> None:
        self.takes, self.launches = takes, launches

    def run(self, *arguments: Any) -> None:
        if "run" not in self.takes:
            raise TypeError("other arguments")
        self.launches.append(("run", *arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any) -> None:
            if "variant" not in self.takes:
                raise TypeError("other arguments")
            self.launches.append(("variant", grid, *arguments))

        return launch


class Kernel:
    """A kernel of Triton: its first launch gives the compiled variant."""

    def __init__(self, *takes: str) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.variant = Variant(set(takes), self.launches)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Variant:
            self.launches.append(("kernel", grid, *arguments, options))
            return self.variant

        return launch


class OneStream:
    cuda_stream = 7


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> OneStream:
    """A stream that needs no card to be the current one."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return OneStream()


def prepared(kernel: Kernel, memory: torch.Tensor) -> Any:
    return Launcher(kernel, num_warps=2).prepared(3, (memory, 5), ("key",))


def test_after_the_first_launch_neither_tensors_nor_streams_are_asked_anything(stream):
    kernel, memory = Kernel("run", "variant"), torch.zeros(4)
    launch = prepared(kernel, memory)
    launch(stream), launch(stream)
    compiled, direct = kernel.launches
    assert compiled == ("kernel", (3,), memory, 5, {"num_warps": 2})
    assert direct == ("run", 3, 1, 1, 7, "function", "metadata", None, None, None, memory.data_ptr(), 5)


def test_where_triton_wants_other_arguments_the_variant_is_launched_as_it_offers(stream):
    kernel = Kernel("variant")
    launch = prepared(kernel, torch.zeros(4))
    launch(stream), launch(stream), launch(stream)
    assert [way for way, *_ in kernel.launches] == ["kernel", "variant", "variant"]


def test_where_it_wants_others_there_too_each_launch_is_tritons_own(stream):
    kernel = Kernel()
    launch = prepared(kernel, torch.zeros(4))
    launch(stream), launch(stream)
    assert [way for way, *_ in kernel.launches] == ["kernel", "kernel"]


def test_one_kernel_serves_many_places(stream):
    kernel = Kernel("run")
    launcher = Launcher(kernel)
    places = [torch.zeros(4), torch.zeros(4)]
    for launch in [launcher.prepared(1, (place,), ("key",)) for place in places]:
        launch(stream)
    assert [way for way, *_ in kernel.launches] == ["kernel", "run"]
    assert kernel.launches[1][-1] == places[1].data_ptr()
