"""The example workflows as prompts that a processor runs in seconds, on the narrow files of `workflow_models`.

Sizes, lengths and steps shrink; every sampled latent is saved beside the pictures, since pixels round differences away.
Text encoders are the one part that cannot be narrow: a CLIP-L stands for each, and what follows it is fitted:

- Loaders of one file accept a CLIP-L in every place. The node in `WIDEN_PACK` repeats its vectors to the width that the
  model wants, where the narrow model does not want CLIP-L's own.
- Loaders of two and three files would build T5 whatever they are given, unless they are told that the files are for
  SD3: then they build what the files hold and pad its vectors to T5's width.
"""

from __future__ import annotations

from pathlib import Path

from .example import STREAMING_NODE, half_resident_budget, workflow_of
from .pack import ROOT
from .workflow import ObjectInfo, Prompt, to_prompt
from .workflow_models import T5_WIDTH

WIDEN_PACK = ROOT / "tests" / "host" / "widen_conditioning.py"
WIDEN_NODE = "WidenConditioning"
TEXT_WIDTHS = {"qwen_image": 3584, "ltx_video": T5_WIDTH, "wan21": T5_WIDTH, "wan22": T5_WIDTH}

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
STEPS = 2
STEP_INPUTS = ("steps", "start_at_step", "end_at_step")
# 25 image tokens, which Z-Image pads to 32 so that its pad tokens matter.
PIXELS = {"width": 80, "height": 80}
SMALLER_PIXELS = {"width": 64, "height": 64}
SIZES: dict[str, dict[str, int]] = {
    "EmptySD3LatentImage": PIXELS,
    "EmptyLatentImage": SMALLER_PIXELS,
    "EmptyFlux2LatentImage": SMALLER_PIXELS,
    "Flux2Scheduler": SMALLER_PIXELS,
    # Two latent frames each.
    "EmptyLTXVLatentVideo": {**SMALLER_PIXELS, "length": 9},
    "EmptyHunyuanLatentVideo": {**SMALLER_PIXELS, "length": 5},
    # The least that the node takes.
    "StableCascade_EmptyLatentImage": {"width": 256, "height": 256},
}


def small_example(name: str, object_info: ObjectInfo, files: dict[str, Path], *, mode: str) -> Prompt:
    """The example workflow `name` as a small prompt with its streaming nodes in `mode`.

    `files` are the narrow models by their place; about half of each diffusion model streams unless the mode is "off".

    Raises:
        WorkflowError: the server lacks one of the workflow's nodes or inputs.
    """
    prompt = to_prompt(workflow_of(name), object_info)
    _shrink(prompt)
    _fit_text_encoders(prompt, TEXT_WIDTHS.get(name))
    for node in prompt.values():
        if node["class_type"] == STREAMING_NODE:
            budget = half_resident_budget(_file_of(prompt, node["inputs"]["model"][0], files))
            node["inputs"].update(mode=mode, vram_gb=budget.vram_gib, min_free_mb=0)
    for sampler in [key for key, node in prompt.items() if node["class_type"] in SAMPLERS]:
        saved = {"samples": [sampler, 0], "filename_prefix": f"latents/{name}"}
        prompt[f"latent-{sampler}"] = {"class_type": "SaveLatent", "inputs": saved}
    return prompt


def _shrink(prompt: Prompt) -> None:
    """Replace sizes, and steps so that each sampler keeps its share of them."""
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update(SIZES.get(node["class_type"], {}))
        all_steps = inputs.get("steps", STEPS)
        inputs.update({key: inputs[key] * STEPS // all_steps for key in STEP_INPUTS if key in inputs})


def _fit_text_encoders(prompt: Prompt, width: int | None) -> None:
    for node in prompt.values():
        if node["class_type"] == "TripleCLIPLoader":
            # It has no type to set, and builds all three encoders.
            node["class_type"] = "DualCLIPLoader"
            del node["inputs"]["clip_name3"]
        if node["class_type"] == "DualCLIPLoader":
            node["inputs"]["type"] = "sd3"
    if width is None:
        return
    for key in [key for key, node in prompt.items() if node["class_type"] == "CLIPTextEncode"]:
        for node in prompt.values():
            inputs = node["inputs"]
            inputs.update({name: [f"wide-{key}", 0] for name, value in inputs.items() if value == [key, 0]})
        prompt[f"wide-{key}"] = {"class_type": WIDEN_NODE, "inputs": {"conditioning": [key, 0], "width": width}}


def _file_of(prompt: Prompt, loader: str, files: dict[str, Path]) -> Path:
    """The file that a model loader names."""
    inputs = prompt[loader]["inputs"]
    name = inputs["unet_name"] if "unet_name" in inputs else inputs["ckpt_name"]
    (file,) = [file for place, file in files.items() if place.endswith(f"/{name}")]
    return file
