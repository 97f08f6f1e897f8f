"""The benchmark of stages runs on a simulated card, and its table tells what it found."""

import json
import os
import subprocess
import sys

from bench.child import ROOT
from bench.stages import COLUMNS, format_table


def test_it_runs_tiny_and_the_image_is_equal():
    options = "--device cpu --free-gib 6 --cases cond_only --resolution 64 --steps 1 --prompts 1"
    done = subprocess.run(
        [sys.executable, "-m", "bench.stages", *options.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    reference, governed = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (reference["name"], governed["name"]) == ("resident", "cond_only")
    assert reference["result"] == governed["result"] == "equal"
    assert reference["moves"] == {"model": None, "clip": None, "vae": None}
    assert governed["moves"]["clip"]["departures"] == 1 and governed["moves"]["clip"]["returns"] == 0
    assert set(governed["stages_s"]) == {"text", "sampling", "decode"}


def test_the_table_has_a_cell_for_each_column_whatever_failed():
    table = format_table([{"name": "auto", "free_gib": 6.0, "result": "out of memory"}])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in table.splitlines())
    assert "out of memory" in table
