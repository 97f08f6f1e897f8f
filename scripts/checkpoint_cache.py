"""Keeps written checkpoints between runs, until the code that writes them changes.

In: which file is wanted. Out: its path, written on the first request. Before one is written, files of other versions of
the writing code are deleted, and as many of this one, the longest unused first, as lie above `KEPT_BYTES`: disks of
continuous integration are small. What another process asked for just now stays, since it may be about to open it. A
file that is asked for again is written again, with the same bytes.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from . import checkpoints
from .checkpoints import Family, Size
from .hosts import CACHE

WRITING_CODE = ("checkpoints.py", "random_file.py", "layouts/*.py")
WORKFLOW_FILES = {
    "diffusion_model": "diffusion_models/z_image_turbo_bf16.safetensors",
    "text_encoder": "text_encoders/qwen_3_4b.safetensors",
    "vae": "vae/ae.safetensors",
}
"""Where the example workflow's files lie under a models folder: the names of the published Z-Image files."""
KEPT_BYTES = 4 << 30
"""What files may take beside the one being written: more than any one workflow's narrow files."""
IN_USE_S = 180
"""For how long after a process asked for a file it may open it."""
ASKED = ".asked"
"""The end of the name of an empty file that says which process asked for a file, and by its time when."""
FULL = "-full"
"""In the names of files of full size: made for one measurement, larger than all this, and the person's to delete."""


def diffusion_model(
    family: Family,
    *,
    size: Size = "narrow",
    device: str = "cpu",
    layers: int | None = None,
    double: int | None = None,
    single: int | None = None,
) -> Path:
    """The diffusion model file of `family`, with a depth of its own where `layers`, `double` or `single` are given."""
    depth = {kind: count for kind, count in (("layers", layers), ("double", double), ("single", single)) if count}
    return cached(
        "-".join([family, size, *(f"{kind}{count}" for kind, count in depth.items())]),
        lambda path: checkpoints.write_diffusion_model(
            family, path, size=size, layers=layers, double=double, single=single, device=device
        ),
    )


def workflow_models(*, size: Size = "narrow", device: str = "cpu") -> dict[str, Path]:
    """The example workflow's files by their place under a models folder, with random weights."""
    return {
        WORKFLOW_FILES["diffusion_model"]: diffusion_model("zimage", size=size, device=device),
        WORKFLOW_FILES["text_encoder"]: text_encoder("zimage", size=size, device=device),
        WORKFLOW_FILES["vae"]: vae("zimage", device=device),
    }


def text_encoder(
    family: Family, *, size: Size = "narrow", dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Path:
    """The text encoder file of `family`, its weights in `dtype`: for Z-Image, when narrow, CLIP-L."""
    return cached(
        f"{family}-text-encoder-{size}-{str(dtype).removeprefix('torch.')}",
        lambda path: checkpoints.write_text_encoder(family, path, size=size, dtype=dtype, device=device),
    )


def vae(family: Family, *, device: str = "cpu") -> Path:
    """The image autoencoder file of `family`."""
    return cached(f"{family}-vae", lambda path: checkpoints.write_vae(family, path, device=device))


def cached(name: str, write: Callable[[Path], Path]) -> Path:
    """The file called `name`, written by `write` on the first request; what `write` depends on must be in the name."""
    folder = CACHE / "checkpoints" / _code_version()
    path = folder / f"{name}.safetensors"
    _forget_requests(folder)
    if path.is_file():
        os.utime(path)
    else:
        _delete_other_versions(folder)
        _delete_longest_unused(folder)
        write(path)
    path.with_name(f"{path.name}.{os.getpid()}{ASKED}").touch()
    return path


def _code_version() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in WRITING_CODE:
        for file in sorted(here.glob(pattern)):
            # Text, not bytes: a checkout on Windows may end its lines differently.
            digest.update(file.read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def _delete_other_versions(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def _delete_longest_unused(folder: Path) -> None:
    found = []
    for path in folder.glob("*.safetensors"):
        # Another process may delete it while they are looked through.
        with contextlib.suppress(FileNotFoundError):
            if FULL not in path.name:
                found.append((path.stat(), path))
    found.sort(key=lambda file: file[0].st_mtime, reverse=True)
    kept_bytes = 0
    for status, path in found:
        kept_bytes += status.st_size
        if kept_bytes > KEPT_BYTES and not _is_wanted_by_others(path):
            # Windows refuses while a server has it open; another process may have been faster.
            with contextlib.suppress(PermissionError, FileNotFoundError):
                path.unlink()


def _is_wanted_by_others(path: Path) -> bool:
    """Whether another process asked for the file just now; older requests are forgotten by then."""
    return any(_process_of(asked) != os.getpid() for asked in path.parent.glob(f"{path.name}.*{ASKED}"))


def _forget_requests(folder: Path) -> None:
    """Delete what processes that have ended asked with, and what was asked too long ago."""
    for asked in folder.glob(f"*{ASKED}"):
        # Another process may have been faster, or just be at it.
        with contextlib.suppress(PermissionError, FileNotFoundError):
            if time.time() - asked.stat().st_mtime > IN_USE_S or not psutil.pid_exists(_process_of(asked)):
                asked.unlink()


def _process_of(asked: Path) -> int:
    return int(asked.name.removesuffix(ASKED).rpartition(".")[2])
