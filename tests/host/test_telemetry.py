"""What the live view is told: figures add up, are counters of the engine, and taking them costs hardly anything."""

from __future__ import annotations

import statistics
import threading
import time

import comfy.model_management
import pytest
from layerstream.streaming.host.advice import Advice, advice, sentence, texts
from layerstream.streaming.host.freeing import ALL_BYTES, BadRequest, RunUnderWay, bytes_to_free, free_streamed
from layerstream.streaming.host.moment import Observer
from layerstream.streaming.host.report_text import report_text
from layerstream.streaming.host.settings import GIB
from layerstream.streaming.host.streams import ModelStream
from layerstream.streaming.host.telemetry import report, state

from streamed import CARD_GIB, on_simulated_card, stream

MOST_MS = 1.0
"""What a moment may take of a processor; four a second are then 0.4 % of one, beside the thread that samples."""


class Queue:
    """What `free_streamed` needs of ComfyUI's queue, which needs a server to be made."""

    def __init__(self, *running: object) -> None:
        self.mutex = threading.RLock()
        self.currently_running = dict(enumerate(running))


@pytest.fixture
def streamed(monkeypatch, load, sample):
    """A model that was streamed in one run."""
    on_simulated_card(monkeypatch)
    patcher = stream(load("zimage", size="tiny"), 0.5)
    sample(patcher)
    return patcher


def session_of(moment, patcher):
    (session,) = [session for session in moment["sessions"] if session["id"] == patcher.stream.number]
    return session


def test_a_moment_has_the_counters_of_the_engine(streamed):
    moment, session = Observer().moment(None), streamed.stream.session
    shown = session_of(moment, streamed)
    assert shown["passes"] == session.meter.passes == 2
    assert shown["moved_bytes"] == session.meter.total.moved_bytes > 0
    assert shown["hits"] == session.meter.total.hits > 0
    assert shown["resident_bytes"] == session.resident_bytes > 0
    assert shown["streamed_bytes_per_step"] == session.plan.streamed_bytes
    assert len(shown["blocks"]) == len(session.parts.blocks)
    assert [letter in "sz" for letter in shown["blocks"]] == [form.is_streamed for form in session.plan.forms]


def test_the_parts_of_the_card_add_up_to_it(streamed):
    card = Observer().moment(None)["card"]
    parts = ("resident", "ring", "activation", "other_model", "other_program", "free")
    assert sum(card[f"{part}_bytes"] for part in parts) == card["total_bytes"] == CARD_GIB * GIB
    assert card["resident_bytes"] + card["ring_bytes"] == streamed.stream.device.used_bytes


