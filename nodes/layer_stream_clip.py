"""Layer-Stream CLIP: stream a text encoder's layers while it encodes."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..streaming.host.patcher import NothingToStream
from ..streaming.host.settings import MOST_PREFETCH, Mode, StreamingSettings
from ..streaming.host.staged import streamed_text
from .vram_budget import budget_input

logger = logging.getLogger("layerstream")


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
                io.Combo.Input(
                    "mode",
                    options=[mode.value for mode in Mode],
                    default=Mode.AUTO.value,
                    tooltip=(
                        "auto: keep as much on the card as fits and stream the rest. always: stream every layer, for "
                        "the smallest use of the card. off: leave the text encoder as it is."
                    ),
                ),
                io.Int.Input(
                    "prefetch_blocks",
                    default=0,
                    min=0,
                    max=MOST_PREFETCH,
                    tooltip="How many of the largest layers are fetched ahead of the one that computes. 0: chosen.",
                ),
                io.Float.Input(
                    "vram_gb",
                    default=0.0,
                    min=-64.0,
                    max=256.0,
                    step=0.1,
                    tooltip=(
                        "Most GiB of the card that the text encoder may take. 0: all that is free, with room left for "
                        "the work. Negative: what is free less that many GiB."
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
            outputs=[io.Clip.Output("clip_out", display_name="clip")],
        )

    @classmethod
    def execute(
        cls, clip, mode: str, prefetch_blocks: int, vram_gb: float, min_free_mb: int, budget=None
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("there is no text encoder: the checkpoint has none, so load one with a CLIP loader")
        settings = StreamingSettings(Mode(mode), prefetch_blocks, vram_gb, min_free_mb, budget=budget)
        if settings.mode is Mode.OFF:
            return io.NodeOutput(clip)
        try:
            return io.NodeOutput(streamed_text(clip, settings))
        except NothingToStream as reason:
            logger.warning("LayerStream: the text encoder passes through unchanged: %s", reason)
            return io.NodeOutput(clip)
