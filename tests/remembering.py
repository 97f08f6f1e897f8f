"""Lets the plain packer work out what the same bytes become once a process: it is slow, and most tests move the same.

In: a function of a tensor's bytes. Out: the same function. What arrives damaged has other bytes, so it is worked out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

MOST_BYTES = 256 * 1024**2


def remembering(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function`, whose results are kept until they take MOST_BYTES together."""
    known: dict[tuple[bytes, torch.dtype], torch.Tensor] = {}

    def remembered(given: torch.Tensor) -> torch.Tensor:
        digest = hashlib.sha1(given.detach().contiguous().view(torch.uint8).numpy(), usedforsecurity=False).digest()
        made = known.get((digest, given.dtype))
        if made is None:
            made = function(given)
            if sum(result.nbytes for result in known.values()) + made.nbytes > MOST_BYTES:
                known.clear()
            known[digest, given.dtype] = made
        return made.clone()

    return remembered
