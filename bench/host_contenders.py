"""The ways to run a model inside ComfyUI: its own loaders and memory management, and LayerStream on top of them.

In: a spec. Out: `Measured`. `measure_*` start the host in this process first, `run_*` need it open. All sample under
inference mode, as the host's nodes do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.hosting import has_dynamic_vram, start_host
from bench.lora import apply_lora, load_lora
from bench.measured import Measured, Residency, timed_run
from bench.model_file import is_gguf
from bench.spec import StepSpec


class Prepared(NamedTuple):
    """A model to sample with, how to ask where its weights are, given the model calls per step, and how to get the same
    model with another strength of its LoRA, if it has one."""

    model: Any
    residency: Callable[[float], Residency]
    at_strength: Callable[[float], Any] | None = None


Opened = Callable[[], Prepared]
"""Makes the model; all that a host's start imports is imported by then."""


def measure_stock(spec: StepSpec) -> Measured:
    """The host alone with DynamicVRAM off: what it does depends on the memory that it finds."""
    _start(spec, is_dynamic=False)
    return run_stock(spec)


def measure_dynamic(spec: StepSpec) -> Measured:
    """The host alone with DynamicVRAM on."""
    _start(spec, is_dynamic=True)
    return run_stock(spec)


def measure_layerstream(spec: StepSpec, packing: str = "auto") -> Measured:
    """LayerStream's patcher around whatever patcher the host made; `packing` as its settings name it."""
    _start(spec, is_dynamic=spec.layerstream_dynamic and has_dynamic_vram(spec.host_path))
    return run_layerstream(spec, packing)


def run_stock(spec: StepSpec) -> Measured:
    """The open host alone."""
    return _run(spec, open_stock, is_traced=spec.trace)


def run_layerstream(spec: StepSpec, packing: str = "auto") -> Measured:
    """LayerStream in the open host."""
    return _run(spec, lambda spec: open_layerstream(spec, packing), is_traced=spec.trace)


def measure_in_host(spec: StepSpec, open_way: Callable[[StepSpec], Opened], *, is_dynamic: bool) -> Measured:
    """Start the host with DynamicVRAM on or off, and sample `spec.runs` times with the model that `open_way` makes."""
    _start(spec, is_dynamic=is_dynamic)
    return _run(spec, open_way)


def _start(spec: StepSpec, *, is_dynamic: bool) -> None:
    start_host(spec.host_path, device=spec.device, dynamic=is_dynamic)


def _run(spec: StepSpec, open_way: Callable[[StepSpec], Opened], *, is_traced: bool = False) -> Measured:
    import torch

    from bench.sampling import sample
    from scripts.hosts import read_host

    # The host executes every node, loaders too, under inference mode.
    with torch.inference_mode():
        prepare = open_way(spec)
        begin = time.perf_counter()
        prepared = prepare()
        prepare_s = time.perf_counter() - begin
        run = timed_run(lambda: sample(prepared.model, spec), spec.runs)
        residency = prepared.residency(run.calls_per_step)
        changed = sample(prepared.at_strength(0.5), spec) if prepared.at_strength else None
        if changed is not None:
            run = run._replace(latent=torch.cat([run.latent, changed.latent[None]]))
        trace = _trace(prepared.model, spec) if is_traced else None
    facts = {
        "patcher": type(prepared.model).__name__,
        "dtype": str(prepared.model.model.get_dtype()).removeprefix("torch."),
        "comfyui": read_host(Path(spec.host_path)).version,
        "changed_strength_first_step_s": changed.first_step_s if changed else None,
    }
    return Measured(run, prepare_s, residency, facts, trace)


def _trace(model: Any, spec: StepSpec) -> dict[str, Any]:
    from bench.sampling import sample
    from bench.trace import TRACED_STEPS, StepProfiler

    with StepProfiler(spec.device) as profiler:
        sample(model, dataclasses.replace(spec, steps=TRACED_STEPS), after_step=profiler.step)
    return profiler.timeline()


def open_stock(spec: StepSpec) -> Opened:
    load = _loader_of(spec)

    def prepare() -> Prepared:
        source = load(spec.checkpoint_path)
        model, at_strength = _patched(source, spec)
        return Prepared(model, lambda calls_per_step: stock_residency(model, calls_per_step), at_strength)

    return prepare


def _patched(model: Any, spec: StepSpec) -> tuple[Any, Callable[[float], Any] | None]:
    """The model with the LoRA that is asked for, and a function that gives it another strength; without one, itself."""
    if not spec.lora_rank:
        return model, None
    lora = load_lora(model, spec.lora_rank, Path(spec.checkpoint_path))
    return apply_lora(model, lora, 1.0), lambda strength: apply_lora(model, lora, strength)


def _loader_of(spec: StepSpec) -> Callable[[str], Any]:
    """What the loader node for this kind of file calls: the host's, or LayerStream's for GGUF."""
    if not is_gguf(spec.checkpoint_path):
        import comfy.sd

        return comfy.sd.load_diffusion_model
    from scripts.pack import load_pack

    load_pack()
    from layerstream.streaming.host.gguf_loading import load_diffusion_model

    return load_diffusion_model


def stock_residency(model: Any, calls_per_step: float) -> Residency:
    """What the host's own patcher says is loaded; the rest has to cross the link in every call, as it is."""
    resident_bytes = int(model.loaded_size())
    streamed_bytes = round(max(0, model.model_size() - resident_bytes) * calls_per_step)
    return Residency(resident_bytes, streamed_bytes, streamed_bytes, {})


def open_layerstream(spec: StepSpec, packing: str) -> Opened:
    from scripts.pack import load_pack

    load_pack()
    from layerstream.streaming.host.budget import Budget
    from layerstream.streaming.host.gguf_patches import streaming_patcher_for
    from layerstream.streaming.host.settings import Mode, Packing, Patching, StreamingSettings

    chosen: dict[str, Any] = {} if spec.prefetch_blocks is None else {"prefetch_blocks": spec.prefetch_blocks}
    settings = StreamingSettings(
        mode=Mode(spec.layerstream_mode),
        vram_gib=spec.vram_gib,
        packing=Packing(packing),
        patching=Patching(spec.patching),
        budget=Budget(ram_gib=spec.ram_gib) if spec.ram_gib else None,
        **chosen,
    )

    load = _loader_of(spec)

    def prepare() -> Prepared:
        source = load(spec.checkpoint_path)
        streamed = streaming_patcher_for(source).from_patcher(source, settings)
        model, at_strength = _patched(streamed, spec)
        return Prepared(model, lambda calls_per_step: _layerstream_residency(model, calls_per_step), at_strength)

    return prepare


def _layerstream_residency(model: Any, calls_per_step: float) -> Residency:
    report = model.streaming_report()
    # LayerStream counts by walk over the blocks: guidance in two calls walks twice a step.
    return Residency(
        report["resident_bytes"],
        round((report["streamed_bytes_per_step"] or 0) * calls_per_step),
        round((report["moved_bytes_per_step"] or 0) * calls_per_step),
        {key: value for key, value in report.items() if isinstance(value, bool | int | float | str)},
    )
