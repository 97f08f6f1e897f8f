"""Load CLIP (GGUF, streamed): one to four text encoders, at least one of them as its GGUF file has it."""

from __future__ import annotations

import importlib

from comfy_api.latest import io

from .gguf_folders import TEXT_ENCODERS, list_files, loading, path_of

NONE = "none"
MOST_ENCODERS = 4


class LayerStreamGgufClipLoader(io.ComfyNode):
    """Gives a CLIP of the chosen files, GGUF or safetensors, in any order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = list_files(TEXT_ENCODERS, "text_encoders")
        more = [
            io.Combo.Input(
                f"clip_name{number}",
                options=[NONE, *files],
                default=NONE,
                optional=True,
                tooltip="A further encoder of this model, or the vision tower (mmproj) of one.",
            )
            for number in range(2, MOST_ENCODERS + 1)
        ]
        return io.Schema(
            node_id="LayerStreamGgufClipLoader",
            display_name="Load CLIP (GGUF, streamed)",
            category="advanced/layerstream",
            description=(
                "Loads one to four text encoders from GGUF files, or some from safetensors files. Their weights "
                "rest as small as they are in the file."
            ),
            inputs=[
                io.Combo.Input(
                    "clip_name1",
                    options=files,
                    tooltip="A .gguf or .safetensors file in models/text_encoders or models/clip.",
                ),
                io.Combo.Input("type", options=clip_types(), tooltip="The model that the encoders are for."),
                *more,
            ],
            outputs=[io.Clip.Output("clip_out", display_name="clip")],
        )

    @classmethod
    def execute(
        cls, clip_name1: str, type: str, clip_name2: str = NONE, clip_name3: str = NONE, clip_name4: str = NONE
    ) -> io.NodeOutput:
        names = [name for name in (clip_name1, clip_name2, clip_name3, clip_name4) if name != NONE]
        paths = [path_of(TEXT_ENCODERS, name, "text_encoders") for name in names]
        return io.NodeOutput(loading().load_text_encoders(paths, type))


def clip_types() -> list[str]:
    """What ComfyUI's own loaders of one and of two encoders offer."""
    host_nodes = importlib.import_module("nodes")  # this pack has a `nodes` of its own
    loaders = (host_nodes.CLIPLoader, host_nodes.DualCLIPLoader)
    offered = [name for loader in loaders for name in loader.INPUT_TYPES()["required"]["type"][0]]
    return list(dict.fromkeys(offered))
