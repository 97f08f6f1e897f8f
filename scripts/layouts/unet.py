"""The tensors of SDXL's UNet file.

Names and shapes are those of the UNet in Stability AI's `sd_xl_base_1.0`, without its `model.diffusion_model.` prefix,
as files with a diffusion model alone have them: a three-level convolutional UNet whose two lower levels hold
transformers, conditioned on text of width 2048 and on one vector of pooled text and picture sizes.
"""

from typing import NamedTuple

from .tensors import TensorLayout, convolution, linear, norm

LATENT_CHANNELS = 4
BASE_WIDTH = 320
LEVEL_WIDTHS = (320, 640, 1280)
EMBEDDING_WIDTH = 4 * BASE_WIDTH
TEXT_WIDTH = 2048
POOLED_WIDTH = 1280
SIZES_WIDTH = 6 * 256
"""Height and width of the original, the crop and the target, 256 sinusoids each."""


class UNetDepth(NamedTuple):
    """Transformer blocks of each transformer on the way down, in the middle, and on the way up, level by level.

    ComfyUI knows the family by `down` and takes the other two as the file has them.
    """

    down: tuple[int, int, int]
    middle: int
    up: tuple[int, int, int]


def sdxl(depth: UNetDepth) -> list[TensorLayout]:
    """SDXL's UNet; the published file has `UNetDepth((0, 2, 10), 10, (0, 2, 10))`."""
    tensors = linear("time_embed.0", BASE_WIDTH, EMBEDDING_WIDTH)
    tensors += linear("time_embed.2", EMBEDDING_WIDTH, EMBEDDING_WIDTH)
    tensors += linear("label_emb.0.0", POOLED_WIDTH + SIZES_WIDTH, EMBEDDING_WIDTH)
    tensors += linear("label_emb.0.2", EMBEDDING_WIDTH, EMBEDDING_WIDTH)
    down, skipped_widths = _down(depth.down)
    tensors += down
    width = LEVEL_WIDTHS[-1]
    tensors += _residual_block("middle_block.0", width, width)
    tensors += _transformer("middle_block.1", width, depth.middle)
    tensors += _residual_block("middle_block.2", width, width)
    tensors += _up(depth.up, skipped_widths)
    return [*tensors, *norm("out.0", BASE_WIDTH, bias=True), *convolution("out.2", BASE_WIDTH, LATENT_CHANNELS)]


def _down(depths: tuple[int, int, int]) -> tuple[list[TensorLayout], list[int]]:
    """The input blocks, and the width that each hands across to the output blocks."""
    tensors = convolution("input_blocks.0.0", LATENT_CHANNELS, BASE_WIDTH)
    widths = [BASE_WIDTH]
    for level, (width, depth) in enumerate(zip(LEVEL_WIDTHS, depths, strict=True)):
        for _ in range(2):
            name = f"input_blocks.{len(widths)}"
            tensors += _residual_block(f"{name}.0", widths[-1], width) + _transformer(f"{name}.1", width, depth)
            widths.append(width)
        if level < len(LEVEL_WIDTHS) - 1:
            tensors += convolution(f"input_blocks.{len(widths)}.0.op", width, width)
            widths.append(width)
    return tensors, widths


def _up(depths: tuple[int, int, int], skipped_widths: list[int]) -> list[TensorLayout]:
    tensors: list[TensorLayout] = []
    waiting = list(skipped_widths)
    current, index = LEVEL_WIDTHS[-1], 0
    for level in reversed(range(len(LEVEL_WIDTHS))):
        width = LEVEL_WIDTHS[level]
        for place in range(3):
            name = f"output_blocks.{index}"
            tensors += _residual_block(f"{name}.0", current + waiting.pop(), width)
            tensors += _transformer(f"{name}.1", width, depths[level])
            if place == 2 and level > 0:
                # The upsampler comes after the transformer where there is one.
                tensors += convolution(f"{name}.{2 if depths[level] else 1}.conv", width, width)
            current, index = width, index + 1
    return tensors


def _residual_block(name: str, inputs: int, outputs: int) -> list[TensorLayout]:
    tensors = norm(f"{name}.in_layers.0", inputs, bias=True) + convolution(f"{name}.in_layers.2", inputs, outputs)
    tensors += linear(f"{name}.emb_layers.1", EMBEDDING_WIDTH, outputs)
    tensors += norm(f"{name}.out_layers.0", outputs, bias=True) + convolution(f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        tensors += convolution(f"{name}.skip_connection", inputs, outputs, kernel=1)
    return tensors


def _transformer(name: str, width: int, depth: int) -> list[TensorLayout]:
    """A spatial transformer of `depth` blocks; nothing where that is 0."""
    if not depth:
        return []
    tensors = norm(f"{name}.norm", width, bias=True) + linear(f"{name}.proj_in", width, width)
    for index in range(depth):
        tensors += _transformer_block(f"{name}.transformer_blocks.{index}", width)
    return tensors + linear(f"{name}.proj_out", width, width)


def _transformer_block(name: str, width: int) -> list[TensorLayout]:
    tensors: list[TensorLayout] = []
    for attention, context_width in (("attn1", width), ("attn2", TEXT_WIDTH)):
        tensors += linear(f"{name}.{attention}.to_q", width, width, bias=False)
        tensors += linear(f"{name}.{attention}.to_k", context_width, width, bias=False)
        tensors += linear(f"{name}.{attention}.to_v", context_width, width, bias=False)
        tensors += linear(f"{name}.{attention}.to_out.0", width, width)
    # The gate and what it gates are computed by one layer.
    tensors += linear(f"{name}.ff.net.0.proj", width, 8 * width) + linear(f"{name}.ff.net.2", 4 * width, width)
    for number in (1, 2, 3):
        tensors += norm(f"{name}.norm{number}", width, bias=True)
    return tensors
