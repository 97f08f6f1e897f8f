"""The family matrix: streamed sampling gives the resident result bit for bit, for one narrow model at a time.

In: a model's name and the cases. Out: what was found and which cases differ. A simulated card fills what it frees with
NaN and delays copies at random. A host must be open (`hosts.open_host`) before anything here is called.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .division import (
    Division,
    complaints_of_full_size,
    divide,
    full_size_model,
    narrow_units,
    pack_module,
    trace_calls,
    uncalled_units,
)
from .tiny_models import load_tiny_model, loads_from_file, sample_tiny

CARD_GIB = 8
GIB = 1024**3

ALL_STREAMED, HALF, NEARLY_RESIDENT = "all streamed", "half", "nearly all resident"
# What the card must hold at least beside what is in no unit: one that computes and one that arrives.
UNITS_IN_FLIGHT = 2
# Of all beyond that, the share that may be on the card.
KEPT = {ALL_STREAMED: None, HALF: 0.5, NEARLY_RESIDENT: 0.9}


class Case(NamedTuple):
    """One way to sample: how much stays on the card, latents at once, and guidance."""

    kept: str
    batch: int
    cfg: float

    def __str__(self) -> str:
        return f"{self.kept}, batch {self.batch}, cfg {self.cfg:g}"


CASES = tuple(Case(*case) for case in itertools.product(KEPT, (1, 2), (1.0, 4.0)))
# Each way to keep, each batch and each guidance once or more.
FEW_CASES = (Case(ALL_STREAMED, 1, 4.0), Case(NEARLY_RESIDENT, 1, 4.0), Case(HALF, 2, 1.0))
ONE_CASE = (Case(HALF, 1, 1.0),)


@dataclass
class Outcome:
    """What one model showed: its units, how many cases ran and were equal, and what was wrong.

    Counts are over all cases. `streamed_bytes` is what crosses in a pass when all of the narrow model streams.
    """

    name: str
    from_file: bool
    full: Division | None = None
    narrow: Division | None = None
    cases: int = 0
    equal: int = 0
    passes: int = 0
    departures: int = 0
    streamed_bytes: int = 0
    wrong: list[str] = field(default_factory=list)


def run_model(name: str, folder: Path, cases: Iterable[Case] = CASES) -> Outcome:
    """Divide the models of `name`, and sample the narrow one resident and streamed in each case.

    Files are written into `folder`.
    """
    outcome = Outcome(name, loads_from_file(name))
    try:
        outcome.full = divide(full_size_model(name))
    except AttributeError as error:
        outcome.wrong.append(f"full size: {error}")
        return outcome
    outcome.wrong += complaints_of_full_size(outcome.full)
    with narrow_units(), torch.inference_mode():
        runs = itertools.groupby(sorted(cases, key=_sampling), key=_sampling)
        for seed, (_, of_run) in enumerate(runs):
            # A stream keeps the card it began with, so a card of another seed takes a model of its own.
            model = load_tiny_model(name, folder)
            with simulated_card(seed):
                _compare(model, list(of_run), outcome)
            _forget(model)
            del model
    return outcome


def _sampling(case: Case) -> tuple[int, float]:
    return case.batch, case.cfg


def _compare(model: Any, cases: list[Case], outcome: Outcome) -> None:
    """Sample resident, then streamed in each of `cases`, which differ in what is kept."""
    batch, cfg = _sampling(cases[0])
    diffusion_model = model.model.diffusion_model
    with trace_calls(diffusion_model) as called:
        expected = sample_tiny(model, outcome.name, batch=batch, cfg=cfg)
    if outcome.narrow is None:
        outcome.narrow = divide(diffusion_model)
        outcome.wrong += uncalled_units(diffusion_model, called)
    if not expected.isfinite().all():
        outcome.wrong.append(f"resident, batch {batch}, cfg {cfg:g}: not finite, so there is nothing to compare")
        return
    report = {"passes": 0, "departures": 0}
    for case in cases:
        outcome.cases += 1
        try:
            streamed = stream(model, case.kept, outcome.narrow)
            result = sample_tiny(streamed, outcome.name, batch=batch, cfg=cfg)
            streamed.stream.session.check()
        except Exception as error:
            outcome.wrong.append(f"{case}: {type(error).__name__}: {error}")
            continue
        report = streamed.streaming_report()
        wrong = [] if torch.equal(result, expected) else ["other bits"]
        wrong += _faults(case, streamed, report)
        outcome.wrong += [f"{case}: {fault}" for fault in wrong]
        outcome.equal += not wrong
        if case.kept == ALL_STREAMED:
            outcome.streamed_bytes = report["streamed_bytes_per_step"]
    # The meter counts over all cases of a model.
    outcome.passes += report["passes"]
    outcome.departures += report["departures"]


def _faults(case: Case, streamed: Any, report: Mapping[str, Any]) -> list[str]:
    faults = []
    if case.kept == ALL_STREAMED and not report["streamed_bytes_per_step"]:
        faults.append("nothing streamed")
    allowed_bytes = streamed.settings.vram_gib * GIB or CARD_GIB * GIB
    if streamed.loaded_size() > allowed_bytes:
        faults.append(f"{streamed.loaded_size()} bytes are on the card, {allowed_bytes:.0f} may be")
    if report["broken_passes"]:
        faults.append(f"{report['broken_passes']} broken passes")
    return faults


def stream(model: Any, kept: str, division: Division) -> Any:
    """A streaming patcher of `model`, divided as `division` says, that keeps as much as `kept` says."""
    patchers, settings = pack_module("host.patcher"), pack_module("host.settings")
    share = KEPT[kept]
    if share is None:
        how = settings.StreamingSettings(mode=settings.Mode.ALWAYS, min_free_mib=0)
    else:
        least_bytes = division.outside_bytes + UNITS_IN_FLIGHT * division.largest_bytes
        vram_gib = (least_bytes + share * (division.total_bytes - least_bytes)) / GIB
        how = settings.StreamingSettings(mode=settings.Mode.AUTO, vram_gib=vram_gib, min_free_mib=0)
    return patchers.StreamingModelPatcher.from_patcher(model, how)


@contextlib.contextmanager
def simulated_card(seed: int) -> Iterator[None]:
    """Give the pack a card that delays copies at random, by `seed`; weights travel packed for an odd one."""
    devices = pack_module("host.devices")
    values = {
        devices.SIMULATE_VARIABLE: str(CARD_GIB),
        devices.SEED_VARIABLE: str(seed),
        devices.PACKED_VARIABLE: str(seed % 2),
    }
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _forget(model: Any) -> None:
    """Have ComfyUI drop its models, so that the next one starts clean."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    model.detach()
    gc.collect()
