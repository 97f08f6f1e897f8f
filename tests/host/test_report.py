"""Streaming Report: a picture and a text of the run, in a real server, beside the image that they tell of."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy
import pytest
from layerstream.streaming.host.advice import Advice
from layerstream.streaming.host.report_picture import BACKGROUND, FORMS, MARGIN, PARTS, draw_report, link_rates
from PIL import Image, ImageColor

from live_run import streamed_prompt, streaming_server
from scripts.hosts import Host
from scripts.server import Server

COLUMNS = ("time_s", "total_bytes", *(f"{part}_bytes" for part in PARTS), "free_bytes", "budget_bytes", "moved_bytes")


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Server]:
    with streaming_server(host) as running:
        yield running


def colors_of(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(image.width * image.height)}


def test_a_workflow_saves_the_report_of_its_own_run(server: Server) -> None:
    prompt = streamed_prompt(server, steps=3)
    (sampler,) = [key for key, node in prompt.items() if node["class_type"] == "KSampler"]
    prompt["report"] = {"class_type": "LayerStreamReport", "inputs": {"after": [sampler, 0], "width": 768}}
    prompt["saved"] = {"class_type": "SaveImage", "inputs": {"images": ["report", 0], "filename_prefix": "report"}}
    prompt["streams"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    for _ in range(2):
        outputs = server.client.queue(prompt)["outputs"]
        assert "saved" in outputs, "a report is never an old one"
    (text,) = outputs["report"]["text"]
    assert text.startswith("LayerStream report\n") and "3 passes" in text
    assert list(outputs["streams"]["text"]) == [text]
    names = [f"/view?filename={image['filename']}&type=output" for image in outputs["saved"]["images"]]
    picture = Image.open(io.BytesIO(server.client.get_bytes(names[0]))).convert("RGB")
    assert picture.width == 768
    wanted = {PARTS["resident"][0], FORMS["streamed"], BACKGROUND}
    assert {ImageColor.getrgb(color) for color in wanted} <= colors_of(picture)


def state(rows: list[tuple], units: int = 0) -> dict:
    host = dict.fromkeys(("ram_total_bytes", "ram_free_bytes", "slab_bytes", "page_locked_bytes"), 0)
    return {
        "sessions": [],
        "advice": ("nothing", {}),
        "now": {"card": None, "host": host},
        "history": {"columns": COLUMNS, "rows": rows},
    }


def test_areas_are_as_high_as_their_bytes() -> None:
    rows = [(float(second), 100, 50, 0, 25, 0, 0, 25, None, 0) for second in range(11)]
    pixels = numpy.asarray(draw_report(state(rows), 1024))
    column = [tuple(pixel) for pixel in pixels[:, 512]]
    counts = {part: column.count(ImageColor.getrgb(PARTS[part][0])) for part in ("resident", "activation", "ring")}
    assert counts["resident"] == pytest.approx(100, abs=3)
    assert counts["activation"] == pytest.approx(50, abs=3)
    assert counts["ring"] == 0


def test_a_gap_between_runs_is_left_empty() -> None:
    rows = [(second, 100, 100, 0, 0, 0, 0, 0, None, 0) for second in (0.0, 1.0, 9.0, 10.0)]
    pixels = numpy.asarray(draw_report(state(rows), 1024))
    blue = (pixels == ImageColor.getrgb(PARTS["resident"][0])).all(axis=2)[60]
    assert blue[40] and blue[980] and not blue[200:800].any()


def test_nothing_was_recorded_yet() -> None:
    assert draw_report(state([]), 640).width == 640


def test_what_is_written_stays_in_the_picture() -> None:
    sentence = Advice("link", {"link": 80, "compute": 60, "gib": 1.0})
    pixels = numpy.asarray(draw_report(state([]) | {"advice": sentence}, 640))
    background = (pixels == ImageColor.getrgb(BACKGROUND)).all(axis=2)
    assert background[:, -MARGIN + 1 :].all()


def test_rates_are_bytes_over_the_second_before_and_end_at_gaps() -> None:
    rows = [{"time_s": time, "moved_bytes": moved} for time, moved in ((0, 0), (0.5, 5), (1, 10), (1.5, 25), (9, 90))]
    assert link_rates(rows) == [None, 10, 10, 20, None]
    assert link_rates([{"time_s": 0, "moved_bytes": 9}, {"time_s": 1, "moved_bytes": 0}]) == [None, 0]
