"""A card whose memory is no longer held as it was is said to be so, and is not handed to the next contender."""

import sys
import time

import pytest

from bench import holder
from bench.child import ChildError
from bench.holder import CardHolder

SAYS = "import json; say = lambda free: print(json.dumps(dict(free_bytes=free, lowest_free_bytes=free)), flush=True);"


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch):
    """A holder whose process is a few lines of Python instead of one that needs a card."""

    def start(code: str) -> CardHolder:
        monkeypatch.setattr(holder, "child_command", lambda module, arguments: [sys.executable, "-c", SAYS + code])
        return CardHolder(8.0)

    return start


def test_a_holder_whose_process_has_ended_says_so_and_closes_in_silence(holding) -> None:
    ended = holding("say(1)")
    deadline = time.monotonic() + 30
    while not ended.is_closed and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ChildError, match="has ended"):
        ended.use()
    assert ended.is_closed
    ended.close()


def test_a_holder_that_ends_instead_of_an_answer_is_closed(holding) -> None:
    ended = holding("say(1); input()")
    assert not ended.is_closed
    with pytest.raises(ChildError, match="has ended"):
        ended.use()
    assert ended.is_closed


def test_a_holder_ends_when_the_memory_that_it_left_free_does_not_come_back(
    holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "RETURN_TIMEOUT_S", 0.2)
    # Another program takes half of it.
    taken = holding("import sys; say(2**33); [say(2**32) for _ in sys.stdin]")
    with pytest.raises(ChildError, match="another program"):
        taken.wait_for_return()
    assert taken.is_closed
    with holding("import sys; say(2**33); [say(2**33) for _ in sys.stdin]") as kept:
        assert kept.wait_for_return().free_bytes == 2**33
        assert not kept.is_closed
