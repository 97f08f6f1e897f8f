"""Runs Triton kernels in a process of their own: Triton decides when its module is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_apart(source: str, *, interprets: bool) -> subprocess.CompletedProcess[str]:
    """Run `source` in a process whose kernels are interpreted or not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interprets else "0"}
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
