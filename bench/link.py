"""What this machine can do: the card, its memory, and how fast its link carries page-locked memory to it.

Run alone, `python -m bench.link` prints one JSON line. Parents run it as a child, so that the CUDA context that it
needs is gone before memory is counted. It times copies only; no kernel runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics

from bench.spec import GIB

# Past 64 MB the rate no longer depends on the size; past the last-level cache it no longer depends on that either.
COPY_BYTES = 256 * 1000**2
WARMUP_COPIES = 3
TIMED_COPIES = 20


def measure_link_bytes_per_s() -> float:
    """Median host-to-device rate over buffers of `COPY_BYTES` that are registered as page-locked memory.

    Raises RuntimeError when the memory cannot be page-locked.
    """
    import torch

    runtime = torch.cuda.cudart()
    # Random bytes: every page is real before it is registered, and no link may compress them.
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    status = int(runtime.cudaHostRegister(source.data_ptr(), COPY_BYTES, 0))
    if status != 0:
        raise RuntimeError(f"cannot page-lock {COPY_BYTES / 1e6:.0f} MB (CUDA error {status}): raise the memlock limit")
    try:
        durations_ms = []
        for index in range(WARMUP_COPIES + TIMED_COPIES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if index >= WARMUP_COPIES:
                durations_ms.append(begin.elapsed_time(end))
        if not torch.equal(target.cpu(), source):
            raise RuntimeError("the copied bytes differ from their source: the measured rate means nothing")
    finally:
        runtime.cudaHostUnregister(source.data_ptr())
    return COPY_BYTES / (statistics.median(durations_ms) / 1e3)


def describe_machine(device: str) -> dict:
    """Describe the machine as JSON values; on "cuda" with its card and link, on "cpu" with neither."""
    import psutil
    import torch

    machine = {
        "device": platform.processor() or platform.machine(),
        "device_gib": None,
        "link_gib_s": None,
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "cpu_cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["device"] = properties.name
        machine["device_gib"] = round(properties.total_memory / GIB, 2)
        machine["link_gib_s"] = measure_link_bytes_per_s() / GIB
    return machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    print(json.dumps(describe_machine(parser.parse_args().device)))


if __name__ == "__main__":
    main()
