"""The model file that all contenders load: random weights of a family's real size, written once and kept in a cache.

`python -m bench.checkpoint --family zimage --cache DIR --host COMFYUI` writes it unless it is there, brings it into
the page cache so that no contender pays for the disk, and prints one JSON line. Parents run it as a child, because
drawing the weights on the card leaves a CUDA context behind.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bench.spec import FAMILIES

if TYPE_CHECKING:
    from scripts.checkpoints import Size

READ_BYTES = 64 * 1024**2
READERS = 4  # one reader leaves most of the memory's bandwidth unused
SEED = 0


def ensure_checkpoint(family: str, size: Size, cache: Path, device: str, host_path: Path) -> Path:
    """Return the path of `family`'s file in `cache`, written first when it is missing.

    Opens the host in this process where the file's tensors are known from its classes.
    """
    from scripts.hosts import open_host, read_host
    from scripts.published import ensure_file, needs_host

    if needs_host(family):
        # Its classes are built without values: the card is left to the drawing.
        open_host(read_host(host_path), "--cpu")
    return ensure_file(family, size, cache, seed=SEED, device=device)


def read_through(path: Path) -> int:
    """Read the file once from end to end and return its bytes."""
    total_bytes = path.stat().st_size
    share_bytes = -(-total_bytes // READERS)
    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(lambda reader: _read(path, reader * share_bytes, share_bytes), range(READERS)))


def _read(path: Path, start: int, count: int) -> int:
    """Read at most `count` bytes from `start` on and return how many there were."""
    buffer, done = memoryview(bytearray(READ_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while got := file.readinto(buffer[: min(READ_BYTES, count - done)]):
            done += got
    return done


def last_axis(path: str, name: str) -> int:
    """Length of the last axis of the tensor called `name`, with any prefix, in a safetensors file.

    Raises KeyError when the file has no such tensor: it is another family's.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        for key in names:
            if key == name or key.endswith("." + name):
                return file.get_slice(key).get_shape()[-1]
    raise KeyError(f"{path} has no tensor `{name}`: it belongs to another family")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True)
    parser.add_argument("--size", choices=("full", "narrow"), default="full")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--host", type=Path, required=True, help="the ComfyUI tree whose classes say what is in a file")
    parser.add_argument("--file", type=Path, help="use this model file and write none")
    asked = parser.parse_args()
    path = asked.file or ensure_checkpoint(asked.family, asked.size, asked.cache, asked.device, asked.host)
    print(json.dumps({"path": str(path.resolve()), "bytes": read_through(path)}))


if __name__ == "__main__":
    main()
