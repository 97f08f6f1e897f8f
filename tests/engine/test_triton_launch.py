"""Kernels are launched without Triton's own launcher where that can be done, with it where not, and done without where
Triton makes none.
"""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

import pytest
import torch

from apart import run_apart

pytest.importorskip("triton")

from layerstream.streaming.engine import triton_launch
from layerstream.streaming.engine.triton_launch import Launcher, can_launch


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


class Compiling:
    """A kernel that is compiled when it is launched; `error` is what comes of it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any) -> None:
            if self.error is not None:
                raise self.error

        return launch


ERRORS = [None, subprocess.CalledProcessError(1, "tcc.exe"), RuntimeError("no compiler\nfound"), OSError("no DLL")]


@pytest.mark.parametrize("error", ERRORS, ids=["compiles", "refuses", "finds no compiler", "is not whole"])
def test_where_triton_compiles_nothing_weights_travel_raw_and_the_log_says_why(monkeypatch, caplog, error):
    monkeypatch.setattr(triton_launch, "probe_kernel", Compiling(error))
    triton_launch.can_launch.cache_clear()
    assert [can_launch() for _ in range(2)] == [error is None] * 2
    triton_launch.can_launch.cache_clear()
    said = [record.getMessage() for record in caplog.records if "makes no kernel here" in record.getMessage()]
    assert len(said) == (error is not None)
    assert all(said[0].endswith(f"{type(error).__name__}: {str(error).splitlines()[0]}") for _ in said)


def test_a_full_card_says_nothing_of_triton(monkeypatch):
    monkeypatch.setattr(triton_launch, "probe_kernel", Compiling(RuntimeError("Triton Error [CUDA]: out of memory")))
    triton_launch.can_launch.cache_clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        can_launch()
    monkeypatch.setattr(triton_launch, "probe_kernel", Compiling(None))
    assert can_launch()
    triton_launch.can_launch.cache_clear()


PREAMBLE = """
from scripts.pack import load_pack
load_pack()
from layerstream.streaming.engine.triton_launch import can_launch, probe_kernel
"""

COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(fn=probe_kernel, signature={"number": "i32"}, constexprs={})
triton.compile(source, target=GPUTarget("cuda", 80, 32))
print("done")
"""


def test_the_kernel_that_is_tried_compiles_for_a_card():
    finished = run_apart(PREAMBLE + COMPILATION, interprets=False)
    assert finished.stdout.strip().endswith("done"), finished.stderr[-2000:]


def test_the_kernel_that_is_tried_is_launched():
    finished = run_apart(PREAMBLE + "print(can_launch())", interprets=not torch.cuda.is_available())
    assert finished.stdout.strip().endswith("True"), finished.stderr[-2000:]
