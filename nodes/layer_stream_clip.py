"""Layer-Stream CLIP: stream a text encoder's layers while it encodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..streaming.host.settings import Mode, StreamingSettings
from ..streaming.host.staged import streamed_text
from .widgets import streamed_or_unchanged, streaming_inputs


class LayerStreamClip(io.ComfyNode):
    """Takes a CLIP and gives the same CLIP, streamed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamClip",
            display_name="Layer-Stream CLIP",
            category="advanced/layerstream",
            description=(
                "Runs a text encoder that is larger than your graphics card: its layers stay in RAM and travel to the "
                "card while it encodes. The conditioning is exactly the same."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder to stream. LoRAs may come before or after this node."),
                *streaming_inputs("text encoder", "layers"),
            ],
            outputs=[io.Clip.Output("clip_out", display_name="clip")],
        )

    @classmethod
    def execute(
        cls, clip, mode: str, prefetch_blocks: int, vram_gb: float, min_free_mb: int, budget=None
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("there is no text encoder: the checkpoint has none, so load one with a CLIP loader")
        settings = StreamingSettings(Mode(mode), prefetch_blocks, vram_gb, min_free_mb, budget=budget)
        return streamed_or_unchanged("text encoder", clip, streamed_text, settings)
