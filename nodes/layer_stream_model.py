"""Layer-Stream Model: stream a diffusion model's blocks while sampling."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..streaming.host.gguf_patches import streaming_patcher_for
from ..streaming.host.settings import Mode, StreamingSettings
from .widgets import streamed_or_unchanged, streaming_inputs


class LayerStreamModel(io.ComfyNode):
    """Takes a MODEL and gives the same MODEL, streamed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamModel",
            display_name="Layer-Stream Model",
            category="advanced/layerstream",
            description=(
                "Runs a model that is larger than your graphics card: its blocks stay in RAM and travel to the card "
                "while it computes. The image is exactly the same."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to stream. LoRAs may come before or after this node."),
                *streaming_inputs("model", "blocks"),
            ],
            outputs=[io.Model.Output("model_out", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model, mode: str, prefetch_blocks: int, vram_gb: float, min_free_mb: int, budget=None
    ) -> io.NodeOutput:
        settings = StreamingSettings(Mode(mode), prefetch_blocks, vram_gb, min_free_mb, budget=budget)
        return streamed_or_unchanged("model", model, _stream, settings)


def _stream(model: Any, settings: StreamingSettings) -> Any:
    return streaming_patcher_for(model).from_patcher(model, settings)
