"""A GGUF file under the ComfyUI-GGUF pack's own loader and the host's own offloading, as most people run one.

In: a spec of a GGUF file, and the pack's folder in an environment variable, since it is nobody's dependency. Out:
`Measured`. The pack is imported as the host imports it, into this process alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from bench.host_contenders import Opened, Prepared, measure_in_host, stock_residency
from bench.measured import Measured
from bench.spec import StepSpec

PACK_VARIABLE = "LAYERSTREAM_GGUF_PACK"


def missing_pack() -> str | None:
    """Say why the pack cannot run, or None when it can."""
    folder = os.environ.get(PACK_VARIABLE)
    if not folder:
        return f"set {PACK_VARIABLE} to the folder of the ComfyUI-GGUF pack"
    if not (Path(folder) / "nodes.py").is_file():
        return f"{PACK_VARIABLE} is {folder}, which has no nodes.py: set it to the folder of the ComfyUI-GGUF pack"
    return None


def measure_gguf_pack(spec: StepSpec) -> Measured:
    """The pack's loader node, DynamicVRAM off: what is not loaded is what the host's patcher leaves in RAM."""
    return measure_in_host(spec, _open_pack, is_dynamic=False)


def _open_pack(spec: StepSpec) -> Opened:
    import folder_paths

    path = Path(spec.checkpoint_path)
    folder_paths.add_model_folder_path("diffusion_models", str(path.parent), is_default=True)
    loader = _import_pack(Path(os.environ[PACK_VARIABLE])).NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()

    def prepare() -> Prepared:
        (model,) = loader.load_unet(path.name)
        return Prepared(model, lambda calls_per_step: stock_residency(model, calls_per_step))

    return prepare


def _import_pack(folder: Path) -> Any:
    name = "bench_gguf_pack"
    specification = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert specification is not None and specification.loader is not None
    package = importlib.util.module_from_spec(specification)
    sys.modules[name] = package
    specification.loader.exec_module(package)
    return package
