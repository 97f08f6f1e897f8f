"""diffusers' own denoisers of the families, with random weights of the published sizes and inputs of the same shapes
as the host's.

In: a `StepSpec` and a device. Out: a model of diffusers and a function that calls it as its pipeline would. Nothing
here streams. Sizes: https://github.com/huggingface/diffusers, the classes' own defaults and the published configs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.spec import StepSpec

if TYPE_CHECKING:
    import torch

PATCH = 2
GAIN_SPREAD, BIAS_SPREAD = 0.1, 0.05
SDXL_SIZES = (1024, 1024, 0, 0, 1024, 1024)
"""Original, crop and target of the picture that SDXL is told."""

Text = dict[str, "torch.Tensor"]
"""`tokens` of shape (batch, tokens, width) and, where a family takes it, `pooled` of shape (batch, width)."""


class Denoiser(NamedTuple):
    """A class of diffusers, its configuration, what of it makes a narrow model, and how its forward is called.

    `predict` takes the model, a latent (batch, channels, height, width), the noise level in 0..1 and the text, and
    gives a prediction of the latent's shape.
    """

    class_name: str
    configuration: dict[str, Any]
    narrow: dict[str, Any]
    channels: int
    text_width: str
    pooled_width: int | None
    predict: Callable[[Any, torch.Tensor, float, Text, StepSpec], torch.Tensor]


def random_model(denoiser: Denoiser, spec: StepSpec, dtype: torch.dtype, device: str) -> Any:
    """The model in evaluation mode with weights of `dtype` on `device`.

    A weight depends on its name and the device that draws it alone, so all models of a spec are equal. At no time is
    there more than one tensor beside the model's own.
    """
    import diffusers
    import torch
    from accelerate import init_empty_weights

    narrow = denoiser.narrow if spec.size == "narrow" else {}
    # Buffers and plain tensors are made for good: position tables are not weights.
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, denoiser.class_name)(**{**denoiser.configuration, **narrow})
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = _random_weight(f"{module_name}.{name}", parameter.shape, dtype, spec.device)
            setattr(module, name, torch.nn.Parameter(drawn.to(device), requires_grad=False))
    return model.to(device).eval()


def random_text(denoiser: Denoiser, model: Any, spec: StepSpec, dtype: torch.dtype) -> Text:
    """Random text of a prompt's usual length and of the model's own widths, on the spec's device."""
    import torch

    # The negative prompt is a second half of the batch, as in the library's pipelines.
    batch = spec.batch * (2 if spec.cfg > 1 else 1)
    # The device is named throughout: a library under test may have changed torch's default.
    generator = torch.Generator("cpu").manual_seed(spec.seed + 1)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (batch, spec.text.tokens, model.config[denoiser.text_width])}
    if denoiser.pooled_width is not None:
        shapes["pooled"] = (batch, denoiser.pooled_width)
    drawn = {name: torch.randn(shape, generator=generator, device="cpu") for name, shape in shapes.items()}
    return {name: values.to(spec.device, dtype) for name, values in drawn.items()}


def random_latent(denoiser: Denoiser, spec: StepSpec) -> torch.Tensor:
    """float32 noise (batch, channels, height, width) on the spec's device, the same on every card."""
    import torch

    _, height, width = spec.latent_size()
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    shape = (spec.batch, denoiser.channels, height, width)
    return torch.randn(shape, generator=generator, device="cpu").to(spec.device)


def _random_weight(name: str, shape: torch.Size, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values that keep activations of order one: gains around one, the rest by the number of inputs."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if len(shape) > 1:
        center, spread = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    else:
        center, spread = (1.0, GAIN_SPREAD) if name.endswith("weight") else (0.0, BIAS_SPREAD)
    return torch.empty(shape, dtype=dtype, device=device).normal_(center, spread, generator=generator)


def _levels(latent: torch.Tensor, noise: float) -> torch.Tensor:
    """The noise level for each picture of the batch."""
    return latent.new_full((latent.shape[0],), noise)


def _pack(latent: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) to one token for each patch, as the pipelines of FLUX and Qwen-Image do it."""
    batch, channels, height, width = latent.shape
    patches = latent.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def _unpack(tokens: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = latent.shape
    patches = tokens.view(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(latent.shape)


def _predict_zimage(model: Any, latent: torch.Tensor, noise: float, text: Text, spec: StepSpec) -> torch.Tensor:
    import torch

    pictures = list(latent.unsqueeze(2).unbind(0))
    (predictions,) = model(pictures, _levels(latent, 1 - noise), list(text["tokens"].unbind(0)), return_dict=False)
    return -torch.stack(predictions).squeeze(2)


def _predict_flux(model: Any, latent: torch.Tensor, noise: float, text: Text, spec: StepSpec) -> torch.Tensor:
    import torch

    rows, columns = latent.shape[2] // PATCH, latent.shape[3] // PATCH
    places = latent.new_zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows, device=latent.device)[:, None]
    places[..., 2] += torch.arange(columns, device=latent.device)[None, :]
    (tokens,) = model(
        hidden_states=_pack(latent),
        encoder_hidden_states=text["tokens"],
        pooled_projections=text["pooled"],
        timestep=_levels(latent, noise),
        img_ids=places.view(-1, 3),
        txt_ids=latent.new_zeros(text["tokens"].shape[1], 3),
        guidance=_levels(latent, spec.text.guidance or 0.0).float(),
        return_dict=False,
    )
    return _unpack(tokens, latent)


def _predict_qwen_image(model: Any, latent: torch.Tensor, noise: float, text: Text, spec: StepSpec) -> torch.Tensor:
    (tokens,) = model(
        hidden_states=_pack(latent),
        encoder_hidden_states=text["tokens"],
        timestep=_levels(latent, noise),
        img_shapes=[[(1, latent.shape[2] // PATCH, latent.shape[3] // PATCH)]] * latent.shape[0],
        return_dict=False,
    )
    return _unpack(tokens, latent)


def _predict_sdxl(model: Any, latent: torch.Tensor, noise: float, text: Text, spec: StepSpec) -> torch.Tensor:
    sizes = latent.new_tensor([SDXL_SIZES]).expand(latent.shape[0], -1)
    (prediction,) = model(
        latent,
        _levels(latent, round(noise * 999)).float(),
        encoder_hidden_states=text["tokens"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": sizes},
        return_dict=False,
    )
    return prediction


def weights(model: Any) -> Iterator[torch.Tensor]:
    """All parameters and buffers, in whatever place they are now."""
    yield from model.parameters()
    yield from model.buffers()


DENOISERS: dict[str, Denoiser] = {
    "zimage": Denoiser("ZImageTransformer2DModel", {}, {"n_layers": 2}, 16, "cap_feat_dim", None, _predict_zimage),
    "flux": Denoiser(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"num_layers": 1, "num_single_layers": 5},
        16,
        "joint_attention_dim",
        768,
        _predict_flux,
    ),
    "qwen-image": Denoiser(
        "QwenImageTransformer2DModel", {}, {"num_layers": 3}, 16, "joint_attention_dim", None, _predict_qwen_image
    ),
    "sdxl": Denoiser(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"transformer_layers_per_block": (1, 1, 2)},
        4,
        "cross_attention_dim",
        1280,
        _predict_sdxl,
    ),
}
"""By the benchmark's names of families."""
