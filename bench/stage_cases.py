"""What `bench.stages` compares, and what it asks of every case alike, as one value that travels as JSON.

It opens no host and imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A way to run a workflow. `mode` is the Offload Policy's, None for ComfyUI without it."""

    mode: str | None
    is_tiled: bool = False
    is_text_on_cpu: bool = False
    is_dynamic: bool = False
    on_whole_card: bool = False


REFERENCE = "resident"

CASES = {
    # The image that all others must equal, with nothing in the way.
    REFERENCE: Case(None, on_whole_card=True),
    "no_offload": Case(None),
    "no_offload_tiled": Case(None, is_tiled=True),
    "dynamic_vram": Case(None, is_dynamic=True),
    "cond_only": Case("cond_only"),
    "cond_only_tiled": Case("cond_only", is_tiled=True),
    "text_on_cpu": Case(None, is_text_on_cpu=True),
    "layer_streaming": Case("layer_streaming"),
    "auto": Case("auto"),
    # The same on top of what newer versions do by themselves.
    "cond_only_dynamic": Case("cond_only", is_dynamic=True),
    "layer_streaming_dynamic": Case("layer_streaming", is_dynamic=True),
    "auto_dynamic": Case("auto", is_dynamic=True),
}


@dataclass(frozen=True)
class StageSpec:
    """The files and the picture of all cases."""

    device: str
    host_path: str
    model_path: str
    text_path: str
    vae_path: str
    resolution: int = 1024
    steps: int = 9
    cfg: float = 1.0
    prompts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.steps < 1:
            raise ValueError(f"{self.prompts} prompts of {self.steps} steps measure nothing: use 1 or more")
        if self.resolution % 16:
            raise ValueError(f"resolution {self.resolution} is not a multiple of 16: the model's patches need it")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StageSpec:
        return cls(**json.loads(path.read_text(encoding="utf-8")))
