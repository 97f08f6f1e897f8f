"""Control models beside a streamed one: what they find comes between its blocks, some of it out of its own weights."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.model_management
import comfy.ops
import comfy.t2i_adapter.adapter
import pytest
import torch
from comfy.controlnet import ControlLora, ControlNet, T2IAdapter

from loras import apply, make_lora
from plugged import assert_equal_streamed, node
from scripts.model_configurations import MODELS
from scripts.tiny_models import fill, is_newer_host

WIDTHS = {"dtype": torch.bfloat16, "operations": comfy.ops.manual_cast}


def settings(name: str) -> dict:
    known = MODELS[name].settings(narrow=True, is_newer=is_newer_host())
    return {key: value for key, value in known.items() if key not in ("image_model", "out_channels", "num_blocks")}


def loads() -> dict:
    return {"load_device": comfy.model_management.get_torch_device(), "manual_cast_dtype": torch.float32}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    fill(module, seed=3)
    return module


def control_of_unet(name: str) -> ControlNet:
    control = comfy.cldm.cldm.ControlNet(**settings(name), hint_channels=3, **WIDTHS)
    return ControlNet(filled(control), **loads())


def control_of_flux(name: str) -> ControlNet:
    few = {"depth": 2, "depth_single_blocks": 2, "out_channels": 16}
    control = comfy.ldm.flux.controlnet.ControlNetFlux(**{**settings(name), **few}, **WIDTHS)
    return ControlNet(filled(control), extra_conds=["y", "guidance"], **loads())


def control_of_sd3(name: str) -> ControlNet:
    control = comfy.cldm.mmdit.ControlNet(num_blocks=2, **settings(name), **WIDTHS)
    return ControlNet(filled(control), compression_ratio=1, **loads())


def control_of_qwen(name: str) -> ControlNet:
    few = {**settings(name), "num_layers": 2}
    control = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(**few, **WIDTHS)
    return ControlNet(filled(control), compression_ratio=1, extra_conds=[], **loads())


def adapter(name: str) -> T2IAdapter:
    width = MODELS[name].narrow["model_channels"]
    model = comfy.t2i_adapter.adapter.Adapter(
        cin=192, channels=[width, 2 * width, 4 * width, 4 * width], nums_rb=2, ksize=1, sk=True,
        use_conv=False, xl=False,
    )  # fmt: skip
    return T2IAdapter(filled(model), model.input_channels, 8, "nearest-exact")


def control_lora(name: str) -> ControlLora:
    """A control model that is the model's own first half, with small changes."""
    control = filled(comfy.cldm.cldm.ControlNet(**settings(name), hint_channels=3, dtype=torch.float32))
    weights = {"lora_controlnet": torch.zeros(0)}
    for key, weight in control.state_dict().items():
        if not key.startswith(("input_blocks", "middle_block.", "time_embed", "label_emb")):
            weights[key] = weight
        elif weight.ndim == 2:
            base = key.removesuffix(".weight")
            generator = torch.Generator().manual_seed(len(weights))
            weights[f"{base}.up"] = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
            weights[f"{base}.down"] = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
    return ControlLora(weights)


CONTROLS = [
    ("sd15", control_of_unet, (64, 64, 3)),
    ("sdxl", control_of_unet, (64, 64, 3)),
    ("flux", control_of_flux, (64, 64, 3)),
    ("sd3", control_of_sd3, (12, 12, 16)),
    ("qwen-image", control_of_qwen, (1, 12, 12, 16)),
    ("sd15", adapter, (128, 128, 3)),
    ("sd15", control_lora, (64, 64, 3)),
]


def controlled_by(control, image: tuple[int, ...]):
    """A change of conditioning as the node Apply ControlNet makes it."""

    def change(positive, negative):
        return node(
            "nodes",
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=control,
            image=torch.rand(1, *image, generator=torch.Generator().manual_seed(7)),
            strength=0.8,
            start_percent=0.0,
            end_percent=0.9,
        )

    return change


@pytest.mark.parametrize(("name", "control", "image"), CONTROLS, ids=lambda value: getattr(value, "__name__", value))
def test_a_control_model_gives_the_same_bits_on_a_streamed_model(name, control, image):
    with torch.inference_mode():
        change = controlled_by(control(name), image)
    assert_equal_streamed(name, change=change)


def test_a_control_lora_is_made_of_patched_weights_too():
    """It copies the model's weights at each run, LoRAs and all, from wherever they are."""
    with torch.inference_mode():
        change = controlled_by(control_lora("sdxl"), (64, 64, 3))
    assert_equal_streamed("sdxl", lambda model: apply(model, make_lora(model, seed=1), 0.7), change)
