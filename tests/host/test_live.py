"""The live view's messages and addresses on a real server, while a workflow streams."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from live_run import Listener, post, streamed_prompt, streaming_server
from scripts.client import ServerError
from scripts.hosts import Host
from scripts.server import Server

MOST_A_SECOND = 4
# One may be made a little early after one that was made late.
JITTER_S = 0.12


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with streaming_server(host) as running:
        yield running


@pytest.fixture(scope="module")
def listened(server: Server) -> Listener:
    """What came during a run of ten steps, and for three seconds after it."""
    with Listener(server) as listener:
        time.sleep(1.0)
        listener.before = len(listener.messages)
        server.client.queue(streamed_prompt(server, steps=10))
        listener.ended = time.monotonic()
        time.sleep(3.0)
    return listener


def test_messages_come_while_something_runs_and_only_then(listened: Listener) -> None:
    assert listened.before == 0
    assert len(listened.messages) >= 4
    assert listened.messages[-1][0] - listened.ended < 1.0
    assert listened.messages[-1][1]["run"] is None, "the last one says that nothing runs"


def test_messages_are_at_most_four_a_second(listened: Listener) -> None:
    """By when they were made: on a busy machine some arrive late, and close to the next."""
    times = [moment["time_s"] for _, moment in listened.messages]
    for begin in times:
        assert sum(begin <= when < begin + 1 - JITTER_S for when in times) <= MOST_A_SECOND


def test_messages_follow_the_run(listened: Listener, server: Server) -> None:
    moments = [message for _, message in listened.messages]
    assert "KSampler" in {moment["run"]["class"] for moment in moments if moment["run"]}
    (last,) = moments[-1]["sessions"]
    streaming = [node for node, what in streamed_prompt(server).items() if what["class_type"] == "LayerStreamModel"]
    assert last["nodes"] == streaming
    passes = [session["passes"] for moment in moments for session in moment["sessions"]]
    assert passes == sorted(passes) and passes[-1] == 10
    (shown,) = server.client.get_json("/layerstream/state")["sessions"]
    assert (last["passes"], last["hits"], last["misses"]) == (shown["passes"], shown["hits"], shown["misses"])
    assert last["resident_bytes"] == shown["resident_bytes"] and len(last["blocks"]) == shown["blocks"]


def test_the_state_has_the_history_of_the_run(listened: Listener, server: Server) -> None:
    history = server.client.get_json("/layerstream/state")["history"]
    rows = [dict(zip(history["columns"], row, strict=True)) for row in history["rows"]]
    assert len(rows) == len(listened.messages)
    for row, (_, moment) in zip(rows, listened.messages, strict=True):
        assert row["time_s"] == moment["time_s"]
        assert row["resident_bytes"] == moment["card"]["resident_bytes"]
        assert row["moved_bytes"] == sum(session["moved_bytes"] for session in moment["sessions"])


def test_the_report_is_text_or_json(listened: Listener, server: Server) -> None:
    text = server.client.get_bytes("/layerstream/report").decode()
    assert text.startswith("LayerStream report\n") and "10 passes" in text
    as_json = server.client.get_json("/layerstream/report?format=json")
    assert as_json["sessions"] == server.client.get_json("/layerstream/state")["sessions"]
    with pytest.raises(ServerError, match=r"status 400.*must be one of text, json"):
        server.client.get_bytes("/layerstream/report?format=xml")


def test_freeing_is_refused_while_a_prompt_runs(listened: Listener, server: Server) -> None:
    statuses = []
    server.client.queue(
        streamed_prompt(server, steps=6, seed=1),
        lambda done, total: statuses.append(post(server, "/layerstream/free", b"")) if total == 6 else None,
    )
    assert {status for status, _ in statuses} == {409}
    assert "wait until it is done" in statuses[0][1]["error"]


def test_freeing_takes_the_model_off_the_card(listened: Listener, server: Server) -> None:
    (before,) = server.client.get_json("/layerstream/state")["now"]["sessions"]
    assert before["resident_bytes"] > 0
    status, answer = post(server, "/layerstream/free", b"{}")
    assert (status, answer) == (200, {"freed_bytes": before["resident_bytes"]})
    now = server.client.get_json("/layerstream/state")["now"]
    assert now["card"]["free_bytes"] == now["card"]["total_bytes"]
    server.client.queue(streamed_prompt(server, seed=2))
    assert server.client.get_json("/layerstream/state")["now"]["sessions"][0]["loaded"]


def test_a_request_that_cannot_be_understood_is_answered_400(server: Server) -> None:
    status, answer = post(server, "/layerstream/free", json.dumps({"gib": "all"}).encode())
    assert status == 400 and "must be a number" in answer["error"]
