"""The pack in servers that people set up for others: several users, and all other packs switched off."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from live_run import Listener, streamed_prompt, streaming_server
from scripts.hosts import Host
from scripts.server import PACK_FOLDER, Server
from scripts.small_example import WIDEN_NODE, WIDEN_PACK
from users import User, make_user

SECRET = "ada lovelace"


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with streaming_server(host, "--multi-user") as running:
        yield running


@pytest.fixture(scope="module")
def users(server: Server) -> tuple[User, User]:
    return make_user(server, "ada"), make_user(server, "bob")


def test_each_user_has_settings_of_their_own(users: tuple[User, User]) -> None:
    ada, bob = users
    ada.ask("/settings", {"LayerStream.Units": "GB", "LayerStream.Language": "de"})
    assert ada.ask("/settings")["LayerStream.Units"] == "GB"
    assert not [name for name in bob.ask("/settings") if name.startswith("LayerStream")]
    for user in users:
        assert {"en", "de", "zh", "ja"} <= user.ask("/i18n").keys()


def test_all_users_see_the_card_and_nothing_of_each_others_work(server: Server, users: tuple[User, User]) -> None:
    prompt = streamed_prompt(server, steps=4)
    for node in prompt.values():
        node["inputs"].update({name: SECRET for name in ("text", "filename_prefix") if name in node["inputs"]})
        node["_meta"] = {"title": SECRET}
    assert json.dumps(prompt).count(SECRET) > 3
    with Listener(server) as listener:
        server.client.queue(prompt)
    told = [moment for _, moment in listener.messages]
    assert [session["passes"] for session in told[-1]["sessions"]] == [4]
    for user in users:
        state, report = user.ask("/layerstream/state"), user.ask("/layerstream/report")
        assert state["sessions"][0]["passes"] == 4 and "4 passes" in report
        for shown in (json.dumps(state), report, json.dumps(told)):
            assert SECRET not in shown and user.id not in shown
    ada, bob = users
    held = ada.ask("/layerstream/state")["now"]["card"]["resident_bytes"]
    assert bob.ask("/layerstream/free", {}) == {"freed_bytes": held} and held > 0


def test_it_runs_where_all_other_packs_are_switched_off(host: Host) -> None:
    alone = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_FOLDER)
    with streaming_server(host, *alone, packs=[WIDEN_PACK]) as server:
        nodes = server.client.get_json("/object_info")
        assert "LayerStreamModel" in nodes and WIDEN_NODE not in nodes
        assert f"/extensions/{PACK_FOLDER}/layerstream.js" in server.client.get_json("/extensions")
        server.client.queue(streamed_prompt(server))
        (session,) = server.client.get_json("/layerstream/state")["sessions"]
        assert session["passes"] == 2 and session["moved_bytes_per_step"] > 0
