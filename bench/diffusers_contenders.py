"""The ways to run a model with other libraries than ComfyUI: diffusers with everything on the card, diffusers' group
offload, and mmgp, all on diffusers' own denoisers.

In: a spec. Out: `Measured`. What is timed is the denoiser's forward and one step along its prediction. Its arithmetic
is not ComfyUI's, so times and bits compare with diffusers' own resident run alone.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.denoisers import DENOISERS, Denoiser, random_latent, random_model, random_text, weights
from bench.measured import Measured, Residency, SamplingRun, timed_run
from bench.spec import GIB, MIB, StepSpec

if TYPE_CHECKING:
    import torch

MMGP_RESERVE_GIB = 1.75
"""What mmgp's budget leaves of the free memory, for the CUDA context, the activations and the allocator's slack."""

Offload = Callable[[Any, StepSpec], dict[str, Any]]
"""Arranges how a model gets to the card and gives what was chosen."""


def measure_resident(spec: StepSpec) -> Measured:
    """Everything on the card."""
    return _measure(spec, spec.device, lambda model, spec: {})


def measure_group_offload(spec: StepSpec) -> Measured:
    """diffusers' group offload block by block, with a stream of its own for the copies, as its guide has it:
    https://huggingface.co/docs/diffusers/optimization/memory, "Group offloading"."""
    return _measure(spec, "cpu", _offload_groups)


def measure_mmgp(spec: StepSpec) -> Measured:
    """mmgp's profile for much RAM and little device memory, unquantised, its budget set to what is free."""
    return _measure(spec, "cpu", _offload_mmgp)


def _offload_groups(model: Any, spec: StepSpec) -> dict[str, Any]:
    import torch

    has_streams = spec.device == "cuda"
    chosen: dict[str, Any] = {
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "non_blocking": True,
        "use_stream": has_streams,
        "record_stream": has_streams,
    }
    model.enable_group_offload(onload_device=torch.device(spec.device), offload_device=torch.device("cpu"), **chosen)
    return chosen


def _offload_mmgp(model: Any, spec: StepSpec) -> dict[str, Any]:
    from mmgp import offload, profile_type

    assert spec.free_gib is not None
    budget_mib = int((spec.free_gib - MMGP_RESERVE_GIB) * GIB / MIB)
    # It looks for the denoiser under this name, whatever its kind.
    offload.profile(
        {"transformer": model},
        profile_type.HighRAM_LowVRAM,
        quantizeTransformer=False,
        budgets={"transformer": budget_mib},
    )
    return {"profile": "HighRAM_LowVRAM", "budget_mib": budget_mib}


def _measure(spec: StepSpec, home: str, offload: Offload) -> Measured:
    import torch

    from scripts.checkpoints import DTYPES

    denoiser = DENOISERS[spec.family]
    # The processor computes half types slowly or not at all, and ComfyUI takes float32 there too.
    dtype = DTYPES[spec.family] if spec.device == "cuda" else torch.float32  # type: ignore[index]
    with torch.no_grad():
        begin = time.perf_counter()
        model = random_model(denoiser, spec, dtype, home)
        chosen = offload(model, spec)
        prepare_s = time.perf_counter() - begin
        run = timed_run(lambda: _sample(denoiser, model, spec, dtype), spec.runs)
    resident_bytes = sum(weight.nbytes for weight in weights(model) if weight.device.type == spec.device)
    streamed_bytes = sum(weight.nbytes for weight in weights(model)) - resident_bytes
    facts = {
        "patcher": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "diffusers": importlib.metadata.version("diffusers"),
    }
    return Measured(run, prepare_s, Residency(resident_bytes, streamed_bytes, streamed_bytes, chosen), facts)


def _sample(denoiser: Denoiser, model: Any, spec: StepSpec, dtype: torch.dtype) -> SamplingRun:
    """`spec.steps` Euler steps from noise level 1 to 0 along the predictions."""
    import torch

    from bench.sampling import StepClock

    text = random_text(denoiser, model, spec, dtype)
    latent = random_latent(denoiser, spec)
    clock = StepClock(spec.device, spec.synchronize)
    clock.mark()
    for step in range(spec.steps):
        noise = 1 - step / spec.steps
        batch = torch.cat([latent, latent]) if spec.cfg > 1 else latent
        prediction = denoiser.predict(model, batch.to(dtype), noise, text, spec).float()
        if spec.cfg > 1:
            positive, negative = prediction.chunk(2)
            prediction = negative + spec.cfg * (positive - negative)
        latent = latent - prediction / spec.steps
        clock.mark()
    first_step_s, *steps_s = clock.durations_s()
    return SamplingRun(latent.cpu(), first_step_s, steps_s, 1.0)
