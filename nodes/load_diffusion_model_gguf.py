"""Load Diffusion Model (GGUF, streamed): a MODEL whose weights stay as their file has them."""

from __future__ import annotations

from comfy_api.latest import io

from .gguf_folders import DIFFUSION_MODELS, list_files, loading, path_of


class LayerStreamGgufModelLoader(io.ComfyNode):
    """Gives a MODEL, to be streamed by Layer-Stream Model or used as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamGgufModelLoader",
            display_name="Load Diffusion Model (GGUF, streamed)",
            category="advanced/layerstream",
            description=(
                "Loads a diffusion model from a GGUF file. Its weights rest and travel as small as in the file, "
                "and become numbers on the card when their layer runs. Connect Layer-Stream Model to stream what does "
                "not fit."
            ),
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=list_files(DIFFUSION_MODELS),
                    tooltip="A .gguf file in models/diffusion_models or models/unet.",
                )
            ],
            outputs=[io.Model.Output("model_out", display_name="model")],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        return io.NodeOutput(loading().load_diffusion_model(path_of(DIFFUSION_MODELS, unet_name)))
