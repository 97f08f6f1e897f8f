"""Streaming Report: what streamed, as a picture and as text, to be saved with the image that it made."""

from __future__ import annotations

import time
from typing import Any

import numpy
import torch
from comfy_api.latest import io


class StreamingReport(io.ComfyNode):
    """Takes anything, so that it runs after it, and gives a picture of the run so far and its figures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamReport",
            display_name="Streaming Report",
            category="advanced/layerstream",
            description=(
                "Draws what LayerStream did: the card's memory over time, the traffic over the link, each model's "
                "blocks. Connect what it shall wait for, such as the finished image."
            ),
            inputs=[
                io.AnyType.Input("after", tooltip="What the report waits for: the latent or the image of the run."),
                io.Int.Input(
                    "width", default=1024, min=640, max=4096, step=64, tooltip="Width of the picture in pixels."
                ),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture"),
                io.String.Output("text", display_name="text"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """Each run has a report of its own, whatever of it is cached."""
        return time.time()

    @classmethod
    def execute(cls, after: Any, width: int) -> io.NodeOutput:
        # Pillow's drawing is loaded only by those who want pictures.
        from ..streaming.host.report_picture import draw_report
        from ..streaming.host.report_text import report_text
        from ..streaming.host.routes import full_state, recorder_of_server

        state = full_state(recorder_of_server())
        pixels = numpy.asarray(draw_report(state, width), dtype=numpy.float32) / 255.0
        text = report_text(state)
        return io.NodeOutput(torch.from_numpy(pixels).unsqueeze(0), text, ui={"text": [text]})
