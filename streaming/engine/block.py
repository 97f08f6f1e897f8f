"""What is streamed: a block is a name, a module and the weights under it, laid out one after another.

In: a torch module. Out: `Block`s whose weights have fixed offsets, so that any tail of a block is one contiguous run of
bytes. Nothing here allocates device memory or knows when a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .codec import Codec, align, codec_for, rewrapped

DtypeOf = Callable[[torch.nn.Module, str], torch.dtype | None]


class Site(NamedTuple):
    """One place where a module keeps a weight; a shared weight has several."""

    module: torch.nn.Module
    name: str
    is_buffer: bool

    @property
    def table(self) -> dict[str, Any]:
        """What the module holds of this kind, by name."""
        return self.module._buffers if self.is_buffer else self.module._parameters

    def as_held(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as the table wants it."""
        return tensor if self.is_buffer else as_parameter(tensor)

    def put(self, tensor: torch.Tensor) -> None:
        self.table[self.name] = self.as_held(tensor)

    def get(self) -> torch.Tensor:
        return self.table[self.name]


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    if is_traceable_wrapper_subclass(tensor):
        own = rewrapped(tensor)
        own._is_param = True  # as `Parameter` makes one of a subclass, but for its `detach`
        return own  # type: ignore[return-value]
    return torch.nn.Parameter(tensor, requires_grad=False)


def as_home(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of a parameter, on the same memory; a buffer as it is."""
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor
    return rewrapped(tensor) if is_traceable_wrapper_subclass(tensor) else tensor.data


class Weight:
    """One parameter or buffer of a block.

    `home` is its unmodified host tensor: the model's own at first, later a view of a slab that took its place.
    `keys` are its names in the model's state dict, more than one where modules share it.
    """

    __slots__ = ("codec", "home", "keys", "offset", "sites")

    def __init__(self, keys: tuple[str, ...], sites: tuple[Site, ...], codec: Codec, home: torch.Tensor) -> None:
        self.keys = keys
        self.sites = sites
        self.codec = codec
        self.home = home
        self.offset = 0

    @property
    def end(self) -> int:
        """First byte after this weight in its block, aligned."""
        return self.offset + align(self.codec.stored_bytes)

    @property
    def dtype_changes(self) -> bool:
        """True where the codec converts the home tensor, so that its stored bytes cannot stand in for it."""
        return getattr(self.codec, "dtype", self.home.dtype) != self.home.dtype

    def put(self, tensor: torch.Tensor) -> None:
        for site in self.sites:
            site.put(tensor)

    def current(self) -> torch.Tensor:
        """What the module holds right now."""
        return self.sites[0].get()


class Slot(NamedTuple):
    """What a module shall hold under a name, and the table where it does: putting it there is one dictionary write."""

    table: dict[str, Any]
    name: str
    tensor: torch.Tensor


def slots_for(views: Iterable[tuple[Weight, torch.Tensor]]) -> list[Slot]:
    """For each tensor, its slot in every module that shares the weight."""
    return [Slot(site.table, site.name, site.as_held(tensor)) for weight, tensor in views for site in weight.sites]


class Block:
    """A module's weights in the order they give up residency last: small ones first, the largest at the end.

    The first weights of this order stay on the device and the rest streams, so a plan is one cut a block and moving
    the cut never needs a new layout.
    """

    def __init__(self, name: str, module: torch.nn.Module, weights: Iterable[Weight]) -> None:
        self.name = name
        self.module = module
        self.weights = tuple(sorted(weights, key=lambda weight: weight.codec.stored_bytes))
        offset = 0
        for weight in self.weights:
            weight.offset = offset
            offset = weight.end
        self._size_bytes = offset

    def weight_bytes(self) -> int:
        """Bytes of all weights as laid out, alignment included."""
        return self._size_bytes

    def to_host(self) -> None:
        """Have the module hold its home tensors."""
        for weight in self.weights:
            weight.put(weight.home)

    def offset_of(self, cut: int) -> int:
        """Byte at which the weights from index `cut` on begin; the end of the block when none is left."""
        return self.weights[cut].offset if cut < len(self.weights) else self.weight_bytes()

    def bytes_from(self, cut: int) -> int:
        """Bytes of the weights from index `cut` on, alignment included."""
        return self.weight_bytes() - self.offset_of(cut)

    def views(self, stored: torch.Tensor, first: int, last: int, base: int) -> list[tuple[Weight, torch.Tensor]]:
        """Decode weights `first`..`last` - 1 from `stored`, whose byte 0 is byte `base` of the block."""
        decoded = []
        for weight in self.weights[first:last]:
            start = weight.offset - base
            decoded.append((weight, weight.codec.decode(stored[start : start + weight.codec.stored_bytes])))
        return decoded


class ModelBlocks(NamedTuple):
    """A model taken apart: the blocks, and as one more block everything that must always be on the device."""

    blocks: tuple[Block, ...]
    outside: Block


def take_apart(
    root: torch.nn.Module,
    units: Sequence[tuple[str, torch.nn.Module]],
    dtype_of: DtypeOf = lambda module, name: None,
) -> ModelBlocks:
    """Divide the weights of `root` among `units` (name, submodule); what lies in none or in several goes outside.

    `dtype_of(module, name)` says to which dtype a weight is converted when it is stored, None for its own.
    Raises ValueError when one unit lies inside another.
    """
    owner: dict[torch.nn.Module, int] = {}
    for index, (name, unit) in enumerate(units):
        for module in unit.modules():
            if owner.setdefault(module, index) != index:
                raise ValueError(f"block `{name}` shares the module of block `{units[owner[module]][0]}`")

    sites: dict[int, list[tuple[str, Site, int | None]]] = {}
    for prefix, module in root.named_modules():
        tables = ((module._parameters, False), (module._buffers, True))
        for table, is_buffer in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    key = f"{prefix}.{name}" if prefix else name
                    sites.setdefault(id(tensor), []).append((key, Site(module, name, is_buffer), owner.get(module)))

    divided: dict[int | None, list[Weight]] = {}
    for places in sites.values():
        _, site, place = places[0]
        tensor = site.get()
        home = as_home(tensor)
        codec = codec_for(home, dtype_of(site.module, site.name))
        weight = Weight(tuple(name for name, _, _ in places), tuple(where for _, where, _ in places), codec, home)
        shared = any(other[2] != place for other in places)
        divided.setdefault(None if shared else place, []).append(weight)

    blocks = tuple(Block(name, unit, divided.get(index, ())) for index, (name, unit) in enumerate(units))
    return ModelBlocks(blocks, Block("(outside blocks)", root, divided.get(None, ())))
