"""Starts a ComfyUI tree in this process as its own `main.py` would, without its server.

In: the path of a tree and whether DynamicVRAM shall be on. Out: an importable `comfy`.
Call `start_host` once, before torch or `comfy` is imported: the host chooses torch's allocator, and its memory
library has to be loaded before its modules bind that library's functions.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

DYNAMIC_VRAM_FLAG = "--disable-dynamic-vram"


def has_dynamic_vram(host_path: str) -> bool:
    """Tell whether this host knows DynamicVRAM (0.33 does, 0.3.75 does not), without importing it."""
    return DYNAMIC_VRAM_FLAG in (Path(host_path) / "comfy" / "cli_args.py").read_text(encoding="utf-8")


def start_host(host_path: str, *, device: str, dynamic: bool) -> str:
    """Open the host at `host_path` with DynamicVRAM on or off and return its version.

    On "cpu" DynamicVRAM is always off, as it is for a user. Mutates `sys.path` and the environment.
    Raises RuntimeError when DynamicVRAM is asked for and its library does not work here.
    """
    from scripts.hosts import open_host, read_host

    assert "torch" not in sys.modules, "torch's allocator is chosen when it is imported: start the host first"
    dynamic = dynamic and device == "cuda"
    # On a processor weights keep the width that they have in the file, as on a card.
    arguments = ["--cpu", "--bf16-unet"] if device == "cpu" else []
    if not dynamic and has_dynamic_vram(host_path):
        arguments.append(DYNAMIC_VRAM_FLAG)
    host = read_host(Path(host_path))
    sys.path.insert(0, str(host.path))
    _parse_arguments(arguments)
    if dynamic:
        _load_dynamic_vram()
    if device == "cuda":
        importlib.import_module("cuda_malloc")  # sets torch's allocator as the host's user has it
    open_host(host, *arguments)
    if dynamic:
        _enable_dynamic_vram()
    return host.version


def _parse_arguments(arguments: list[str]) -> None:
    """Let the host read `arguments` as its command line, which it does once, when that module is imported."""
    own_arguments = sys.argv
    sys.argv = ["main.py", *arguments]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = own_arguments


def _load_dynamic_vram() -> None:
    control = importlib.import_module("comfy_aimdo.control")
    if not control.init(nvml_pressure=True):
        raise RuntimeError(
            "comfy-aimdo, DynamicVRAM's library, did not load: install the version that the host requires"
        )


def _enable_dynamic_vram() -> None:
    """Turn DynamicVRAM on as the host's `main.py` does once its memory manager is imported."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
        raise RuntimeError("comfy-aimdo, DynamicVRAM's library, found no device that it can manage")
    comfy_aimdo.control.set_log_warning()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
