"""What a benchmark asks of every contender alike, as one value that travels to each worker process as JSON.

In: the command line of `bench.step`. Out: `StepSpec`, and the inputs that belong to a model family.
It opens no host and imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GIB = 1024**3
MIB = 1024**2

# The euler sampler calls the model once a step, so that a step and a walk over the blocks are the same thing.
SAMPLER = "euler"
SCHEDULER = "simple"

# A first step loads the model and a second one may still re-plan, pin memory or tune kernels.
WARMUP_STEPS = 2


class TextInput(NamedTuple):
    """What a family's text encoder hands to its model. Widths are read from the checkpoint: they are the last axis of
    the tensors named here, which take the text and the pooled text in. `sizes_width` of the pooled text's axis are the
    picture's sizes, which the host adds itself."""

    tokens: int
    width_tensor: str
    pooled_width_tensor: str | None = None
    sizes_width: int = 0
    guidance: float | None = None


FAMILIES: dict[str, TextInput] = {
    "zimage": TextInput(tokens=256, width_tensor="cap_embedder.0.weight"),
    "flux": TextInput(
        tokens=512, width_tensor="txt_in.weight", pooled_width_tensor="vector_in.in_layer.weight", guidance=3.5
    ),
    "qwen-image": TextInput(tokens=256, width_tensor="txt_in.weight"),
    "sdxl": TextInput(
        tokens=77,
        width_tensor="input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        pooled_width_tensor="label_emb.0.0.weight",
        sizes_width=6 * 256,
    ),
}


@dataclass(frozen=True)
class StepSpec:
    """One benchmark: the model, the picture, the memory left free, and how LayerStream is set.

    `free_gib` is what the card has free before a contender's process starts, its CUDA context included.
    `synchronize` says what a step's end waits for: "device" for everything the card was given, "stream" for the
    compute stream alone, which leaves copies for the next step under way. `trace` asks LayerStream for the timeline
    of a step after the timed runs.
    """

    family: str
    size: str
    device: str
    host_path: str
    checkpoint_path: str
    free_gib: float
    resolution: int = 1024
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
    trace: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family `{self.family}`: choose one of {', '.join(FAMILIES)}")
        if self.steps <= WARMUP_STEPS:
            raise ValueError(
                f"{self.steps} steps leave none to time after {WARMUP_STEPS} to warm up: use {WARMUP_STEPS + 1} or more"
            )
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}: at least one is needed")
        if self.resolution % 16:
            raise ValueError(f"resolution {self.resolution} is not a multiple of 16: the model's patches need it")
        if self.free_gib <= 0:
            raise ValueError(f"free memory must be positive, not {self.free_gib} GiB")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"unknown device `{self.device}`: choose cuda or cpu")
        if self.synchronize not in ("device", "stream"):
            raise ValueError(f"unknown synchronisation `{self.synchronize}`: choose device or stream")

    @property
    def text(self) -> TextInput:
        return FAMILIES[self.family]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StepSpec:
        return cls(**json.loads(path.read_text(encoding="utf-8")))
