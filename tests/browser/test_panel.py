"""The live view in a real browser on a real server: what it shows, and what it lives through."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import Page, Problems, command, open_page, open_panel, save_picture, seed_settings
from live_run import streamed_prompt, streaming_server
from scripts.example import workflow_of
from scripts.frontends import frontend_arguments
from scripts.hosts import Host
from scripts.server import Server, stop

GIB = 1024**3
STEPS = 10
DRAW_MS = 4.0
LANGUAGES = ("en", "de", "zh", "ja")
PASSES_SEEN = "() => Number(document.querySelector('[data-figure=passes]')?.textContent) >= 4"

# Looks at the node that streams, at its own size.
CLOSE_UP = """() => {
  const canvas = window.app.canvas;
  const node = window.app.graph._nodes.find(node => node.type === 'LayerStreamModel');
  canvas.ds.scale = 1;
  canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]];
  canvas.setDirty(true, true);
}"""

# Rectangles of texts that lie over each other, and whether anything is wider than the view.
FAULTS_OF_LAYOUT = """panel => {
  const seen = [...panel.querySelectorAll('p, h3, h4, li, dt, dd, button, .ls-state, canvas')]
    .filter(node => node.offsetParent && (node.textContent || node.tagName === 'CANVAS'))
    .map(node => [node, node.getBoundingClientRect()]);
  const faults = [];
  const name = node => `${node.tagName}:${node.textContent.slice(0, 20)}`;
  for (const [node, box] of seen) {
    if (node.scrollWidth > node.clientWidth + 1 && node.tagName !== 'CANVAS') faults.push(`${name(node)} is cut off`);
    if (box.right > panel.getBoundingClientRect().right + 1) faults.push(`${name(node)} sticks out`);
    for (const [other, its] of seen) {
      if (node === other || node.contains(other) || other.contains(node)) continue;
      const across = Math.min(box.right, its.right) - Math.max(box.left, its.left);
      const down = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
      if (across > 1 && down > 1) faults.push(`${name(node)} lies over ${name(other)}`);
    }
  }
  if (panel.scrollWidth > panel.clientWidth) faults.push('the view scrolls sideways');
  return faults;
}"""

# Sends the page so many messages, made from the last real one, as its connection would.
SEND = """([count, blocks]) => {
  const api = window.app.api ?? window.comfyAPI.api.api;
  const letters = 'rsrsszzcf';
  for (let index = 0; index < count; index += 1) {
    const detail = structuredClone(window.lastMoment);
    detail.time_s += (index + 1) * 0.25;
    detail.run = { prompt: 'x', node: '1', class: 'KSampler' };
    for (const session of detail.sessions) {
      session.passes += index;
      session.moved_bytes += index * 2 ** 20;
      if (blocks) session.blocks = letters.repeat(blocks).slice(index % 9, index % 9 + blocks);
    }
    api.dispatchEvent(new CustomEvent('layerstream.state', { detail }));
  }
}"""


@pytest.fixture
def opened(context: Any, server: Server) -> Iterator[tuple[Page, Problems]]:
    page, problems = open_page(context, server)
    yield page, problems
    page.close()


def session_of(server: Server) -> dict[str, Any]:
    (session,) = server.client.get_json("/layerstream/state")["sessions"]
    return session


def figure(panel: Any, key: str, place: int = 0) -> str:
    return panel.locator(f"[data-figure={key}]").nth(place).inner_text()


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


def stream_in_background(server: Server, seed: int) -> threading.Thread:
    prompt = streamed_prompt(server, steps=STEPS, seed=seed)
    thread = threading.Thread(target=lambda: server.client.queue(prompt))
    thread.start()
    return thread


def remember_moment(page: Page) -> None:
    page.evaluate("async () => { window.lastMoment = (await (await fetch('/layerstream/state')).json()).now; }")


def draws_of(page: Page, place: str = "sidebar") -> int:
    return int(page.evaluate(f"document.querySelector('.ls-panel[data-place={place}]').dataset.draws"))


def test_the_view_follows_a_run_and_shows_the_counters(opened: tuple[Page, Problems], server: Server) -> None:
    page, problems = opened
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow_of("sd15"))
    panel = open_panel(page)
    assert "No model streams yet" in panel.locator(".ls-sentence").inner_text()
    save_picture(page, "empty")
    run = stream_in_background(server, 1)
    page.wait_for_function("() => document.querySelector('.ls-state')?.dataset.state === 'running'", timeout=30_000)
    page.wait_for_function(PASSES_SEEN, timeout=60_000)
    first = draws_of(page)
    assert not panel.locator("[data-action=free]").is_enabled(), "models in use cannot be freed"
    save_picture(page, "running")
    run.join()
    page.wait_for_function("() => document.querySelector('.ls-state').dataset.state === 'idle'", timeout=10_000)
    assert draws_of(page) > first
    session = session_of(server)
    assert session["passes"] == STEPS
    assert figure(panel, "passes") == str(STEPS)
    assert figure(panel, "served") == str(session["hits"]) and figure(panel, "late") == str(session["misses"])
    assert figure(panel, "streamed") == gib(session["streamed_bytes_per_step"])
    card = server.client.get_json("/layerstream/state")["now"]["card"]
    for part in ("resident", "free", "budget", "total"):
        assert figure(panel, part) == gib(card[f"{part}_bytes"])
    assert float(figure(panel, "rate")) > 0
    assert "simulated card" in panel.locator(".ls-sentence").inner_text()
    badge = f"{gib(card['total_bytes'] - card['free_bytes'])} / {gib(card['total_bytes'])}"
    assert page.locator(".ls-badge").inner_text() == badge
    page.evaluate("() => window.app.extensionManager.setting.set('LayerStream.Badge', false)")
    page.locator(".ls-badge").wait_for(state="hidden")
    page.evaluate("() => window.app.extensionManager.setting.set('LayerStream.Badge', true)")
    page.locator(".ls-badge").wait_for()
    save_picture(page, "idle")
    assert problems == []


def test_the_node_says_what_its_model_does(opened: tuple[Page, Problems], server: Server) -> None:
    page, problems = opened
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow_of("sd15"))
    page.wait_for_function(
        "text => [...document.querySelectorAll('.ls-node-line')].some(line => line.textContent.startsWith(text))",
        arg=f"{gib(session_of(server)['resident_bytes'])} on the card",
        timeout=10_000,
    )
    page.evaluate(CLOSE_UP)
    page.wait_for_timeout(500)
    box = page.locator(".ls-node-line").bounding_box()
    assert box["height"] >= 12 and box["width"] > 250, "the line can be read"
    save_picture(page, "node")
    saved = page.evaluate("() => window.app.graph.serialize().nodes.find(node => node.type === 'LayerStreamModel')")
    assert saved["widgets_values"] == ["auto", 0, 0, 256], "the line is no part of the workflow"
    assert problems == []


def test_blocks_and_charts_can_be_walked_by_keyboard(opened: tuple[Page, Problems], server: Server) -> None:
    page, problems = opened
    panel = open_panel(page)
    units = session_of(server)["units"]
    strip = panel.locator("canvas.ls-strip")
    strip.focus()
    for index in range(3):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "name => document.querySelector('.ls-detail').textContent.startsWith(name)",
            arg=f"{units[index]['name']}: {gib(units[index]['bytes'])}",
        )
    history = server.client.get_json("/layerstream/state")["history"]
    panel.locator("canvas.ls-chart").first.focus()
    page.keyboard.press("Home")
    first = dict(zip(history["columns"], history["rows"][0], strict=True))
    page.wait_for_function(
        "size => document.querySelector('[data-figure=free]').textContent === size", arg=gib(first["free_bytes"])
    )
    assert problems == []


def test_reports_are_copied_and_runs_exported(opened: tuple[Page, Problems], server: Server, tmp_path: Path) -> None:
    page, problems = opened
    panel = open_panel(page)
    panel.locator("[data-action=text]").click()
    page.wait_for_function("() => document.querySelector('.ls-answer').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert steady(copied) == steady(server.client.get_bytes("/layerstream/report").decode())
    with page.expect_download() as download:
        panel.locator("[data-action=csv]").click()
    download.value.save_as(tmp_path / "run.csv")
    header, *lines = (tmp_path / "run.csv").read_text().splitlines()
    history = server.client.get_json("/layerstream/state")["history"]
    place, source = header.split(",").index("resident_bytes"), history["columns"].index("resident_bytes")
    assert [float(line.split(",")[place]) for line in lines] == [row[source] for row in history["rows"]]
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    with page.expect_download() as download:
        panel.locator("[data-action=text]").click()
    assert download.value.suggested_filename.endswith(".txt")
    assert steady(Path(download.value.path()).read_text()) == steady(copied)
    assert problems == []


def steady(report: str) -> list[str]:
    """The lines of a report that other programs do not change."""
    return [line for line in report.splitlines() if not line.startswith("RAM:")]


def test_a_view_that_is_not_seen_does_not_draw_and_comes_back(opened: tuple[Page, Problems], server: Server) -> None:
    page, problems = opened
    open_panel(page)
    remember_moment(page)
    for _ in range(3):
        command(page, "Workspace.ToggleSidebarTab.node-library")
        page.wait_for_function("() => !document.querySelector('.ls-panel[data-place=sidebar]')?.offsetParent")
        page.evaluate("window.kept ??= null")
        page.evaluate(SEND, [8, 0])
        time.sleep(0.6)
        command(page, "Workspace.ToggleSidebarTab.layerstream")
        panel = page.locator(".ls-panel[data-place=sidebar]")
        panel.wait_for(timeout=5_000)
        assert page.locator(".ls-panel[data-place=sidebar]").count() == 1
    before = draws_of(page)
    page.evaluate(SEND, [8, 0])
    time.sleep(0.8)
    after = draws_of(page)
    assert after > before
    command(page, "Workspace.ToggleSidebarTab.layerstream")
    page.evaluate(SEND, [8, 0])
    time.sleep(0.6)
    open_panel(page, "bottom")
    command(page, "Workspace.ToggleSidebarTab.layerstream")
    assert draws_of(page) <= after + 1, "it drew while it was closed"
    assert problems == []


def test_a_thousand_messages_are_drawn_at_their_own_pace_and_quickly(
    opened: tuple[Page, Problems], server: Server
) -> None:
    page, problems = opened
    panel = open_panel(page)
    remember_moment(page)
    before = draws_of(page)
    page.evaluate(SEND, [1000, 0])
    time.sleep(1.0)
    assert 1 <= draws_of(page) - before <= 6
    page.evaluate(SEND, [2400, 120])  # ten minutes
    took = []
    for _ in range(12):
        page.evaluate(SEND, [1, 120])
        page.wait_for_timeout(300)
        took.append(float(panel.get_attribute("data-draw-ms")))
    print(f"a draw takes {min(took):.2f} to {max(took):.2f} ms")
    assert min(took) < DRAW_MS
    assert problems == []


@pytest.mark.parametrize(("language", "palette"), zip(LANGUAGES, ("dark", "light") * 2, strict=True))
def test_nothing_overlaps_narrow_or_wide(context: Any, server: Server, palette: str, language: str) -> None:
    texts = {name: read["layerstream"] for name, read in server.client.get_json("/i18n").items() if name in LANGUAGES}
    seed_settings(server, **{"LayerStream.Language": language, "Comfy.ColorPalette": palette})
    page, problems = open_page(context, server)
    try:
        panel = open_panel(page)
        assert panel.get_attribute("data-theme") == palette
        assert panel.evaluate("panel => getComputedStyle(panel).containerType") == "inline-size", "it has its styles"
        assert panel.locator("[data-action=free]").inner_text() == texts[language]["button"]["free"]
        panel.evaluate("panel => { panel.style.width = `${Math.min(300, panel.parentElement.clientWidth)}px`; }")
        page.wait_for_timeout(700)
        assert panel.evaluate(FAULTS_OF_LAYOUT) == []
        save_picture(page, f"narrow-{palette}-{language}")
        command(page, "LayerStream.TogglePanel")
        page.set_viewport_size({"width": 2000, "height": 1300})
        wide = open_panel(page, "bottom")
        page.wait_for_timeout(700)
        assert wide.bounding_box()["width"] > 1800
        assert wide.evaluate(FAULTS_OF_LAYOUT) == []
        save_picture(page, f"wide-{palette}-{language}")
        assert problems == []
    finally:
        page.close()
        seed_settings(server)


def test_the_line_lives_in_nodes_2_as_well(context: Any, server: Server) -> None:
    seed_settings(server, **{"Comfy.VueNodes.Enabled": True})
    page, problems = open_page(context, server)
    try:
        page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow_of("sd15"))
        page.wait_for_function(
            "() => [...document.querySelectorAll('.ls-node-line')].some(line => /card/.test(line.textContent))"
        )
        page.wait_for_timeout(500)
        save_picture(page, "nodes-2")
        assert problems == []
    finally:
        page.close()
        seed_settings(server)


def test_freeing_empties_the_card(opened: tuple[Page, Problems], server: Server) -> None:
    page, problems = opened
    panel = open_panel(page)
    resident = session_of(server)["resident_bytes"]
    assert resident > 0
    panel.locator("[data-action=free]").click()
    page.wait_for_function("() => document.querySelector('.ls-answer').textContent.endsWith('freed')")
    assert panel.locator(".ls-answer").inner_text() == f"{gib(resident)} freed"
    page.wait_for_function("size => document.querySelector('[data-figure=resident]').textContent === size", arg=gib(0))
    assert server.client.get_json("/layerstream/state")["now"]["card"]["resident_bytes"] == 0
    save_picture(page, "freed")
    assert problems == []


def test_a_lost_connection_and_a_new_server_are_lived_through(
    opened: tuple[Page, Problems], server: Server, host: Host
) -> None:
    page, problems = opened
    open_panel(page)
    state = "() => document.querySelector('.ls-state').dataset.state"
    page.evaluate("() => (window.app.api ?? window.comfyAPI.api.api).socket.close()")
    page.wait_for_function(f"({state})() === 'idle'", timeout=15_000)
    port = int(server.client.address.rsplit(":", 1)[1])
    stop(server.process)
    page.wait_for_function(f"({state})() === 'away'", timeout=15_000)
    save_picture(page, "away")
    with streaming_server(host, *frontend_arguments(host), port=port) as again:
        page.wait_for_function(f"({state})() === 'idle'", timeout=60_000)
        run = stream_in_background(again, 7)
        page.wait_for_function(f"({state})() === 'running'", timeout=30_000)
        run.join()
        page.wait_for_function(
            "passes => document.querySelector('[data-figure=passes]')?.textContent === passes",
            arg=str(STEPS),
            timeout=15_000,
        )
    assert [problem for problem in problems if "net::ERR_" not in problem] == []
