"""ComfyUI-LayerStream: run diffusion models that are larger than the graphics card."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's door to the pack's nodes."""
    from .nodes import LayerStreamExtension

    return LayerStreamExtension()
