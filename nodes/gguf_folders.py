"""Where GGUF files are looked for: ComfyUI's own folders, under keys of this pack.

ComfyUI lists only files with its own extensions in its folders. Keys of our own leave those alone, and the ones that
other packs have made for GGUF files too.
"""

from __future__ import annotations

import importlib
from typing import Any

import folder_paths

GGUF_EXTENSIONS = {".gguf"}

# Our key -> ComfyUI's, whose list of folders it shares: what is added there later is found too.
DIFFUSION_MODELS = "layerstream_gguf_diffusion_models"
TEXT_ENCODERS = "layerstream_gguf_text_encoders"
FOLDERS = {DIFFUSION_MODELS: "diffusion_models", TEXT_ENCODERS: "text_encoders"}


def list_files(key: str, *more_keys: str) -> list[str]:
    """GGUF files of `key`, and the files that ComfyUI lists under `more_keys`."""
    _register(key)
    return [name for each in (key, *more_keys) for name in folder_paths.get_filename_list(each)]


def path_of(key: str, name: str, *more_keys: str) -> str:
    """The full path of a listed file. Raises FileNotFoundError."""
    _register(key)
    for each in (key, *more_keys):
        path = folder_paths.get_full_path(each, name)
        if path is not None:
            return path
    raise FileNotFoundError(f"{name} is not in ComfyUI's folders for {FOLDERS[key]}: refresh the page and choose again")


def loading() -> Any:
    """The module that loads GGUF files. Raises RuntimeError where the gguf package is missing."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise RuntimeError(
            "reading GGUF files needs the gguf package: run `pip install gguf` with ComfyUI's Python and start it again"
        ) from error
    return importlib.import_module("..streaming.host.gguf_loading", __package__)


def _register(key: str) -> None:
    folders, _ = folder_paths.folder_names_and_paths[FOLDERS[key]]
    folder_paths.folder_names_and_paths[key] = (folders, GGUF_EXTENSIONS)