def test_a_moment_in_a_pass_shows_what_is_fetched_and_what_computes(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    patcher = stream(load("zimage", size="tiny"), 0.0)
    observer, strips, handles = Observer(), [], []
    for _, unit in patcher.stream.family.units:
        handles.append(
            next(unit.children()).register_forward_hook(
                lambda *_: strips.append(session_of(observer.moment(None), patcher))
            )
        )
    sample(patcher)
    for handle in handles:
        handle.remove()
    assert strips
    assert all(strip["blocks"].count("c") == 1 for strip in strips), "one block computes at a time"
    assert any("f" in strip["blocks"] for strip in strips)
    moved = [strip["moved_bytes"] for strip in strips]
    assert moved == sorted(moved) and moved[-1] > moved[0]


def test_a_new_version_says_that_there_is_more_to_read(streamed, sample):
    observer = Observer()
    first = session_of(observer.moment(None), streamed)["version"]
    assert session_of(observer.moment(None), streamed)["version"] == first
    streamed.detach()
    gone = session_of(observer.moment(None), streamed)
    assert gone["version"] > first and not gone["loaded"] and gone["resident_bytes"] == 0 and gone["blocks"] == ""


def test_taking_a_moment_costs_next_to_nothing(streamed):
    observer, took = Observer(), []
    observer.moment(None)
    for _ in range(50):
        begun = time.thread_time()
        observer.moment(None)
        took.append((time.thread_time() - begun) * 1000)
    assert statistics.median(took) < MOST_MS


def test_figures_can_be_read_while_a_model_loads(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    patcher = stream(load("zimage", size="tiny"), 0.5)
    failures, is_over, looks = [], threading.Event(), []

    def look() -> None:
        observer = Observer()
        while not is_over.is_set():
            try:
                observer.moment(None)
                state()
                looks.append(1)
            except Exception as error:
                failures.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(8):
            sample(patcher, steps=1)
            patcher.detach()
    finally:
        is_over.set()
        watcher.join()
    assert looks and not failures


def test_figures_can_be_read_while_models_come(monkeypatch, streamed, load):
    """A look at one lets another one come, as the thread that runs prompts may at any time."""
    models, come = [load("flux", size="tiny")], []
    is_open = ModelStream.is_open

    def look(self) -> bool:
        if models:
            come.append(stream(models.pop(), 0.5))
        return is_open.fget(self)

    monkeypatch.setattr(ModelStream, "is_open", property(look))
    assert streamed.stream.number in [session["id"] for session in state()["sessions"]]
    assert come


def test_freeing_all_takes_streamed_models_off_the_card_and_no_other(monkeypatch, load, sample):
    on_simulated_card(monkeypatch)
    other = load("flux", size="tiny")
    expected_other = sample(other)
    patcher = stream(load("zimage", size="tiny"), 0.5)
    expected = sample(patcher)
    held = patcher.loaded_size()
    assert held > 0
    assert free_streamed(Queue(), ALL_BYTES) == held
    assert patcher.stream.device.used_bytes == 0
    assert any(entry.model is other for entry in comfy.model_management.current_loaded_models)
    assert sample(patcher).equal(expected) and sample(other).equal(expected_other)


def test_freeing_some_leaves_the_rest(streamed):
    held = streamed.loaded_size()
    freed = free_streamed(Queue(), held // 4)
    assert held // 4 <= freed < held
    assert streamed.loaded_size() == held - freed


def test_nothing_is_freed_while_a_prompt_runs(streamed):
    held = streamed.loaded_size()
    with pytest.raises(RunUnderWay, match="wait until it is done"):
        free_streamed(Queue("a prompt"), ALL_BYTES)
    assert streamed.loaded_size() == held


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[1]", "list, not an object"),
        (b'{"bytes": 1}', "`bytes` is not known"),
        (b'{"gib": "2"}', "must be a number"),
        (b'{"gib": true}', "must be a number"),
        (b'{"gib": null}', "must be a number"),
        (b'{"gib": NaN}', "must be a number"),
        (b'{"gib": 0}', "above 0"),
        (b'{"gib": -1}', "above 0"),
        (b'{"gib": 1e9}', "at most 4096"),
    ],
)
def test_a_request_that_cannot_be_understood_is_refused_with_the_reason(body, reason):
    with pytest.raises(BadRequest, match=reason):
        bytes_to_free(body)


def test_a_request_says_how_much_or_all():
    assert bytes_to_free(b"") == bytes_to_free(b" {} ") == ALL_BYTES
    assert bytes_to_free(b'{"gib": 1.5}') == 1.5 * GIB


MEASURED = {
    "loaded": True,
    "model": "Lumina2",
    "is_packed": False,
    "has_clock": True,
    "resident_bytes": 2 * GIB,
    "streamed_bytes_per_step": 4 * GIB,
    "host_bytes": 4 * GIB,
    "page_locked_bytes": 4 * GIB,
    "in_file_bytes_per_step": 0,
    "step_ms": 100.0,
    "predicted_step_ms": 98.0,
    "wait_ms": 20.0,
    "limit": "link",
    "expected_link_ms": 80.0,
    "expected_compute_ms": 60.0,
}


@pytest.mark.parametrize(
    ("change", "name", "figures"),
    [
        ({}, "link", {"link": 80, "compute": 60, "gib": 1.0}),
        ({"limit": "compute", "expected_compute_ms": 80.0}, "compute", {"model": "Lumina2", "percent": 25.0}),
        ({"step_ms": 130.0}, "late", {"step": 130, "predicted": 98, "wait": 20}),
        ({"step_ms": None}, "unmeasured", {"model": "Lumina2"}),
        ({"has_clock": False}, "simulated", {"model": "Lumina2", "gib": 4.0}),
        ({"page_locked_bytes": GIB}, "unlocked", {"gib": 3.0, "of": 4.0}),
        ({"in_file_bytes_per_step": 2 * GIB}, "file", {"model": "Lumina2", "gib": 2.0}),
        ({"streamed_bytes_per_step": 0}, "fits", {"model": "Lumina2", "gib": 2.0}),
        ({"loaded": False}, "left", {}),
    ],
)
def test_the_sentence_says_what_limits_the_run(change, name, figures):
    found = advice([MEASURED | change])
    assert found == Advice(name, figures)
    assert "{" not in sentence(found)


def test_every_language_has_every_sentence_with_the_same_figures():
    def shape(entry):
        if isinstance(entry, dict):
            return {key: shape(value) for key, value in entry.items()}
        return sorted(part.split("}")[0] for part in entry.split("{")[1:])

    for language in ("de", "zh", "ja"):
        assert shape(texts(language)) == shape(texts("en")), language


def test_the_report_is_text_with_the_figures(streamed):
    shown = report(streamed.stream)
    text = report_text(state() | {"now": Observer().moment(None)})
    assert shown["model"] in text and f"{shown['passes']} passes" in text
    assert f"{shown['resident_bytes'] / GIB:.2f} GiB" in text
