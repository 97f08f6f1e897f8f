"""The browser part's own arithmetic, in node's test runner; `tests/browser` has the whole of it in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.pack import ROOT

NODE = shutil.which("node")
SUITES = sorted((ROOT / "tests" / "web").glob("*.test.mjs"))


@pytest.mark.skipif(NODE is None, reason="node is not installed: apt install nodejs")
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.name)
def test_the_scripts_of_the_browser_part(suite: Path) -> None:
    assert NODE is not None
    process = subprocess.run([NODE, "--test", str(suite)], capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
