"""What a person sets on a Layer-Stream node."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..engine.plan import GIB, Packing
from .budget import Budget

MIB = 1024**2
MOST_PREFETCH = 8


class Mode(str, Enum):
    """`auto` streams what does not fit, `always` streams every block, `off` leaves the model to ComfyUI."""

    AUTO = "auto"
    ALWAYS = "always"
    OFF = "off"


class Patching(str, Enum):
    """How LoRAs and other patches reach the weights of layers that can apply them as they run.

    `baked` computes each patched weight once and streams the result: the bits of ComfyUI's full load. `run_time`
    streams the weights as they are and patches them whenever their layer runs: the bits of its low-memory way. `auto`
    bakes unless RAM is too short for the patched weights beside the others.
    """

    AUTO = "auto"
    BAKED = "baked"
    RUN_TIME = "run_time"


@dataclass(frozen=True)
class StreamingSettings:
    """How one model is to be streamed.

    `prefetch_blocks` is how many blocks are fetched ahead, 0 for what measures best. `vram_gib` bounds what the model's
    weights take of the card: 0 is what ComfyUI reports as free, a negative number is free memory less that many GiB.
    `min_free_mib` stays free on the card whatever else is set. `packing` says what may be packed, `patching`
    how patches are applied. `budget` is a bound that is shared with other models, None where there is none.
    """

    mode: Mode = Mode.AUTO
    prefetch_blocks: int = 0
    vram_gib: float = 0.0
    min_free_mib: int = 256
    packing: Packing = Packing.AUTO
    patching: Patching = Patching.AUTO
    budget: Budget | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", Mode(self.mode))
        object.__setattr__(self, "packing", Packing(self.packing))
        object.__setattr__(self, "patching", Patching(self.patching))
        if not 0 <= self.prefetch_blocks <= MOST_PREFETCH:
            raise ValueError(f"prefetch_blocks is {self.prefetch_blocks}: set it between 0 and {MOST_PREFETCH}")
        if self.min_free_mib < 0:
            raise ValueError(f"min_free_mb is {self.min_free_mib}: set it to 0 or more")

    @property
    def is_explicit(self) -> bool:
        """True where the budget is the person's own figure, which is refused when it is too small."""
        return self.vram_gib != 0

    @property
    def min_free_bytes(self) -> int:
        return self.min_free_mib * MIB

    def budget_bytes(self, free_bytes: int, allowed_bytes: float, reserve_bytes: int) -> int:
        """Bytes the model's weights and its ring may take.

        `free_bytes` counts what this model holds as free, `allowed_bytes` is what ComfyUI grants it, `reserve_bytes`
        what the coming work needs besides.
        """
        if self.vram_gib > 0:
            return min(int(self.vram_gib * GIB), free_bytes - self.min_free_bytes)
        if self.vram_gib < 0:
            return free_bytes - max(int(-self.vram_gib * GIB), self.min_free_bytes)
        return int(min(allowed_bytes, free_bytes - max(self.min_free_bytes, reserve_bytes)))
