"""Whether cases can run here: the host knows the models, the disk has room for their files, RAM for their weights.

In: the options and the families. Out: nothing, or a ValueError that says what is short, before hours are spent.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import find_host_path, model_size
from bench.spec import GIB

WEIGHTS_IN_RAM = 2
"""Copies of the weights: the file in the page cache, and a contender that keeps all of them in RAM of its own."""
DISK_SLACK_BYTES = GIB


def check_room(arguments: argparse.Namespace, families: Sequence[str], *, are_deleted: bool = False) -> None:
    """Raise ValueError unless each of `families` can be written and run; `are_deleted`: one file at a time is kept.

    Narrow files are taken to fit.
    """
    from scripts.hosts import read_host
    from scripts.published import NEWER, PUBLISHED, file_prefix, is_known_to

    host = read_host(find_host_path(arguments.host))
    size = model_size(arguments)
    missing = []
    for family in dict.fromkeys(families):
        if not is_known_to(host, family):
            raise ValueError(f"{family} is not in ComfyUI {host.version}: name {NEWER} or later with --host")
        if size == "full":
            _check_ram(family, PUBLISHED[family].bytes)
        if not list(arguments.cache.glob(f"{file_prefix(family, size)}*.safetensors")):
            missing.append(family)
    if size == "full" and missing:
        sizes = [PUBLISHED[family].bytes for family in missing]
        _check_disk(missing, max(sizes) if are_deleted else sum(sizes), arguments.cache)


def _check_ram(family: str, weight_bytes: int) -> None:
    import psutil

    available_bytes, needed_bytes = psutil.virtual_memory().available, WEIGHTS_IN_RAM * weight_bytes
    if available_bytes < needed_bytes:
        raise ValueError(
            f"{family} has {weight_bytes / GIB:.1f} GiB of weights, which need {needed_bytes / GIB:.1f} GiB of RAM as "
            f"file and as model, and {available_bytes / GIB:.1f} GiB are available: leave it out or use another machine"
        )


def _check_disk(families: Sequence[str], file_bytes: int, cache: Path) -> None:
    existing = next(folder for folder in (cache, *cache.resolve().parents) if folder.is_dir())
    free_bytes, needed_bytes = shutil.disk_usage(existing).free, file_bytes + DISK_SLACK_BYTES
    if free_bytes < needed_bytes:
        raise ValueError(
            f"the files of {', '.join(families)} need {needed_bytes / GIB:.1f} GiB of disk and {existing} has "
            f"{free_bytes / GIB:.1f} GiB free: name another folder with --cache, fewer families, or in bench.matrix "
            "--delete-checkpoints"
        )
