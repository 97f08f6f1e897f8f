"""Contenders that run several times in turn: which turn counts, and what of the others must not be lost."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import case, contest
from bench.arguments import add_rounds
from bench.machine import Checkpoint
from bench.results import lacks
from bench.spec import GIB, StepSpec
from bench.table import format_table
from scripts.measured import picture, table
from scripts.pack import ROOT
from turns import Turn, Workers

NAMES = ["resident", "layerstream"]
MACHINE = {"device": "card", "device_gib": 80, "ram_gib": 64, "torch": "2", "cuda": "13", "link_gib_s": None}


# -- which round counts ------------------------------------------------------------------------------------------------


def test_each_contenders_figures_are_those_of_the_round_with_the_fastest_processor(rows_of) -> None:
    rows = rows_of(
        resident=[Turn(2.0, 18.0), Turn(1.0, 10.0), Turn(0.9, 11.5)],
        layerstream=[Turn(1.2, 10.0), Turn(1.9, 17.0), Turn(1.1, 12.0)],
    )
    assert (rows["resident"]["step_s_median"], rows["resident"]["loop_ms"]) == (1.0, 10.0)
    assert (rows["layerstream"]["step_s_median"], rows["layerstream"]["loop_ms"]) == (1.2, 10.0)
    # Against the reference's own best processor, not against the round beside it.
    assert rows["layerstream"]["ratio_to_resident"] == 1.2
    assert [(each["step_s_median"], each["loop_ms"]) for each in rows["layerstream"]["rounds"]] == [
        (1.2, 10.0),
        (1.9, 17.0),
        (1.1, 12.0),
    ]


@pytest.mark.parametrize(
    ("steps_s", "median_s"), [((1.3, 0.9, 1.1), 1.1), ((1.3, 0.9), 0.9), ((1.3, 1.1, 0.9, 1.2), 1.1)]
)
def test_of_rounds_with_the_same_processor_the_median_counts(rows_of, steps_s, median_s) -> None:
    turns = [Turn(step_s, loop_ms) for step_s, loop_ms in zip(steps_s, (10.0, 10.9, 10.4, 10.1), strict=False)]
    rows = rows_of(layerstream=[*turns, Turn(0.5, 12.0)], resident=[Turn() for _ in range(len(turns) + 1)])
    assert rows["layerstream"]["step_s_median"] == median_s


def test_one_round_is_a_round(rows_of) -> None:
    rows = rows_of(resident=[Turn()], layerstream=[Turn(1.5, 11.0)])
    assert rows["layerstream"]["rounds"] == [{"step_s_median": 1.5, "loop_ms": 11.0, "bit_equal": True}]
    assert rows["layerstream"]["ratio_to_resident"] == 1.5


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1, 2])
def test_other_bits_in_one_round_are_the_rows_whichever_round_counts(rows_of, other: int) -> None:
    turns = [Turn(loop_ms=12.0), Turn(loop_ms=10.0), Turn(loop_ms=11.0)]
    turns[other].latent = 0.75
    rows = rows_of(resident=[Turn(), Turn(), Turn()], layerstream=turns)
    row = rows["layerstream"]
    assert (row["loop_ms"], row["bit_equal"], row["max_abs_difference"]) == (10.0, False, 0.25)
    assert [each["bit_equal"] for each in row["rounds"]] == [number != other for number in range(3)]
    assert rows["resident"]["bit_equal"] is True
    assert "layerstream: its output differs in 1 of 3 rounds by up to 0.25" in format_table(list(rows.values()))
    assert lacks({"contenders": list(rows.values())}) == ["layerstream has other bits than its reference"]


def test_the_largest_difference_of_all_rounds_is_told_and_nan_is_larger(rows_of) -> None:
    turns = [Turn(latent=0.75), Turn(latent=1.5), Turn(latent=0.5)]
    row = rows_of(resident=[Turn(), Turn(), Turn()], layerstream=turns)["layerstream"]
    assert row["max_abs_difference"] == 1.0
    turns = [Turn(latent=0.75), Turn(latent=float("nan"))]
    row = rows_of(resident=[Turn(), Turn()], layerstream=turns)["layerstream"]
    assert row["bit_equal"] is False and row["max_abs_difference"] != row["max_abs_difference"]


def test_a_reference_that_differs_from_itself_is_told(rows_of) -> None:
    rows = rows_of(resident=[Turn(), Turn(latent=0.75)], layerstream=[Turn(), Turn()])
    assert rows["resident"]["bit_equal"] is False
    assert rows["layerstream"]["bit_equal"] is True


def test_without_a_reference_rounds_that_differ_are_unequal_and_others_unknown(rows_of) -> None:
    rows = rows_of(layerstream=[Turn(), Turn(latent=0.75)], lowvram=[Turn(), Turn()])
    assert (rows["layerstream"]["bit_equal"], rows["layerstream"]["ratio_to_resident"]) == (False, None)
    assert (rows["lowvram"]["bit_equal"], rows["lowvram"]["ratio_to_resident"]) == (None, None)
    assert "layerstream: its output differs in 1 of 2 rounds by up to 0.25" in format_table(list(rows.values()))


# -- rounds that failed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [0, 1])
def test_a_round_that_failed_does_not_hide_one_that_ran_and_is_not_hidden(rows_of, failed: int) -> None:
    turns = [Turn(1.5, 12.0)]
    turns.insert(failed, Turn(error="a trace\nout of memory"))
    rows = rows_of(resident=[Turn(), Turn()], layerstream=turns)
    row = rows["layerstream"]
    assert "error" not in row and (row["step_s_median"], row["bit_equal"]) == (1.5, True)
    assert row["rounds"][failed] == {"step_s_median": None, "loop_ms": None, "error": "a trace\nout of memory"}
    assert "layerstream: failed in 1 of 2 rounds: out of memory" in format_table(list(rows.values()))


def test_a_contender_that_failed_in_all_rounds_is_failed(rows_of) -> None:
    rows = rows_of(resident=[Turn(), Turn()], layerstream=[Turn(error="first"), Turn(error="second")])
    assert (rows["layerstream"]["ran"], rows["layerstream"]["error"]) == (True, "first")
    assert [each["error"] for each in rows["layerstream"]["rounds"]] == ["first", "second"]
    assert "layerstream: first" in format_table(list(rows.values()))


def test_outputs_are_compared_with_a_reference_that_ran_in_another_round(rows_of) -> None:
    rows = rows_of(
        resident=[Turn(error="out of memory"), Turn(1.0, 13.0)],
        layerstream=[Turn(1.5, 10.0, latent=0.75), Turn(1.6, 11.0)],
    )
    row = rows["layerstream"]
    assert (row["step_s_median"], row["ratio_to_resident"], row["bit_equal"]) == (1.5, 1.5, False)


def test_a_contender_that_cannot_run_here_is_absent_once(rows_of) -> None:
    rows = rows_of(resident=[Turn(), Turn()], gguf_pack=[])
    assert (rows["gguf-pack"]["ran"], "rounds" in rows["gguf-pack"]) == (False, False)


# -- a case of several rounds ------------------------------------------------------------------------------------------


def measured(
    workers: Workers, spec: StepSpec, monkeypatch: pytest.MonkeyPatch, folder: Path, rounds: int, names: list[str]
) -> dict[str, Any]:
    monkeypatch.setattr(contest, "run_child", workers.run)
    arguments = argparse.Namespace(contenders=names, rounds=rounds, timeout_s=7.0, keep=None, results=folder)
    return case.measure_case(spec, arguments, MACHINE, Checkpoint("model.safetensors", 4 * GIB))


def test_all_contenders_run_in_order_as_often_as_asked_and_the_file_has_all_rounds(
    monkeypatch: pytest.MonkeyPatch, spec: StepSpec, tmp_path: Path
) -> None:
    workers = Workers(resident=[Turn(), Turn()], layerstream=[Turn(), Turn()])
    measured(workers, spec, monkeypatch, tmp_path / "results", 2, NAMES)
    assert workers.order == NAMES * 2
    assert workers.timeouts_s == [7.0] * 4
    (file,) = (tmp_path / "results").glob("*.json")
    written = json.loads(file.read_text())
    assert [(row["name"], len(row["rounds"])) for row in written["contenders"]] == [("resident", 2), ("layerstream", 2)]
    assert "1.000 s (1.00)" in table([written])


def test_half_of_a_model_is_what_the_first_round_shows_and_all_rounds_have_it(
    monkeypatch: pytest.MonkeyPatch, spec: StepSpec, tmp_path: Path
) -> None:
    half = dataclasses.replace(spec, free_gib=None, is_half=True)
    monkeypatch.setattr(case, "half_free_gib", lambda checkpoint, resident: 10 * resident["step_s_median"])
    workers = Workers(
        resident=[Turn(0.3), Turn(0.2)], lowvram=[Turn(), Turn()], layerstream=[Turn(), Turn(latent=0.75)]
    )
    names = ["resident", "lowvram", "layerstream"]
    result = measured(workers, half, monkeypatch, tmp_path / "results", 2, names)
    assert workers.order == names * 2
    assert workers.free_gib == [None, *[3.0] * 5]
    assert result["free_gib"] == 3.0
    assert [row["bit_equal"] for row in result["contenders"]] == [True, True, False]


def test_rounds_are_one_or_more() -> None:
    parser = argparse.ArgumentParser()
    add_rounds(parser)
    assert parser.parse_args([]).rounds == 1
    assert parser.parse_args(["--rounds", "3"]).rounds == 3
    for text in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rounds", text])


# -- older results -----------------------------------------------------------------------------------------------------


def test_results_from_before_there_were_rounds_are_read_as_ever() -> None:
    files = [path for path in (ROOT / "bench" / "results").rglob("*.json") if path.parent.name != "startup"]
    assert files
    for result in [json.loads(path.read_text(encoding="utf-8")) for path in files]:
        for row in result["contenders"]:
            for key in ("loop_ms", "rounds"):
                row.pop(key, None)
        assert table([result]).count("\n") == 2
        assert picture([result]).startswith("<svg")
        lacks(result)
        text = format_table([{"trace": None, **row} for row in result["contenders"]])
        assert "processor" not in text and "rounds" not in text
