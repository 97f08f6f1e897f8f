"""Runs the contenders one after the other, each in its own process and on the same free memory.

In: names and a spec. Out: a row a turn, and files and logs in a folder. A contender that fails gets a row with its
error, and the others still run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.child import ChildError, run_child
from bench.contenders import CONTENDERS, missing_reason
from bench.holder import CardHolder
from bench.results import Row, add_peak
from bench.rounds import compare_turns
from bench.spec import StepSpec


def run_contenders(
    names: Sequence[str], spec: StepSpec, folder: Path, timeout_s: float, *, before: Sequence[Row] = ()
) -> list[Row]:
    """Run `names` in order, files and logs in `folder`, at most `timeout_s` each, and give their rows after `before`.

    A name may come again: each turn has a row and files of its own. Rows of an earlier call come in `before`, their
    files in the same folder; all are compared with their references once the last has run.
    Raises ChildError when the card's memory cannot be held in a contender's first turn.
    """
    turns = list(before)
    # One holder serves neighbours that want the same free memory: filling a large card takes seconds.
    holder: CardHolder | None = None
    try:
        for name in names:
            reason = missing_reason(name, spec)
            if reason is not None:
                turns.append({"name": name, "ran": False, "error": reason})
                continue
            number = 1 + sum(turn["name"] == name for turn in turns)
            try:
                if spec.device == "cuda":
                    holder = _holder_for(name, spec, holder)
                row = _run_contender(name, spec, folder, number, holder, timeout_s)
            except ChildError as error:
                if number == 1:
                    raise
                row = {"name": name, "ran": True, "error": str(error)}  # what its earlier turns took is kept
            turns.append(row)
            took = "failed" if "error" in row else f"{row['step_s_median']:.4f} s/step"
            print(f"{name}, round {number}: {took}" if number > 1 else f"{name}: {took}", flush=True)
    finally:
        if holder is not None:
            holder.close()
    compare_turns(turns, _latent_paths(turns, folder))
    return turns


def _holder_for(name: str, spec: StepSpec, holder: CardHolder | None) -> CardHolder:
    """`holder` where it leaves contender `name` what it shall have, or a new one in its place."""
    free_gib = None if CONTENDERS[name].whole_card else spec.free_gib
    if holder is not None:
        if holder.free_gib == free_gib and not holder.is_closed:
            return holder
        holder.close()
    return CardHolder(free_gib)


def _run_contender(
    name: str, spec: StepSpec, folder: Path, number: int, holder: CardHolder | None, timeout_s: float
) -> Row:
    spec_path = folder / "spec.json"
    spec.write(spec_path)
    is_simulated = spec.device == "cpu" and not CONTENDERS[name].whole_card
    environment = {"LAYERSTREAM_SIMULATE_GIB": str(spec.free_gib)} if is_simulated else {}
    stem = _stem(name, number)
    try:
        before = None if holder is None else holder.wait_for_return()
        row = run_child(
            "worker",
            [name, "--spec", str(spec_path), "--latent", str(folder / f"{stem}.safetensors")],
            timeout_s=timeout_s,
            environment=environment,
            log_path=folder / f"{stem}.log",
        )
        row["ran"] = True
        if holder is None or before is None:
            row.update(free_before_gib=None, peak_gib=None, peak_margin_gib=None)
        else:
            lowest_free_bytes = holder.use().lowest_free_bytes
            add_peak(row, free_before_bytes=before.free_bytes, lowest_free_bytes=lowest_free_bytes)
        return row
    except ChildError as error:
        return {"name": name, "ran": True, "error": str(error)}


def _latent_paths(turns: Sequence[Row], folder: Path) -> list[Path]:
    """Where each turn's latent is."""
    numbers: Counter[str] = Counter()
    paths = []
    for turn in turns:
        numbers[turn["name"]] += 1
        paths.append(folder / f"{_stem(turn['name'], numbers[turn['name']])}.safetensors")
    return paths


def _stem(name: str, number: int) -> str:
    """The name of the files of a contender's turn; of its first one the contender's own."""
    return name if number == 1 else f"{name}-{number}"
