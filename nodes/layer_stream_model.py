"""Layer-Stream Model: stream a diffusion model's blocks while sampling."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..streaming.host.gguf_patches import streaming_patcher_for
from ..streaming.host.patcher import NothingToStream
from ..streaming.host.settings import MOST_PREFETCH, Mode, StreamingSettings
from .vram_budget import budget_input

logger = logging.getLogger("layerstream")


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
                io.Combo.Input(
                    "mode",
                    options=[mode.value for mode in Mode],
                    default=Mode.AUTO.value,
                    tooltip=(
                        "auto: keep as much on the card as fits and stream the rest. always: stream every block, for "
                        "the smallest use of the card. off: leave the model as it is."
                    ),
                ),
                io.Int.Input(
                    "prefetch_blocks",
                    default=0,
                    min=0,
                    max=MOST_PREFETCH,
                    tooltip=(
                        "How many of the largest blocks are fetched ahead of the one that computes. More evens out "
                        "uneven blocks and takes more of the card. 0: what measures best."
                    ),
                ),
                io.Float.Input(
                    "vram_gb",
                    default=0.0,
                    min=-64.0,
                    max=256.0,
                    step=0.1,
                    tooltip=(
                        "Most GiB of the card that this model's weights may take. 0: all that is free, with room left "
                        "for the work. Negative: what is free less that many GiB."
                    ),
                ),
                io.Int.Input(
                    "min_free_mb",
                    default=256,
                    min=0,
                    max=65536,
                    step=64,
                    tooltip="MiB of the card that always stay free for everything else.",
                ),
                budget_input(),
            ],
            outputs=[io.Model.Output("model_out", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model, mode: str, prefetch_blocks: int, vram_gb: float, min_free_mb: int, budget=None
    ) -> io.NodeOutput:
        settings = StreamingSettings(Mode(mode), prefetch_blocks, vram_gb, min_free_mb, budget=budget)
        if settings.mode is Mode.OFF:
            return io.NodeOutput(model)
        try:
            return io.NodeOutput(streaming_patcher_for(model).from_patcher(model, settings))
        except NothingToStream as reason:
            logger.warning("LayerStream: the model passes through unchanged: %s", reason)
            return io.NodeOutput(model)
