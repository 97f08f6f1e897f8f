"""A weight that stays in the blocks of its file until someone computes with it.

In: stored bytes, their kind and the shape they stand for. Out: a tensor that moves between devices and through the
streaming engine as bytes, by torch's flatten protocol, and gives plain values wherever it is cast or computed with. It
calls itself float32, the dtype its values are defined in, so that nobody takes a cast to a smaller one for done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from .dequantise import dequantise
from .kinds import Kind

aten = torch.ops.aten


class GgufTensor(torch.Tensor):
    """`shape` numbers held as blocks of `kind` in `stored`, uint8 [bytes] on the device that the tensor is on.

    A row, the last dimension as stored, is whole blocks. `origin` is where the bytes were before they left the host: a
    weight never changes, so bringing it back costs nothing.
    """

    stored: torch.Tensor
    kind: Kind
    origin: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, stored: torch.Tensor, kind: Kind, shape: tuple[int, ...], origin: torch.Tensor | None = None
    ) -> GgufTensor:
        size = torch.Size(shape)
        if stored.numel() != kind.stored_bytes(size.numel()) or size.numel() % kind.elements:
            raise ValueError(f"{stored.numel()} bytes of {kind.name} do not hold the shape {tuple(shape)}")
        tensor = torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.float32, device=stored.device)
        tensor.stored, tensor.kind, tensor.origin = stored, kind, origin
        return tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"GgufTensor({self.kind.name}, shape={tuple(self.shape)}, device={self.device})"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes as stored, which is what ComfyUI counts memory by."""
        return self.stored.nbytes

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes a number, which ComfyUI 0.3.75 counts memory by: an exact fraction, since blocks are powers of two."""
        return self.kind.size_bytes / self.kind.elements

    def values(self, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        """The numbers, rounded once to `dtype`, on this device."""
        return dequantise(self.stored, self.kind, dtype).view(self.shape)

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of the rows [dim 0] that `index` names, on its device: [*index.shape, *row shape]."""
        rows = self.stored.view(self.shape[0], -1)
        chosen = rows[index.to(rows.device).reshape(-1)].to(index.device)
        return dequantise(chosen.reshape(-1), self.kind, dtype).view(*index.shape, *self.shape[1:])

    def to(self, *arguments: Any, copy: bool = False, **options: Any) -> torch.Tensor:  # type: ignore[override]
        """Move the bytes, or give plain values where a dtype is asked for, float32 included."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*arguments, **options)
        if device is None:
            device = self.device
        moved = self if device == self.device and not copy else self._move(device, non_blocking, copy)
        return moved if dtype is None else moved.values(dtype)

    def _move(self, device: torch.device, non_blocking: bool = False, copy: bool = False) -> GgufTensor:
        if device.type == "cpu" and self.origin is not None and not copy:
            return GgufTensor(self.origin, self.kind, tuple(self.shape))
        origin = self.stored if self.device.type == "cpu" and device.type != "cpu" else self.origin
        stored = self.stored.to(device, non_blocking=non_blocking, copy=copy)
        return GgufTensor(stored, self.kind, tuple(self.shape), None if stored.device.type == "cpu" else origin)

    # -- torch's protocols ---------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Kind, tuple[int, ...]]]:
        return ["stored"], (self.kind, tuple(self.shape))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> GgufTensor:
        kind, shape = context
        return GgufTensor(inner["stored"], kind, shape)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if isinstance(first, GgufTensor):
            if func in (aten.detach.default, aten.alias.default):
                return GgufTensor(first.stored, first.kind, tuple(first.shape), first.origin)
            if func is aten.clone.default:
                return GgufTensor(first.stored.clone(), first.kind, tuple(first.shape))
            if func is aten._to_copy.default:
                return first._copied(**kwargs)
            if func is aten.empty_like.default:
                plain = {key: kwargs.get(key) or getattr(first, key) for key in ("dtype", "device")}
                return torch.empty(first.shape, **plain)
            if func._schema.is_mutable:
                raise RuntimeError(f"{func} would write into a weight as its GGUF file has it: cast it first")
        if func is aten.copy_.default:
            source = args[1]._move(first.device, bool(args[2:] and args[2])).values(first.dtype)
            return first.copy_(source)
        # Whatever else is done with a weight is done with its values.
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def _copied(
        self, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **options: Any
    ) -> torch.Tensor:
        """What `cpu()`, `cuda()`, `half()` and the like give: values only in another dtype."""
        device = self.device if device is None else torch.device(device)
        moved = self._move(device, non_blocking, copy=device == self.device)
        return moved if dtype in (None, torch.float32) else moved.values(dtype)


def _plain(value: Any) -> Any:
    return value.values(torch.float32) if isinstance(value, GgufTensor) else value
