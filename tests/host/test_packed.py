"""What people install, unpacked into a fresh ComfyUI, loads and streams; and nothing but what they need is in it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from live_run import streamed_prompt, streaming_server
from scripts.hosts import Host
from scripts.pack import ROOT
from scripts.packed import packed_files, write_zip
from scripts.server import PACK_FOLDER

LANGUAGES = ("en", "de", "zh", "ja")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    with zipfile.ZipFile(write_zip(folder / "node.zip")) as archive:
        archive.extractall(folder / PACK_FOLDER)
    return folder / PACK_FOLDER


def test_the_pack_holds_what_runs_and_no_tests(unpacked: Path) -> None:
    files = packed_files()
    for needed in ("__init__.py", "pyproject.toml", "LICENSE", "README.md", "web/panel.js", "locales/de/main.json"):
        assert needed in files
    assert not [name for name in files if name.startswith(("tests/", "bench/", "scripts/", "."))]
    assert sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file()) < 8e6


def test_the_pack_runs_where_nothing_else_of_the_repository_is(host: Host, unpacked: Path) -> None:
    with streaming_server(host, pack=unpacked) as server:
        nodes = {name for name in server.client.get_json("/object_info") if name.startswith("LayerStream")}
        server.client.queue(streamed_prompt(server))
        (session,) = server.client.get_json("/layerstream/state")["sessions"]
        assert session["passes"] == 2 and session["moved_bytes_per_step"] > 0
        served = server.client.get_json("/extensions")
        for script in (ROOT / "web").glob("*.js"):
            assert f"/extensions/{PACK_FOLDER}/{script.name}" in served
        translations = server.client.get_json("/i18n")
        for name in nodes:
            help_page = server.client.get_bytes(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
            assert help_page.startswith("# ")
            for language in LANGUAGES:
                assert translations[language]["nodeDefs"][name]["display_name"]
        templates = server.client.get_json("/workflow_templates")[PACK_FOLDER]
        assert len(templates) == len(list((ROOT / "example_workflows").glob("*.json")))


def test_every_input_that_is_translated_is_one(host: Host, unpacked: Path) -> None:
    with streaming_server(host, pack=unpacked) as server:
        object_info = server.client.get_json("/object_info")
    for language in LANGUAGES:
        for name, texts in json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8")).items():
            inputs = object_info[name]["input"]
            assert set(texts.get("inputs", {})) <= {*inputs.get("required", {}), *inputs.get("optional", {})}, name
