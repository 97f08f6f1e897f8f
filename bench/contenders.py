"""The ways to run a model that are compared, each one function from a spec to what it measured.

To add one: write its function and give it a line in `CONTENDERS`. The functions run in a worker process of their own,
which nothing was imported in.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from bench.denoisers import DENOISERS
from bench.diffusers_contenders import measure_group_offload, measure_mmgp, measure_resident
from bench.gguf_pack import measure_gguf_pack, missing_pack
from bench.host_contenders import measure_dynamic, measure_layerstream, measure_stock
from bench.hosting import has_dynamic_vram
from bench.measured import Measured
from bench.model_file import is_gguf
from bench.spec import StepSpec

HOST_REFERENCE = "resident"
DIFFUSERS_REFERENCE = "diffusers-resident"


class Contender(NamedTuple):
    """`whole_card`: it runs with all of the card's memory. `reference`: whose time and bits it is compared with.
    `packages`: what it needs beside the host."""

    measure: Callable[[StepSpec], Measured]
    whole_card: bool = False
    reference: str = HOST_REFERENCE
    packages: tuple[str, ...] = ()


CONTENDERS: dict[str, Contender] = {
    HOST_REFERENCE: Contender(measure_stock, whole_card=True),
    "dynamic": Contender(measure_dynamic),
    "lowvram": Contender(measure_stock),
    "layerstream": Contender(measure_layerstream),
    "layerstream-raw": Contender(functools.partial(measure_layerstream, packing="never")),
    "layerstream-packed": Contender(functools.partial(measure_layerstream, packing="always")),
    "gguf-pack": Contender(measure_gguf_pack),
    DIFFUSERS_REFERENCE: Contender(
        measure_resident, whole_card=True, reference=DIFFUSERS_REFERENCE, packages=("diffusers", "accelerate")
    ),
    "diffusers-group": Contender(
        measure_group_offload, reference=DIFFUSERS_REFERENCE, packages=("diffusers", "accelerate")
    ),
    "mmgp": Contender(measure_mmgp, reference=DIFFUSERS_REFERENCE, packages=("diffusers", "accelerate", "mmgp")),
}
STANDARD = (HOST_REFERENCE, "dynamic", "lowvram", "layerstream")
"""Those that run where none are named."""


def missing_reason(name: str, spec: StepSpec) -> str | None:
    """Say why contender `name` cannot run for this spec, or None when it can."""
    if name == "dynamic" and not has_dynamic_vram(spec.host_path):
        return "not in this host"
    if name == "dynamic" and is_gguf(spec.checkpoint_path):
        return "GGUF files load without it"
    if name in ("dynamic", "mmgp") and spec.device == "cpu":
        return "it needs a CUDA device"
    if CONTENDERS[name].reference == DIFFUSERS_REFERENCE and spec.family not in DENOISERS:
        return f"no denoiser of diffusers is described for {spec.family}"
    if name == "gguf-pack":
        return missing_pack() if is_gguf(spec.checkpoint_path) else "it loads GGUF files alone"
    absent = [package for package in CONTENDERS[name].packages if importlib.util.find_spec(package) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return None


def with_references(names: list[str]) -> list[str]:
    """`names` with each reference put first that they need; without it a time of another library says nothing.

    The host's own reference is left to the caller, who may want a time alone.
    """
    needed = {CONTENDERS[name].reference for name in names} - {HOST_REFERENCE, *names}
    return [*sorted(needed), *names]
