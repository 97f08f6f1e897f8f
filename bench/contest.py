"""Runs the contenders one after the other, each in its own process and on the same free memory.

In: names and a spec. Out: one row each, and files and logs in a folder. A contender that fails gets a row with its
error, and the others still run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.child import ChildError, run_child
from bench.contenders import CONTENDERS, missing_reason
from bench.holder import CardHolder
from bench.results import Row, add_comparison, add_peak
from bench.spec import StepSpec


def run_contenders(
    names: Sequence[str], spec: StepSpec, folder: Path, timeout_s: float, *, before: Sequence[Row] = ()
) -> list[Row]:
    """Run `names` in order, files and logs in `folder`, at most `timeout_s` each, and give their rows after `before`.

    Put a reference before those that are compared with it: rows before it have nothing to be compared with. Rows of an
    earlier call come in `before`, their files in the same folder.
    """
    rows = list(before)
    # One holder serves neighbours that want the same free memory: filling a large card takes seconds.
    holder: CardHolder | None = None
    try:
        for name in names:
            reason = missing_reason(name, spec)
            if reason is not None:
                rows.append({"name": name, "ran": False, "error": reason})
                continue
            free_gib = None if CONTENDERS[name].whole_card else spec.free_gib
            if spec.device == "cuda" and (holder is None or holder.free_gib != free_gib):
                if holder is not None:
                    holder.close()
                holder = CardHolder(free_gib)
            row = _run_contender(name, spec, folder, holder, timeout_s)
            rows.append(row)
            if "error" in row:
                print(f"{name}: failed", flush=True)
                continue
            reference_name = CONTENDERS[name].reference
            reference = next((other for other in rows if other["name"] == reference_name), None)
            add_comparison(row, reference, _latent_path(folder, name), _latent_path(folder, reference_name))
            print(f"{name}: {row['step_s_median']:.4f} s/step", flush=True)
    finally:
        if holder is not None:
            holder.close()
    return rows


def _run_contender(name: str, spec: StepSpec, folder: Path, holder: CardHolder | None, timeout_s: float) -> Row:
    spec_path = folder / "spec.json"
    spec.write(spec_path)
    is_simulated = spec.device == "cpu" and not CONTENDERS[name].whole_card
    environment = {"LAYERSTREAM_SIMULATE_GIB": str(spec.free_gib)} if is_simulated else {}
    try:
        before = None if holder is None else holder.wait_for_return()
        row = run_child(
            "worker",
            [name, "--spec", str(spec_path), "--latent", str(_latent_path(folder, name))],
            timeout_s=timeout_s,
            environment=environment,
            log_path=folder / f"{name}.log",
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


def _latent_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
