"""The tensors of the other files that a workflow loads: text encoders and image autoencoders.

Names follow the published files: CLIP-L and Qwen3 in their `transformers` layout, the autoencoder in the layout of
CompVis' latent diffusion, with 16 latent channels as FLUX.1 and Z-Image use it.
"""

from .tensors import TensorLayout, convolution, embedding, linear, norm

CLIP_L_WIDTH = 768
CLIP_L_LAYERS = 12
QWEN3_WIDTH = 2560
QWEN3_LAYERS = 36

AUTOENCODER_WIDTHS = (128, 256, 512, 512)
AUTOENCODER_LATENT_CHANNELS = 16


def clip_l() -> list[TensorLayout]:
    """CLIP-L's text model, 0.12 G parameters: vectors of width 768."""
    width, positions, vocabulary = CLIP_L_WIDTH, 77, 49408
    tensors = embedding("text_model.embeddings.token_embedding", vocabulary, width, spread=0.5)
    tensors += embedding("text_model.embeddings.position_embedding", positions, width, spread=0.5)
    for index in range(CLIP_L_LAYERS):
        name = f"text_model.encoder.layers.{index}"
        tensors += norm(f"{name}.layer_norm1", width, bias=True) + norm(f"{name}.layer_norm2", width, bias=True)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors += linear(f"{name}.self_attn.{projection}", width, width)
        tensors += linear(f"{name}.mlp.fc1", width, 4 * width) + linear(f"{name}.mlp.fc2", 4 * width, width)
    tensors += norm("text_model.final_layer_norm", width, bias=True)
    return tensors


def qwen3_4b() -> list[TensorLayout]:
    """Qwen3-4B, 4.0 G parameters: vectors of width 2560. The output layer shares the embedding and is not stored."""
    width, mlp_width, head_width, heads, key_heads, vocabulary = QWEN3_WIDTH, 9728, 128, 32, 8, 151936
    tensors = embedding("model.embed_tokens", vocabulary, width, spread=0.5)
    for index in range(QWEN3_LAYERS):
        name = f"model.layers.{index}"
        tensors += norm(f"{name}.input_layernorm", width) + norm(f"{name}.post_attention_layernorm", width)
        tensors += norm(f"{name}.self_attn.q_norm", head_width) + norm(f"{name}.self_attn.k_norm", head_width)
        tensors += linear(f"{name}.self_attn.q_proj", width, heads * head_width, bias=False)
        for projection in ("k_proj", "v_proj"):
            tensors += linear(f"{name}.self_attn.{projection}", width, key_heads * head_width, bias=False)
        tensors += linear(f"{name}.self_attn.o_proj", heads * head_width, width, bias=False)
        for projection in ("gate_proj", "up_proj"):
            tensors += linear(f"{name}.mlp.{projection}", width, mlp_width, bias=False)
        tensors += linear(f"{name}.mlp.down_proj", mlp_width, width, bias=False)
    tensors += norm("model.norm", width)
    return tensors


def autoencoder() -> list[TensorLayout]:
    """The image autoencoder with 16 latent channels, 0.08 G parameters; ComfyUI fixes its widths."""
    return _encoder() + _decoder()


def _encoder() -> list[TensorLayout]:
    widths = AUTOENCODER_WIDTHS
    tensors = convolution("encoder.conv_in", 3, widths[0])
    current = widths[0]
    for level, width in enumerate(widths):
        for block in range(2):
            tensors += _residual_block(f"encoder.down.{level}.block.{block}", current, width)
            current = width
        if level < len(widths) - 1:
            tensors += convolution(f"encoder.down.{level}.downsample.conv", width, width)
    tensors += _middle("encoder.mid", current)
    tensors += norm("encoder.norm_out", current, bias=True)
    # Mean and logarithm of the variance, hence twice the channels.
    return tensors + convolution("encoder.conv_out", current, 2 * AUTOENCODER_LATENT_CHANNELS)


def _decoder() -> list[TensorLayout]:
    widths = AUTOENCODER_WIDTHS
    current = widths[-1]
    tensors = convolution("decoder.conv_in", AUTOENCODER_LATENT_CHANNELS, current)
    tensors += _middle("decoder.mid", current)
    for level in reversed(range(len(widths))):
        for block in range(3):
            tensors += _residual_block(f"decoder.up.{level}.block.{block}", current, widths[level])
            current = widths[level]
        if level > 0:
            tensors += convolution(f"decoder.up.{level}.upsample.conv", current, current)
    tensors += norm("decoder.norm_out", current, bias=True)
    # A small gain keeps pixels inside the displayable range: clipped pixels would hide differences.
    return tensors + convolution("decoder.conv_out", current, 3, gain=0.4)


def _middle(name: str, width: int) -> list[TensorLayout]:
    tensors = _residual_block(f"{name}.block_1", width, width)
    tensors += norm(f"{name}.attn_1.norm", width, bias=True)
    for projection in ("q", "k", "v", "proj_out"):
        tensors += convolution(f"{name}.attn_1.{projection}", width, width, kernel=1)
    return tensors + _residual_block(f"{name}.block_2", width, width)


def _residual_block(name: str, inputs: int, outputs: int) -> list[TensorLayout]:
    tensors = norm(f"{name}.norm1", inputs, bias=True) + convolution(f"{name}.conv1", inputs, outputs)
    tensors += norm(f"{name}.norm2", outputs, bias=True) + convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        tensors += convolution(f"{name}.nin_shortcut", inputs, outputs, kernel=1)
    return tensors
