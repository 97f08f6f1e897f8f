"""How one weight's bytes travel between host and device.

In: the weight as the model holds it. Out: a codec that knows how many bytes it needs, writes them into a host slab and
reads a tensor back from bytes that lie on either side. A codec owns no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT_BYTES = 256


def align(size_bytes: int) -> int:
    """Round up to the alignment every tensor in a slab or slot starts at."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Codec(Protocol):
    """One weight's storage form; `stored_bytes` is what it takes in a slab, a slot and on the link."""

    @property
    def stored_bytes(self) -> int: ...

    @property
    def is_verbatim(self) -> bool:
        """Whether what is stored of a weight in one piece of memory begins with the bytes of that memory."""

    def encode(self, weight: torch.Tensor, stored: torch.Tensor) -> None:
        """Write `weight` (any device) into `stored`, a uint8 tensor [stored_bytes]; from a device into page-locked
        memory it is there once the current stream has come so far.
        """

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """Give the weight whose bytes lie in `stored` [stored_bytes], on that tensor's device, without copying."""


@dataclass(frozen=True)
class RawCodec:
    """Bytes as they are, in the weight's own memory format when it is dense, else contiguous."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def stored_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def is_verbatim(self) -> bool:
        return True

    def encode(self, weight: torch.Tensor, stored: torch.Tensor) -> None:
        # A patched scale may have one axis more. A host tensor may go right after this, so it is waited for.
        self.decode(stored).copy_(weight.reshape(self.shape), non_blocking=weight.device.type != "cpu")

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        flat = stored[: self.stored_bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


@dataclass(frozen=True)
class WrapperCodec:
    """A tensor subclass (a quantised tensor, say) by its own flatten protocol: inner tensors raw, one after another."""

    kind: type
    parts: tuple[tuple[str, Codec], ...]
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @cached_property
    def stored_bytes(self) -> int:
        return sum(align(part.stored_bytes) for _, part in self.parts)

    @property
    def is_verbatim(self) -> bool:
        return len(self.parts) == 1 and self.parts[0][1].is_verbatim

    def encode(self, weight: torch.Tensor, stored: torch.Tensor) -> None:
        """Raises TypeError for a weight of other parts, which this layout has no place for."""
        found: dict[str, torch.Tensor] = flattened(weight)[0] if is_traceable_wrapper_subclass(weight) else {}
        for (name, part), piece in zip(self.parts, self._pieces(stored), strict=True):
            if name not in found or codec_for(found[name]).stored_bytes != part.stored_bytes:
                raise TypeError(
                    f"patched values do not keep the form that {self.kind.__name__} had in its file (`{name}`): "
                    "apply LoRAs to a file whose weights are not quantised, or quantised in another way"
                )
            part.encode(found[name], piece)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        inner = {name: part.decode(piece) for (name, part), piece in zip(self.parts, self._pieces(stored), strict=True)}
        return self.kind.__tensor_unflatten__(inner, self.context, self.shape, self.stride)  # type: ignore[attr-defined]

    def _pieces(self, stored: torch.Tensor) -> list[torch.Tensor]:
        pieces, offset = [], 0
        for _, part in self.parts:
            pieces.append(stored[offset : offset + part.stored_bytes])
            offset += align(part.stored_bytes)
        return pieces


@dataclass(frozen=True)
class TaggedCodec:
    """A tensor that says in attributes what its bytes stand for, as `GGMLTensor` of the ComfyUI-GGUF pack does.

    A tensor that is given back holds no patches of that pack's own.
    """

    kind: type
    raw: RawCodec
    tensor_type: Any
    tensor_shape: Any

    @property
    def stored_bytes(self) -> int:
        return self.raw.stored_bytes

    @property
    def is_verbatim(self) -> bool:
        return self.raw.is_verbatim

    def encode(self, weight: torch.Tensor, stored: torch.Tensor) -> None:
        """Raises TypeError for a tensor of another kind, patched values say."""
        if not isinstance(weight, self.kind):
            raise TypeError(
                f"patched values have no place in a {self.kind.__name__}: apply LoRAs to a model that this pack's own "
                "GGUF loader has loaded"
            )
        self.raw.encode(weight.as_subclass(torch.Tensor), stored)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        raw = self.raw.decode(stored)
        return self.kind(raw, tensor_type=self.tensor_type, tensor_shape=self.tensor_shape, patches=[])


def flattened(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors that a wrapper holds, and what else makes it, by its flatten protocol."""
    names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    # Before that, ComfyUI's quantised tensors lack some of these attributes.
    return {name: getattr(weight, name) for name in names}, context


def rewrapped(weight: torch.Tensor) -> torch.Tensor:
    """Another wrapper of the same parts. `detach` would give ComfyUI's quantised tensors scales of their own."""
    parts, context = flattened(weight)
    return weight.__tensor_unflatten__(  # type: ignore[attr-defined, no-any-return]
        parts, context, weight.shape, weight.stride()
    )


def codec_for(weight: torch.Tensor, dtype: torch.dtype | None = None) -> Codec:
    """Choose how `weight` travels; `dtype` is the one it is converted to on its way into the slab, None for its own."""
    if is_traceable_wrapper_subclass(weight):
        found, context = flattened(weight)
        parts = tuple((name, codec_for(part)) for name, part in found.items())
        return WrapperCodec(type(weight), parts, context, tuple(weight.shape), tuple(weight.stride()))
    tensor_type, tensor_shape = (getattr(weight, tag, None) for tag in ("tensor_type", "tensor_shape"))
    if tensor_type is not None and tensor_shape is not None:
        raw = codec_for(weight.as_subclass(torch.Tensor))
        assert isinstance(raw, RawCodec)
        return TaggedCodec(type(weight), raw, tensor_type, tensor_shape)
    dense = torch.empty_like(weight, device="meta")  # preserves strides only where they are dense
    return RawCodec(tuple(weight.shape), tuple(dense.stride()), dtype or weight.dtype)
