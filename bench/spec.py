"""What a benchmark asks of every contender alike, as one value that travels to each worker process as JSON.

In: the command line of `bench.step`. Out: `StepSpec`, and the inputs that belong to a model family.
It opens no host and imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GIB = 1024**3
MIB = 1024**2

HALF = "half"
"""What to ask for in place of GiB; `bench.half` says what it means."""

# The euler sampler calls the model once a step, so that a step and a walk over the blocks are the same thing.
SAMPLER = "euler"
SCHEDULER = "simple"

# A first step loads the model and a second one may still re-plan, pin memory or tune kernels.
WARMUP_STEPS = 2


class Picture(NamedTuple):
    """What is denoised, in pixels; more than one frame is a video."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


class TextInput(NamedTuple):
    """What a family's text encoder hands to its model. Widths are read from the checkpoint: they are the last axis of
    the tensors named here, which take the text and the pooled text in. `sizes_width` of the pooled text's axis are the
    picture's sizes, which the host adds itself. `is_masked`: the encoder says which tokens count; all do."""

    tokens: int
    width_tensor: str
    pooled_width_tensor: str | None = None
    sizes_width: int = 0
    guidance: float | None = None
    is_masked: bool = False


class LatentInput(NamedTuple):
    """A random latent that the model is conditioned on: its channels and pixels a value."""

    channels: int
    downscale: int


class Family(NamedTuple):
    """What a family's model is given. Channels and dimensions of its latent are the host's to say; `downscale` and
    `frame_downscale` are pixels and frames a latent value, and sides must be multiples of `pixel_step`, which
    patches count in. `picture` is what its example workflow makes. The noise schedule's shift is the one that the
    host's loader sets for the family."""

    text: TextInput
    picture: Picture = Picture(1024, 1024)
    downscale: int = 8
    frame_downscale: int = 1
    pixel_step: int = 16
    latents: Mapping[str, LatentInput] = {}


_FLUX2 = Family(TextInput(tokens=512, width_tensor="txt_in.weight", guidance=4.0), downscale=16)

_FLUX = Family(
    TextInput(tokens=512, width_tensor="txt_in.weight", pooled_width_tensor="vector_in.in_layer.weight", guidance=3.5)
)

FAMILIES: dict[str, Family] = {
    "zimage": Family(TextInput(tokens=256, width_tensor="cap_embedder.0.weight")),
    "flux": _FLUX,
    "flux-fp8": _FLUX,
    "flux2": _FLUX2,
    "flux2-dev": _FLUX2,
    "qwen-image": Family(TextInput(tokens=256, width_tensor="txt_in.weight")),
    # 77 tokens of CLIP and as many of T5.
    "sd35-large": Family(
        TextInput(tokens=154, width_tensor="context_embedder.weight", pooled_width_tensor="y_embedder.mlp.0.weight")
    ),
    "ltx": Family(
        TextInput(tokens=128, width_tensor="caption_projection.linear_1.weight", is_masked=True),
        picture=Picture(768, 512, 97),
        downscale=32,
        frame_downscale=8,
        pixel_step=32,
    ),
    "sdxl": Family(
        TextInput(
            tokens=77,
            width_tensor="input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
            pooled_width_tensor="label_emb.0.0.weight",
            sizes_width=6 * 256,
        )
    ),
    "sd15": Family(
        TextInput(tokens=77, width_tensor="input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
        picture=Picture(512, 512),
    ),
    # Stage B reads the pooled text alone, which is as wide as the text that comes with it.
    "cascade-b": Family(
        TextInput(tokens=77, width_tensor="clip_mapper.weight", pooled_width_tensor="clip_mapper.weight"),
        downscale=4,
        latents={"stable_cascade_prior": LatentInput(channels=16, downscale=42)},
    ),
    "cascade-c": Family(
        TextInput(
            tokens=77, width_tensor="clip_txt_mapper.weight", pooled_width_tensor="clip_txt_pooled_mapper.weight"
        ),
        downscale=42,
    ),
    "wan21-14b": Family(
        TextInput(tokens=512, width_tensor="text_embedding.0.weight"),
        picture=Picture(832, 480, 33),
        frame_downscale=4,
    ),
}
"""What is measured, by the names of the command line; the model files are in `scripts.published`."""


@dataclass(frozen=True)
class StepSpec:
    """One benchmark: the model, the picture, the memory left free, and how LayerStream is set.

    `free_gib` is what the card has free before a contender's process starts, its CUDA context included. Half of the
    model (`bench.half`) is None until the resident run has shown what else computing takes.
    `synchronize` says what a step's end waits for: "device" for everything the card was given, "stream" for the
    compute stream alone, which leaves copies for the next step under way. With a `lora_rank` every contender's model
    has a LoRA on all of its blocks. `trace` asks ComfyUI's own ways and LayerStream for the timeline of a
    step after the timed runs.
    """

    family: str
    size: str
    device: str
    host_path: str
    checkpoint_path: str
    free_gib: float | None
    picture: Picture
    is_half: bool = False
    batch: int = 1
    cfg: float = 1.0
    steps: int = 6
    runs: int = 2
    seed: int = 0
    synchronize: str = "stream"
    layerstream_mode: str = "auto"
    layerstream_dynamic: bool = True
    prefetch_blocks: int | None = None
    vram_gib: float = 0.0
    ram_gib: float = 0.0
    patching: str = "auto"
    lora_rank: int = 0
    trace: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family `{self.family}`: choose one of {', '.join(FAMILIES)}")
        if self.steps <= WARMUP_STEPS:
            raise ValueError(
                f"{self.steps} steps leave none to time after {WARMUP_STEPS} to warm up: use {WARMUP_STEPS + 1} or more"
            )
        if self.lora_rank < 0 or self.ram_gib < 0:
            raise ValueError(f"a LoRA's rank ({self.lora_rank}) and RAM ({self.ram_gib} GiB) are 0 for none, or more")
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}: at least one is needed")
        self._check_picture()
        if self.free_gib is None and not self.is_half:
            raise ValueError("free memory is neither a number of GiB nor half of the model: give one of them")
        if self.free_gib is not None and self.free_gib <= 0:
            raise ValueError(f"free memory must be positive, not {self.free_gib} GiB")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"unknown device `{self.device}`: choose cuda or cpu")
        if self.synchronize not in ("device", "stream"):
            raise ValueError(f"unknown synchronisation `{self.synchronize}`: choose device or stream")

    def _check_picture(self) -> None:
        row, (width, height, frames) = self.inputs, self.picture
        least = max([row.pixel_step, row.downscale, *(latent.downscale for latent in row.latents.values())])
        if min(width, height) < least or frames < 1 or width % row.pixel_step or height % row.pixel_step:
            raise ValueError(
                f"resolution {self.picture}: sides of {self.family} are multiples of {row.pixel_step} and at least "
                f"{least}, frames at least 1"
            )
        if frames > 1 and row.frame_downscale == 1:
            raise ValueError(f"resolution {self.picture}: {self.family} makes single pictures, leave the frames out")
        if (frames - 1) % row.frame_downscale:
            raise ValueError(
                f"resolution {self.picture}: frames of {self.family} are one more than a multiple of "
                f"{row.frame_downscale}"
            )

    @property
    def inputs(self) -> Family:
        return FAMILIES[self.family]

    @property
    def text(self) -> TextInput:
        return self.inputs.text

    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latent."""
        width, height, frames = self.picture
        row = self.inputs
        return (frames - 1) // row.frame_downscale + 1, height // row.downscale, width // row.downscale

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StepSpec:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "picture": Picture(*values["picture"])})
