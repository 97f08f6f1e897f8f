"""A step's timeline says what the streams did, and why the compute stream stood still."""

from typing import Any

import pytest
import torch

from bench.timeline import format_timeline, summarise
from bench.trace import TRACED_STEPS, StepProfiler

COMPUTE, COPY = 7, 13
STEP = "ProfilerStep#1"


def call(name: str, at_us: float, length_us: float, correlation: int) -> dict[str, Any]:
    return {
        "cat": "cuda_runtime",
        "name": name,
        "ts": at_us,
        "dur": length_us,
        "args": {"correlation": correlation},
    }


def device(
    kind: str, name: str, stream: int, at_us: float, length_us: float, correlation: int, **details: int
) -> dict[str, Any]:
    return {
        "cat": kind,
        "name": name,
        "ts": at_us,
        "dur": length_us,
        "args": {"stream": stream, "correlation": correlation, **details},
    }


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """A step of 1000 us: two products with 200 us between them in which weights arrive, and one asked for too late."""
    return [
        {"cat": "user_annotation", "name": STEP, "ts": 1000.0, "dur": 1000.0},
        {"cat": "user_annotation", "name": "ProfilerStep#2", "ts": 2000.0, "dur": 1000.0},
        call("cudaLaunchKernel", 1000.0, 5.0, 1),
        call("cudaLaunchKernel", 1010.0, 5.0, 2),
        call("cudaMemcpyAsync", 1001.0, 5.0, 3),
        call("cudaLaunchKernel", 1800.0, 5.0, 4),
        call("cudaStreamSynchronize", 1810.0, 180.0, 5),
        device("kernel", "gemm_a", COMPUTE, 1000.0, 300.0, 1),
        device("gpu_memcpy", "Memcpy HtoD", COPY, 1100.0, 400.0, 3, bytes=20_000_000),
        device("kernel", "decode_kernel", COMPUTE, 1500.0, 100.0, 2),
        device("kernel", "gemm_b", COMPUTE, 1900.0, 80.0, 4),
        device("kernel", "gemm_of_the_next_step", COMPUTE, 2100.0, 500.0, 6),
    ]


def test_streams_are_busy_for_the_union_of_their_work_inside_the_step(events: list[dict[str, Any]]) -> None:
    # A second copy inside the first one, and one that reaches over the end of the step.
    events.append(device("gpu_memcpy", "Memcpy HtoD", COPY, 1150.0, 100.0, 7, bytes=1))
    events.append(device("gpu_memcpy", "Memcpy HtoD", COPY, 1950.0, 500.0, 8, bytes=1))
    summary = summarise(events, STEP)
    rows = {row["stream"]: row for row in summary["streams"]}
    assert summary["step_ms"] == 1.0
    assert summary["compute_stream"] == COMPUTE
    assert rows[COMPUTE]["busy_ms"] == pytest.approx(0.48)
    assert rows[COMPUTE]["compute_ms"] == pytest.approx(0.38)
    assert rows[COMPUTE]["restore_ms"] == pytest.approx(0.1)
    assert rows[COPY]["copy_ms"] == pytest.approx(0.45)
    assert rows[COPY]["copies"] == 3


def test_a_gap_is_the_hosts_until_the_next_kernel_is_asked_for(events: list[dict[str, Any]]) -> None:
    summary = summarise(events, STEP)
    late, waited = summary["longest_gaps"]
    assert (late["before"], late["after"]) == ("decode_kernel", "gemm_b")
    assert late["length_ms"] == pytest.approx(0.3)
    assert (late["host_ms"], late["wait_ms"]) == pytest.approx((0.2, 0.1))
    assert late["copying_ms"] == 0
    assert (waited["before"], waited["after"]) == ("gemm_a", "decode_kernel")
    assert waited["length_ms"] == pytest.approx(0.2)
    assert (waited["host_ms"], waited["wait_ms"]) == pytest.approx((0.0, 0.2))
    assert waited["copying_ms"] == pytest.approx(0.2)
    assert summary["gaps_by_cause_ms"] == pytest.approx({"host": 0.2, "wait": 0.3})
    assert summary["tail_ms"] == pytest.approx(0.02)


def test_calls_of_the_host_are_those_of_the_step(events: list[dict[str, Any]]) -> None:
    events.append(call("cudaMalloc", 2500.0, 900.0, 9))
    host = {row["call"]: row for row in summarise(events, STEP)["host"]}
    assert host["cudaStreamSynchronize"]["ms"] == pytest.approx(0.18)
    assert host["cudaLaunchKernel"]["count"] == 3
    assert "cudaMalloc" not in host


def test_the_text_names_every_stream_and_gap(events: list[dict[str, Any]]) -> None:
    text = format_timeline(summarise(events, STEP))
    for part in ("1.00 ms", "decode_kernel | gemm_b", "gemm_a | decode_kernel", "50.0 GB/s", "cudaStreamSynchronize"):
        assert part in text


def test_a_trace_without_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match=STEP):
        summarise([], STEP)


def test_the_profiler_records_a_whole_step() -> None:
    with StepProfiler("cpu") as profiler:
        for _ in range(TRACED_STEPS):
            torch.ones(8).sum()
            profiler.step()
    assert profiler.timeline()["step_ms"] > 0
