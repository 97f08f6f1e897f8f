"""Offload Policy: text encoder, diffusion model and VAE make way for each other."""

from __future__ import annotations

from comfy_api.latest import io

from ..streaming.host.govern import Parts, govern
from ..streaming.host.policy import Estimation, PolicyMode, PolicySettings, Switch
from .widgets import budget_input

SWITCHES = [switch.value for switch in Switch]


class OffloadPolicy(io.ComfyNode):
    """Takes model, clip and vae and gives the same, governed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamOffloadPolicy",
            display_name="Offload Policy",
            category="advanced/layerstream",
            description=(
                "Moves the text encoder, the model and the VAE out of each other's way, so that the whole workflow "
                "fits the graphics card and starts at once the next time. The image is exactly the same."
            ),
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The model that samples."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder. Connect the model as well."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that encodes and decodes the images."),
                io.Combo.Input(
                    "mode",
                    options=[mode.value for mode in PolicyMode],
                    default=PolicyMode.AUTO.value,
                    tooltip=(
                        "auto: move only what the next step has no room beside. none: leave all to ComfyUI. cond_only: "
                        "the text encoder leaves the card once the prompts are encoded. cond_diffusion: the model "
                        "leaves too once it has sampled. aggressive: everything leaves as soon as it is idle. "
                        "layer_streaming: the model streams from RAM, the text encoder leaves before sampling."
                    ),
                ),
                _switch("offload_cond_stage", "Whether the text encoder leaves the card. auto: as the mode says."),
                _switch("offload_diffusion", "Whether the model leaves the card. auto: as the mode says."),
                _switch(
                    "reload_cond_stage",
                    "How the text encoder comes back. auto: when it is needed. on: as soon as the image is decoded and "
                    "there is room. off: not at all, it streams from RAM whenever it is needed.",
                ),
                _switch("reload_diffusion", "How the model comes back, in the same words."),
                io.Combo.Input(
                    "estimation",
                    options=[estimation.value for estimation in Estimation],
                    default=Estimation.FORMULA.value,
                    tooltip=(
                        "How it is known what a step needs of the card until it ran once and was measured. formula: "
                        "ComfyUI's own numbers. dryrun: the step is played through without using the card."
                    ),
                ),
                io.Boolean.Input("log", default=True, tooltip="Say in the log what moved, and how fast."),
                budget_input(),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model"),
                io.Clip.Output("clip_out", display_name="clip"),
                io.Vae.Output("vae_out", display_name="vae"),
            ],
        )

    @classmethod
    def execute(
        cls,
        mode: str,
        offload_cond_stage: str,
        offload_diffusion: str,
        reload_cond_stage: str,
        reload_diffusion: str,
        estimation: str,
        log: bool,
        model=None,
        clip=None,
        vae=None,
        budget=None,
    ) -> io.NodeOutput:
        settings = PolicySettings(
            PolicyMode(mode),
            Switch(offload_cond_stage),
            Switch(offload_diffusion),
            Switch(reload_cond_stage),
            Switch(reload_diffusion),
            Estimation(estimation),
            log,
        )
        return io.NodeOutput(*govern(Parts(model, clip, vae), settings, budget))


def _switch(name: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=SWITCHES, default=Switch.AUTO.value, tooltip=tooltip)
