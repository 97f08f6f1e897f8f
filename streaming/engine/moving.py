"""What of a block moves: its weights from a cut on, where their bytes are while it does not run.

In: blocks. Out: where they are cut, and a `MovingBlock` of each that streams or is restored, which the loader makes and
the pipeline brings. Nothing here moves a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .block import Block
from .codec import RawCodec
from .packing import PACKABLE, Layout
from .plan import TINY_BYTES
from .staging import Staged
from .store import FileSlab, Piece, Slab

# Where a host tensor carries the packed bytes that stand for its block on the device.
KEPT = "_layerstream_kept"


def cut_of(block: Block) -> int:
    """Index of the first weight of `block` that may move; the tiny ones before it always stay on the device."""
    small = (weight.codec.stored_bytes < TINY_BYTES for weight in block.weights)
    return sum(small)


def packable_dtype(block: Block) -> torch.dtype | None:
    """The dtype in which the moving weights of `block` can be packed; None when they cannot."""
    codecs = [weight.codec for weight in block.weights[cut_of(block) :]]
    dtypes = {codec.dtype if isinstance(codec, RawCodec) else None for codec in codecs}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in PACKABLE else None


def is_block_mapped(block: Block, is_mapped: Callable[[torch.Tensor], bool]) -> bool:
    """Whether what moves of `block` is all mapped from its file, so that a slab of it is a copy of what can be read
    again. What stays on the device has no slab, and where it comes from makes no difference.
    """
    return all(is_mapped(weight.home) for weight in block.weights[cut_of(block) :])


@dataclass(frozen=True)
class MovingBlock:
    """A block whose weights from `cut` on are brought or restored each time it runs.

    `origin` is where the bytes are that cross the link, packed if there is a `layout`; None for a block that is kept
    packed on the device, where it takes `kept_bytes`. `raw_bytes` is what it is when it runs. A packed block that holds
    changed weights `differs` from the home tensors that stand in its module while it does not run.
    """

    block: Block
    cut: int
    raw_bytes: int
    origin: Slab | FileSlab | Staged | None
    layout: Layout | None
    differs: bool = False
    kept_bytes: int = 0

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link each time."""
        if self.origin is None:
            return 0
        return self.origin.stored.nbytes if isinstance(self.origin, Slab) else self.origin.nbytes

    @cached_property
    def source(self) -> Sequence[Piece] | Staged | None:
        """What crosses the link, or whence that is brought to where it can. Only the pipeline asks for it, once a load
        is over: it depends on whether the system has locked the pages, and waits for that.
        """
        origin = self.origin
        if origin is None or isinstance(origin, Staged):
            return origin
        if origin.is_locked:
            return origin.pieces
        if isinstance(origin, FileSlab):
            return Staged(origin.nbytes, origin.read_into, in_file=True)
        stored = origin.stored
        return Staged(stored.nbytes, lambda buffer: buffer.copy_(stored), in_file=False)

    def kept(self) -> torch.Tensor:
        """The packed bytes on the device. Only the module's own tensor holds them: whoever replaces it frees them."""
        return getattr(self.block.weights[self.cut].current(), KEPT)
