"""The loader nodes list GGUF files without disturbing anyone else's lists, and give what ComfyUI can use."""

from __future__ import annotations

import sys

import folder_paths
import pytest
import torch
from layerstream.nodes import gguf_folders
from layerstream.nodes.load_clip_gguf import LayerStreamGgufClipLoader, clip_types
from layerstream.nodes.load_diffusion_model_gguf import LayerStreamGgufModelLoader
from layerstream.streaming.formats.gguf_file import GgufError
from layerstream.streaming.host.gguf_loading import load_diffusion_model

from gguf_models import detect_narrow, narrow_weights, write_gguf
from scripts.tiny_models import sample_tiny


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Folders of models with a few files, in place of ComfyUI's own."""
    registered = dict(folder_paths.folder_names_and_paths)
    for key in ("diffusion_models", "text_encoders"):
        folder = tmp_path / key
        (folder / "below").mkdir(parents=True)
        for name in ("a.safetensors", "b.gguf", "below/c.GGUF", "d.txt"):
            (folder / name).touch()
        registered[key] = ([str(folder)], registered[key][1])
    # As another pack may have registered it.
    registered["unet_gguf"] = (["elsewhere"], {".gguf"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", registered)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def options_of(schema) -> dict[str, list[str]]:
    return {field.id: list(field.options) for field in schema.inputs}


def test_the_model_loader_lists_gguf_files_only(folders):
    schema = LayerStreamGgufModelLoader.define_schema()
    assert schema.node_id == "LayerStreamGgufModelLoader"
    names = options_of(schema)["unet_name"]
    assert "b.gguf" in names and not any(name.endswith(("safetensors", "txt")) for name in names)


def test_the_clip_loader_lists_both_and_up_to_four(folders):
    schema = LayerStreamGgufClipLoader.define_schema()
    options = options_of(schema)
    assert schema.node_id == "LayerStreamGgufClipLoader"
    assert {"a.safetensors", "b.gguf"} <= set(options["clip_name1"]) and "d.txt" not in options["clip_name1"]
    for number in (2, 3, 4):
        assert options[f"clip_name{number}"] == ["none", *options["clip_name1"]]
    assert {"flux", "sd3", "wan", "qwen_image", "lumina2"} <= set(clip_types()) == set(options["type"])


def test_lists_of_others_stay_as_they_are(folders):
    before = {key: (list(paths), set(extensions)) for key, (paths, extensions) in _registered().items()}
    LayerStreamGgufModelLoader.define_schema()
    LayerStreamGgufClipLoader.define_schema()
    after = {key: (list(paths), set(extensions)) for key, (paths, extensions) in _registered().items()}
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {gguf_folders.DIFFUSION_MODELS, gguf_folders.TEXT_ENCODERS}
    assert folder_paths.get_filename_list("diffusion_models") == ["a.safetensors"]


def _registered():
    return folder_paths.folder_names_and_paths


def test_a_folder_that_is_added_later_is_listed(folders, tmp_path):
    LayerStreamGgufModelLoader.define_schema()
    more = tmp_path / "more"
    more.mkdir()
    (more / "late.gguf").touch()
    folder_paths.add_model_folder_path("diffusion_models", str(more))
    assert "late.gguf" in options_of(LayerStreamGgufModelLoader.define_schema())["unet_name"]


def test_a_chosen_file_is_loaded(folders, monkeypatch):
    detect_narrow(monkeypatch, "flux")
    path = folders / "diffusion_models" / "below" / "flux.gguf"
    write_gguf(path, narrow_weights("flux"), "flux")
    with torch.inference_mode():
        (model,) = LayerStreamGgufModelLoader.execute("below/flux.gguf").args
        assert torch.equal(sample_tiny(model, "flux"), sample_tiny(load_diffusion_model(path), "flux"))


def test_bad_choices_say_what_to_do(folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf is not in ComfyUI's folders for diffusion_models"):
        LayerStreamGgufModelLoader.execute("gone.gguf")
    with pytest.raises(GgufError, match=r"b\.gguf is empty: download it again"):
        LayerStreamGgufModelLoader.execute("b.gguf")
    with pytest.raises(GgufError, match=r"b\.gguf is empty"):
        LayerStreamGgufClipLoader.execute("b.gguf", "flux", clip_name2="b.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match="pip install gguf"):
        LayerStreamGgufModelLoader.execute("b.gguf")
