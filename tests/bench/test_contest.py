"""The card's memory while contenders take turns: held once for neighbours, and anew where it was lost."""

import dataclasses
from pathlib import Path

import pytest

from bench import contest
from bench.child import ChildError
from bench.contest import run_contenders
from bench.holder import CardUse
from bench.rounds import merge_rounds
from bench.spec import GIB, StepSpec
from turns import Turn, Workers

NAMES = ["resident", "layerstream"]


class Holder:
    """Stands for the process that holds the card; its memory never comes back where `is_stuck`."""

    opened: list[float | None] = []
    failing: set[int] = set()
    stuck: set[int] = set()

    def __init__(self, free_gib: float | None) -> None:
        self.number = len(Holder.opened)
        Holder.opened.append(free_gib)
        if self.number in Holder.failing:
            raise ChildError("the process that holds the card's memory has ended")
        self.free_gib, self.is_closed = free_gib, False

    def wait_for_return(self) -> CardUse:
        assert not self.is_closed
        if self.number in Holder.stuck:
            self.close()
            raise ChildError("another program uses the card")
        return CardUse(8 * GIB, 8 * GIB)

    def use(self) -> CardUse:
        return CardUse(8 * GIB, 2 * GIB)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: StepSpec):
    """Rows by name and the free memory of the holders that were opened, given the names and which holders fail."""

    def run(names: list[str], failing: set[int] = frozenset(), stuck: set[int] = frozenset()):  # type: ignore[assignment]
        workers = Workers(**{name.replace("-", "_"): [Turn() for _ in names] for name in names})
        monkeypatch.setattr(contest, "run_child", workers.run)
        monkeypatch.setattr(contest, "CardHolder", Holder)
        Holder.opened, Holder.failing, Holder.stuck = [], set(failing), set(stuck)
        turns = run_contenders(names, dataclasses.replace(spec, device="cuda"), tmp_path, 60.0)
        return {row["name"]: row for row in merge_rounds(turns)}, Holder.opened

    return run


def test_neighbours_share_a_holder_over_the_end_of_a_round_and_others_do_not(on_card) -> None:
    assert on_card(["layerstream", "lowvram"] * 2)[1] == [8.0]
    assert on_card(NAMES * 2)[1] == [None, 8.0, None, 8.0]


def test_a_holder_that_failed_is_not_used_in_the_next_round(on_card) -> None:
    rows, opened = on_card(["layerstream"] * 3, stuck={0})
    assert opened == [8.0, 8.0]
    assert ["error" in each for each in rows["layerstream"]["rounds"]] == [True, False, False]


def test_a_card_that_cannot_be_held_ends_the_first_round_and_costs_a_later_one(on_card) -> None:
    with pytest.raises(ChildError):
        on_card(NAMES, failing={1})
    rows, opened = on_card(NAMES * 3, failing={3})
    assert opened == [None, 8.0, None, 8.0, None, 8.0]
    assert ["error" in each for each in rows["layerstream"]["rounds"]] == [False, True, False]
    assert all("error" not in each for each in rows["resident"]["rounds"])
