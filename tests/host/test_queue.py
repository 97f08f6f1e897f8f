"""Many prompts in a row: nothing drifts, and nothing moves that did not have to."""

from __future__ import annotations

import gc

import pytest
from layerstream.streaming.host.need import MARGIN_BYTES
from layerstream.streaming.host.settings import GIB

from governed import Workflow, governed, make_parts
from streamed import on_simulated_card
from test_stages import equal

PROMPTS = 20


def streams(workflow: Workflow) -> list:
    return [patcher.stream for patcher in (workflow.model, workflow.clip.patcher, workflow.vae.patcher)]


def moved(workflows: list[Workflow]) -> list[tuple[int, int, int]]:
    moves = [stream.moves for workflow in workflows for stream in streams(workflow)]
    return [(one.first.count, one.returns.count, one.departures.count) for one in moves]


@pytest.fixture
def two_checkpoints(monkeypatch, load, sample):
    """Two workflows under the auto policy on a card with room for `share` of both, and what they make without it."""

    def make(share: float) -> tuple[list[Workflow], list]:
        on_simulated_card(monkeypatch)
        both = [make_parts(load), make_parts(load)]
        expected = [Workflow(parts, sample).run() for parts in both]
        patchers = [patcher for parts in both for patcher in (parts.model, parts.clip.patcher, parts.vae.patcher)]
        total = sum(patcher.model_size() for patcher in patchers)
        on_simulated_card(monkeypatch, size_gib=(share * total + MARGIN_BYTES) / GIB)
        return [governed(parts, sample, mode="auto") for parts in both], expected

    return make


def test_with_room_for_both_nothing_moves_after_the_first_two_prompts(two_checkpoints):
    workflows, expected = two_checkpoints(share=1.1)
    device = workflows[0].model.stream.device
    seen = set()
    for prompt in range(PROMPTS):
        assert equal(workflows[prompt % 2].run(), expected[prompt % 2])
        if prompt >= 1:
            seen.add((device.used_bytes, device.locked_bytes, device.copied_bytes, *moved(workflows)))
    assert len(seen) == 1
    assert moved(workflows) == [(1, 0, 0)] * 6


def test_with_room_for_one_each_prompt_moves_the_same_and_no_more_than_is_short(two_checkpoints):
    workflows, expected = two_checkpoints(share=0.6)
    device = workflows[0].model.stream.device
    returned, held = [], []
    for prompt in range(PROMPTS):
        before = sum(stream.moves.returns.bytes for workflow in workflows for stream in streams(workflow))
        assert equal(workflows[prompt % 2].run(), expected[prompt % 2])
        after = sum(stream.moves.returns.bytes for workflow in workflows for stream in streams(workflow))
        gc.collect()
        returned.append(after - before)
        held.append((device.used_bytes, device.locked_bytes))
    steady = slice(4, None)
    assert len(set(held[steady][::2])) == 1 and len(set(held[steady][1::2])) == 1, "memory drifts"
    assert len(set(returned[steady][::2])) == 1 and len(set(returned[steady][1::2])) == 1
    total = sum(stream.session.total_bytes for workflow in workflows for stream in streams(workflow))
    assert 0 < max(returned[steady]) <= total / 2, "more came back than one checkpoint has"
    counts = [stream.moves.first.count for workflow in workflows for stream in streams(workflow)]
    assert counts == [1] * 6, "something was read from its file again"
