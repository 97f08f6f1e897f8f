"""The tensors of diffusion transformers' files, by family.

Names and shapes are those of the published files, which both supported ComfyUI versions load without conversion:
Z-Image as single-file checkpoints of Tongyi-MAI's model hold it (ComfyUI's `NextDiT`), FLUX.1-dev as Black Forest
Labs publish it (norm gains end in `.scale`), Qwen-Image as its `transformer` folder has it, in one file.
"""

from .tensors import TensorLayout, linear, norm, scale

LATENT_CHANNELS = 16
PATCH_WIDTH = LATENT_CHANNELS * 2 * 2
TIMESTEP_WIDTH = 256

ZIMAGE_WIDTH = 3840
ZIMAGE_HEAD_WIDTH = 128
ZIMAGE_MLP_WIDTH = 10240
ZIMAGE_MODULATION_WIDTH = 256
ZIMAGE_REFINERS = 2

FLUX_WIDTH = 3072
FLUX_HEAD_WIDTH = 128
FLUX_MLP_WIDTH = 4 * FLUX_WIDTH
FLUX_TEXT_WIDTH = 4096
FLUX_POOLED_WIDTH = 768

QWEN_WIDTH = 3072
QWEN_HEAD_WIDTH = 128
QWEN_MLP_WIDTH = 4 * QWEN_WIDTH
QWEN_TEXT_WIDTH = 3584


def zimage(*, layers: int, text_width: int) -> list[TensorLayout]:
    """Z-Image with `layers` main blocks, conditioned on text vectors of `text_width` (2560 in the published file).

    ComfyUI knows the family by its width and fixes all other sizes from it, so only these two may differ.
    """
    timestep_hidden = 1024
    tensors = linear("x_embedder", PATCH_WIDTH, ZIMAGE_WIDTH)
    tensors += linear("t_embedder.mlp.0", TIMESTEP_WIDTH, timestep_hidden)
    tensors += linear("t_embedder.mlp.2", timestep_hidden, ZIMAGE_MODULATION_WIDTH, gain=2.0)
    tensors += norm("cap_embedder.0", text_width) + linear("cap_embedder.1", text_width, ZIMAGE_WIDTH)
    for token in ("x_pad_token", "cap_pad_token"):
        tensors.append(TensorLayout(token, (1, ZIMAGE_WIDTH), 0.0, 1.0))
    for index in range(ZIMAGE_REFINERS):
        tensors += _zimage_block(f"noise_refiner.{index}", modulated=True)
        tensors += _zimage_block(f"context_refiner.{index}", modulated=False)
    for index in range(layers):
        tensors += _zimage_block(f"layers.{index}", modulated=True)
    tensors += linear("final_layer.adaLN_modulation.1", ZIMAGE_MODULATION_WIDTH, ZIMAGE_WIDTH, gain=0.5)
    tensors += linear("final_layer.linear", ZIMAGE_WIDTH, PATCH_WIDTH)
    return tensors


def _zimage_block(name: str, *, modulated: bool) -> list[TensorLayout]:
    tensors = linear(f"{name}.attention.qkv", ZIMAGE_WIDTH, 3 * ZIMAGE_WIDTH, bias=False)
    tensors += linear(f"{name}.attention.out", ZIMAGE_WIDTH, ZIMAGE_WIDTH, bias=False)
    tensors += norm(f"{name}.attention.q_norm", ZIMAGE_HEAD_WIDTH) + norm(f"{name}.attention.k_norm", ZIMAGE_HEAD_WIDTH)
    tensors += linear(f"{name}.feed_forward.w1", ZIMAGE_WIDTH, ZIMAGE_MLP_WIDTH, bias=False)
    tensors += linear(f"{name}.feed_forward.w2", ZIMAGE_MLP_WIDTH, ZIMAGE_WIDTH, bias=False)
    tensors += linear(f"{name}.feed_forward.w3", ZIMAGE_WIDTH, ZIMAGE_MLP_WIDTH, bias=False)
    for sublayer in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        tensors += norm(f"{name}.{sublayer}", ZIMAGE_WIDTH)
    if modulated:
        tensors += linear(f"{name}.adaLN_modulation.0", ZIMAGE_MODULATION_WIDTH, 4 * ZIMAGE_WIDTH, gain=0.5)
    return tensors


