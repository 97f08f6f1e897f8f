"""One contender in its own process: samples, and prints what it took as one line of JSON.

In: the contender's name, a spec file, and a path for the latents. Out: JSON on the last line of standard output, the
latents of all prompts as safetensors. It measures nothing of the card beyond its own allocator: the holder sees the
whole card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
from pathlib import Path

import psutil

from bench.contenders import CONTENDERS
from bench.spec import GIB, WARMUP_STEPS, StepSpec


def latent_sha256(latent) -> str:
    """SHA-256 of the tensor's bits."""
    import torch

    return hashlib.sha256(latent.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def run(name: str, spec: StepSpec, latent_path: Path) -> dict:
    """Sample with contender `name`, write its latents to `latent_path`, and return its row of the result."""
    ram_available_gib = psutil.virtual_memory().available / GIB
    measured = CONTENDERS[name].measure(spec)
    import torch
    from safetensors.torch import save_file

    run, residency = measured.run, measured.residency
    latent = run.latent.clone()
    save_file({"latent": latent}, latent_path)

    timed_s = run.steps_s[WARMUP_STEPS - 1 :]
    on_cuda = spec.device == "cuda"
    return {
        "name": name,
        "step_s_median": statistics.median(timed_s),
        "step_s_min": min(timed_s),
        "step_s_max": max(timed_s),
        "loop_ms": run.loop_ms,
        "prepare_s": measured.prepare_s,
        "first_step_s": run.first_step_s,
        "next_first_step_s": run.next_first_step_s,
        "steps_s": run.steps_s,
        "calls_per_step": run.calls_per_step,
        "resident_gib": residency.resident_bytes / GIB,
        "streamed_gib_per_step": residency.streamed_bytes_per_step / GIB,
        "moved_gib_per_step": residency.moved_bytes_per_step / GIB,
        "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB if on_cuda else None,
        "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB if on_cuda else None,
        "ram_available_gib": ram_available_gib,
        **measured.facts,
        "latent_sha256": latent_sha256(latent),
        "latent_is_finite": bool(torch.isfinite(latent).all()),
        "report": residency.details,
        "trace": measured.trace,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=tuple(CONTENDERS))
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--latent", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    row = run(arguments.contender, StepSpec.read(arguments.spec), arguments.latent)
    print(json.dumps(row, default=str), flush=True)


if __name__ == "__main__":
    main()
