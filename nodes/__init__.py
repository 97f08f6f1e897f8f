"""What a person drags: one file a node."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .layer_stream_clip import LayerStreamClip
from .layer_stream_model import LayerStreamModel
from .load_clip_gguf import LayerStreamGgufClipLoader
from .load_diffusion_model_gguf import LayerStreamGgufModelLoader
from .offload_policy import OffloadPolicy
from .streaming_report import StreamingReport
from .vram_budget import VramBudget


class LayerStreamExtension(ComfyExtension):
    """The pack's nodes; registering its routes here, since ComfyUI 0.3.75 never calls `on_load`."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from server import PromptServer

        from ..streaming.host.routes import register_routes

        register_routes(PromptServer.instance)
        return [
            LayerStreamModel,
            LayerStreamClip,
            OffloadPolicy,
            VramBudget,
            LayerStreamGgufModelLoader,
            LayerStreamGgufClipLoader,
            StreamingReport,
        ]
