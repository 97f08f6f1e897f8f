"""Kernels are launched without Triton's own launcher where that can be done, and with it where not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from layerstream.streaming.engine.triton_launch import Launcher


class Variant:
    """A compiled kernel that notes how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, can_run: bool, launches: list[tuple[Any, ...]]) -> None:
        self.can_run, self.launches = can_run, launches

    def run(self, *arguments: Any) -> None:
        if not self.can_run:
            raise TypeError("other arguments")
        self.launches.append(("run", *arguments))


class Kernel:
    """A kernel of Triton: its first launch gives the compiled variant."""

    def __init__(self, can_run: bool = True) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.variant = Variant(can_run, self.launches)

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
    current = OneStream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    return current


def prepared(kernel: Kernel, memory: torch.Tensor) -> Any:
    return Launcher(kernel, num_warps=2).prepared(3, (memory, 5), ("key",))


def test_after_the_first_launch_neither_tensors_nor_streams_are_asked_anything(stream):
    kernel, memory = Kernel(), torch.zeros(4)
    launch = prepared(kernel, memory)
    launch(stream), launch(stream)
    compiled, direct = kernel.launches
    assert compiled == ("kernel", (3,), memory, 5, {"num_warps": 2})
    assert direct == ("run", 3, 1, 1, 7, "function", "metadata", None, None, None, memory.data_ptr(), 5)


def test_what_is_launched_once_goes_to_the_current_stream(stream):
    kernel, memory = Kernel(), torch.zeros(4)
    launcher = Launcher(kernel)
    launcher(3, (memory, 5), ("key",)), launcher(3, (memory, 6), ("key",))
    assert [way for way, *_ in kernel.launches] == ["kernel", "run"]
    assert kernel.launches[1][1:] == (3, 1, 1, stream.cuda_stream, "function", "metadata", None, None, None, memory, 6)


def test_where_triton_wants_other_arguments_each_launch_is_its_own(stream):
    kernel = Kernel(can_run=False)
    launch = prepared(kernel, torch.zeros(4))
    launch(stream), launch(stream)
    assert [way for way, *_ in kernel.launches] == ["kernel", "kernel"]


def test_one_kernel_serves_many_places(stream):
    kernel = Kernel()
    launcher = Launcher(kernel)
    places = [torch.zeros(4), torch.zeros(4)]
    for launch in [launcher.prepared(1, (place,), ("key",)) for place in places]:
        launch(stream)
    assert [way for way, *_ in kernel.launches] == ["kernel", "run"]
    assert kernel.launches[1][-1] == places[1].data_ptr()
