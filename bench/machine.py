"""What a benchmark needs of its machine before contenders run: a description with the link's rate, and the model file.

Each is found by a child process, so that the CUDA context that it takes is gone before memory is counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from bench.arguments import find_host_path, model_size
from bench.child import run_child

WRITE_TIMEOUT_S = 900.0
LINK_TIMEOUT_S = 180.0


class Checkpoint(NamedTuple):
    path: str
    bytes: int


def find_machine(arguments: argparse.Namespace) -> dict:
    """The values of `bench.link`, with `--link-gib-s` in place of the measured rate where it is given."""
    machine = run_child("link", ["--device", arguments.device], timeout_s=LINK_TIMEOUT_S)
    if arguments.link_gib_s is not None:
        machine["link_gib_s"] = arguments.link_gib_s
    return machine


def find_checkpoint(arguments: argparse.Namespace, family: str, file: Path | None = None) -> Checkpoint:
    """The family's model file, which is written first when it is not there, or `file`; it is in the page cache then."""
    options = ["--family", family, "--size", model_size(arguments), "--cache", str(arguments.cache)]
    options += ["--device", arguments.device, "--host", str(find_host_path(arguments.host))]
    if file is not None:
        options += ["--file", str(file)]
    found = run_child("checkpoint", options, timeout_s=WRITE_TIMEOUT_S)
    return Checkpoint(found["path"], found["bytes"])
