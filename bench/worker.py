"""One contender in its own process: opens the host, samples, and prints what it took as one line of JSON.

In: the contender's name, a spec file, and a path for the final latent. Out: JSON on the last line of standard output,
the latent as safetensors. It measures nothing of the card beyond its own allocator: the holder sees the whole card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path

from bench.contenders import CONTENDERS
from bench.hosting import start_host
from bench.spec import GIB, WARMUP_STEPS, StepSpec


def latent_sha256(latent) -> str:
    """SHA-256 of the tensor's bits."""
    import torch

    return hashlib.sha256(latent.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def run(name: str, spec: StepSpec, latent_path: Path) -> dict:
    """Sample with contender `name`, write its latent to `latent_path`, and return its row of the result."""
    contender = CONTENDERS[name]
    host_version = start_host(spec.host_path, device=spec.device, dynamic=contender.dynamic(spec))
    import psutil
    import torch
    from safetensors.torch import save_file

    from bench.sampling import sample_runs

    ram_available_gib = psutil.virtual_memory().available / GIB
    # The host executes every node, loaders too, under inference mode.
    with torch.inference_mode():
        prepared = contender.prepare(spec)
        sampled = sample_runs(prepared.model, spec)
        residency = prepared.residency(sampled.calls_per_step)
    latent = sampled.latent.clone()
    save_file({"latent": latent}, latent_path)

    timed_s = sampled.steps_s[WARMUP_STEPS - 1 :]
    on_cuda = spec.device == "cuda"
    return {
        "name": name,
        "step_s_median": statistics.median(timed_s),
        "step_s_min": min(timed_s),
        "step_s_max": max(timed_s),
        "first_step_s": sampled.first_step_s,
        "next_first_step_s": sampled.next_first_step_s,
        "steps_s": sampled.steps_s,
        "calls_per_step": sampled.calls_per_step,
        "resident_gib": residency.resident_bytes / GIB,
        "streamed_gib_per_step": residency.streamed_bytes_per_step / GIB,
        "moved_gib_per_step": residency.moved_bytes_per_step / GIB,
        "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB if on_cuda else None,
        "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB if on_cuda else None,
        "ram_available_gib": ram_available_gib,
        "patcher": type(prepared.model).__name__,
        "dtype": str(prepared.model.model.get_dtype()).removeprefix("torch."),
        "comfyui": host_version,
        "latent_sha256": latent_sha256(latent),
        "latent_is_finite": bool(torch.isfinite(latent).all()),
        "report": residency.details,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=tuple(CONTENDERS))
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--latent", type=Path, required=True)
    arguments = parser.parse_args()
    row = run(arguments.contender, StepSpec.read(arguments.spec), arguments.latent)
    print(json.dumps(row, default=str), flush=True)


if __name__ == "__main__":
    main()
