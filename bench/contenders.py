"""The ways to run a model that are compared, each one function from a spec to a model that is ready to sample.

To add one: write its function and give it a line in `CONTENDERS`. The functions run in a worker process, inside an
opened host and under inference mode, as the host's nodes do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.hosting import has_dynamic_vram
from bench.spec import StepSpec


class Residency(NamedTuple):
    """Where the weights are after sampling. Streamed bytes are weights that are not on the card; moved bytes are what
    crossed the link for them, fewer when they travel packed. Both are per step."""

    resident_bytes: int
    streamed_bytes_per_step: int
    moved_bytes_per_step: int
    details: dict[str, Any]


class Prepared(NamedTuple):
    """A model to sample with, and how to ask where its weights are, given the model calls per step."""

    model: Any
    residency: Callable[[float], Residency]


class Contender(NamedTuple):
    """`whole_card`: it runs with all of the card's memory. `dynamic`: it wants the host's DynamicVRAM, and needs it."""

    prepare: Callable[[StepSpec], Prepared]
    whole_card: bool = False
    dynamic: Callable[[StepSpec], bool] = lambda spec: False


def load_stock(spec: StepSpec):
    """Load the checkpoint as the host's loader node does."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(spec.checkpoint_path)


def stock_residency(model, calls_per_step: float) -> Residency:
    """What the host's own patcher says is loaded; the rest has to cross the link in every call, as it is."""
    resident_bytes = int(model.loaded_size())
    streamed_bytes = round(max(0, model.model_size() - resident_bytes) * calls_per_step)
    return Residency(resident_bytes, streamed_bytes, streamed_bytes, {})


def stock(spec: StepSpec) -> Prepared:
    """The host alone: what it does depends on the memory that it finds and on whether DynamicVRAM is on."""
    model = load_stock(spec)
    return Prepared(model, lambda calls_per_step: stock_residency(model, calls_per_step))


def layerstream(spec: StepSpec) -> Prepared:
    """LayerStream's patcher around whatever patcher the host made."""
    from scripts.pack import load_pack

    load_pack()
    from layerstream.streaming.host.patcher import StreamingModelPatcher, StreamingSettings

    chosen = {} if spec.prefetch_blocks is None else {"prefetch_blocks": spec.prefetch_blocks}
    settings = StreamingSettings(mode=spec.layerstream_mode, vram_gib=spec.vram_gib, **chosen)
    model = StreamingModelPatcher.from_patcher(load_stock(spec), settings)

    def residency(calls_per_step: float) -> Residency:
        report = model.streaming_report()
        # LayerStream counts by walk over the blocks: guidance in two calls walks twice a step.
        return Residency(
            report["resident_bytes"],
            round((report["streamed_bytes_per_step"] or 0) * calls_per_step),
            round((report["moved_bytes_per_step"] or 0) * calls_per_step),
            {key: value for key, value in report.items() if isinstance(value, bool | int | float | str)},
        )

    return Prepared(model, residency)


CONTENDERS: dict[str, Contender] = {
    "resident": Contender(stock, whole_card=True),
    "dynamic": Contender(stock, dynamic=lambda spec: True),
    "lowvram": Contender(stock),
    "layerstream": Contender(
        layerstream, dynamic=lambda spec: spec.layerstream_dynamic and has_dynamic_vram(spec.host_path)
    ),
}


def missing_reason(name: str, spec: StepSpec) -> str | None:
    """Say why contender `name` cannot run for this spec, or None when it can."""
    if name == "dynamic" and not has_dynamic_vram(spec.host_path):
        return "not in this host"
    if name == "dynamic" and spec.device == "cpu":
        return "the host's DynamicVRAM needs a CUDA device"
    return None
