"""Pairs of prompts in one process: what is made of them, what is refused, and that all runs with equal bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.paired import Pair, Prompt, parse_arguments, summarise
from scripts.pack import ROOT
from test_families import found_hosts


def pair(resident_s: float, layerstream_s: float, bits: str = "same") -> Pair:
    return {"resident": Prompt(resident_s, 10.0, 0.0, "same"), "layerstream": Prompt(layerstream_s, 12.0, None, bits)}


def test_ratios_are_of_neighbours_so_that_a_slow_minute_of_both_counts_for_nothing() -> None:
    found = summarise([pair(1.0, 1.1), pair(2.0, 2.2), pair(1.0, 1.1), pair(3.0, 3.3), pair(1.0, 2.0)])
    assert found["ratio_median"] == pytest.approx(1.1)
    assert (found["ratio_low_quarter"], found["ratio_high_quarter"]) == pytest.approx((1.1, 1.1))
    assert (found["resident_step_s_median"], found["layerstream_step_s_median"]) == (1.0, 2.0)


def test_one_pair_is_its_own_median_and_quarters() -> None:
    found = summarise([pair(2.0, 3.0)])
    assert {found[f"ratio_{part}"] for part in ("low_quarter", "median", "high_quarter")} == {1.5}


def test_other_bits_in_one_pair_are_told() -> None:
    assert summarise([pair(1.0, 1.0), pair(1.0, 1.0)])["bit_equal"] is True
    assert summarise([pair(1.0, 1.0), pair(1.0, 1.0, "other")])["bit_equal"] is False


@pytest.mark.parametrize(("given", "said"), [(["--pairs", "0", "--vram-gb", "1"], "at least one"), ([], "--vram-gb")])
def test_no_pairs_and_no_limit_are_refused(monkeypatch, capsys, given: list[str], said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.paired", "--family", "zimage", *given])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not found_hosts(), reason="no ComfyUI found")
def test_both_ways_sample_in_turn_in_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.paired", "--family", "wan21-14b", "--vram-gb", "0.04", "--pairs", "2"]
    command += ["--device", "cpu", "--steps", "3", "--runs", "1", "--resolution", "64x64x5"]
    command += ["--cache", str(tmp_path / "files"), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["paired"]["bit_equal"] is True
    assert [list(each) for each in result["pairs"]] == [["layerstream", "resident"], ["resident", "layerstream"]]
    assert json.loads(done.stdout.splitlines()[-1])["ratio_median"] == result["paired"]["ratio_median"] > 0
