"""What tests of several turns share: a spec, and the rows that come of made-up turns."""

from pathlib import Path
from typing import Any

import pytest

from bench import contest
from bench.contest import run_contenders
from bench.rounds import merge_rounds
from bench.spec import Picture, StepSpec
from turns import Turn, Workers


@pytest.fixture
def spec(tmp_path: Path) -> StepSpec:
    return StepSpec(
        family="zimage",
        size="narrow",
        device="cpu",
        host_path=str(tmp_path),
        checkpoint_path="model.safetensors",
        free_gib=8.0,
        picture=Picture(64, 64),
    )


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: StepSpec):
    """The rows that come of each contender's turns."""

    def rows(**turns: list[Turn]) -> dict[str, dict[str, Any]]:
        workers = Workers(**turns)
        monkeypatch.setattr(contest, "run_child", workers.run)
        names = list(workers.turns) * max(map(len, turns.values()))
        return {row["name"]: row for row in merge_rounds(run_contenders(names, spec, tmp_path, 60.0))}

    return rows