def flux(*, double: int, single: int) -> list[TensorLayout]:
    """FLUX.1-dev with `double` two-stream and `single` one-stream blocks (19 and 38 in the published file)."""
    tensors = linear("img_in", PATCH_WIDTH, FLUX_WIDTH) + linear("txt_in", FLUX_TEXT_WIDTH, FLUX_WIDTH)
    for name, inputs in (
        ("time_in", TIMESTEP_WIDTH),
        ("vector_in", FLUX_POOLED_WIDTH),
        ("guidance_in", TIMESTEP_WIDTH),
    ):
        tensors += linear(f"{name}.in_layer", inputs, FLUX_WIDTH) + linear(f"{name}.out_layer", FLUX_WIDTH, FLUX_WIDTH)
    for index in range(double):
        tensors += _flux_stream(f"double_blocks.{index}.img") + _flux_stream(f"double_blocks.{index}.txt")
    for index in range(single):
        tensors += _flux_single_block(f"single_blocks.{index}")
    tensors += linear("final_layer.adaLN_modulation.1", FLUX_WIDTH, 2 * FLUX_WIDTH, gain=0.5)
    tensors += linear("final_layer.linear", FLUX_WIDTH, PATCH_WIDTH)
    return tensors


def _flux_stream(name: str) -> list[TensorLayout]:
    tensors = linear(f"{name}_mod.lin", FLUX_WIDTH, 6 * FLUX_WIDTH, gain=0.5)
    tensors += linear(f"{name}_attn.qkv", FLUX_WIDTH, 3 * FLUX_WIDTH)
    tensors += scale(f"{name}_attn.norm.query_norm", FLUX_HEAD_WIDTH)
    tensors += scale(f"{name}_attn.norm.key_norm", FLUX_HEAD_WIDTH)
    tensors += linear(f"{name}_attn.proj", FLUX_WIDTH, FLUX_WIDTH)
    tensors += linear(f"{name}_mlp.0", FLUX_WIDTH, FLUX_MLP_WIDTH)
    tensors += linear(f"{name}_mlp.2", FLUX_MLP_WIDTH, FLUX_WIDTH)
    return tensors


def _flux_single_block(name: str) -> list[TensorLayout]:
    tensors = linear(f"{name}.modulation.lin", FLUX_WIDTH, 3 * FLUX_WIDTH, gain=0.5)
    tensors += linear(f"{name}.linear1", FLUX_WIDTH, 3 * FLUX_WIDTH + FLUX_MLP_WIDTH)
    tensors += linear(f"{name}.linear2", FLUX_WIDTH + FLUX_MLP_WIDTH, FLUX_WIDTH)
    tensors += scale(f"{name}.norm.query_norm", FLUX_HEAD_WIDTH) + scale(f"{name}.norm.key_norm", FLUX_HEAD_WIDTH)
    return tensors


def qwen_image(*, layers: int) -> list[TensorLayout]:
    """Qwen-Image with `layers` two-stream blocks (60 in the published file)."""
    tensors = linear("img_in", PATCH_WIDTH, QWEN_WIDTH)
    tensors += norm("txt_norm", QWEN_TEXT_WIDTH) + linear("txt_in", QWEN_TEXT_WIDTH, QWEN_WIDTH)
    embedder = "time_text_embed.timestep_embedder"
    tensors += linear(f"{embedder}.linear_1", TIMESTEP_WIDTH, QWEN_WIDTH)
    tensors += linear(f"{embedder}.linear_2", QWEN_WIDTH, QWEN_WIDTH)
    for index in range(layers):
        tensors += _qwen_block(f"transformer_blocks.{index}")
    tensors += linear("norm_out.linear", QWEN_WIDTH, 2 * QWEN_WIDTH, gain=0.5)
    tensors += linear("proj_out", QWEN_WIDTH, PATCH_WIDTH)
    return tensors


def _qwen_block(name: str) -> list[TensorLayout]:
    tensors: list[TensorLayout] = []
    for stream in ("img", "txt"):
        tensors += linear(f"{name}.{stream}_mod.1", QWEN_WIDTH, 6 * QWEN_WIDTH, gain=0.5)
        tensors += linear(f"{name}.{stream}_mlp.net.0.proj", QWEN_WIDTH, QWEN_MLP_WIDTH)
        tensors += linear(f"{name}.{stream}_mlp.net.2", QWEN_MLP_WIDTH, QWEN_WIDTH)
    for projection in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        tensors += linear(f"{name}.attn.{projection}", QWEN_WIDTH, QWEN_WIDTH)
    for gains in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        tensors += norm(f"{name}.attn.{gains}", QWEN_HEAD_WIDTH)
    return tensors
