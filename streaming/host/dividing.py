"""Divides a module into units: the parts of it that stream or stay, each as a whole.

In: a module of a diffusion model. Out: units by name, none inside another. A unit's forward is what brackets the use of
its weights, so a unit must be a module that is called; a weight used while no forward of its unit runs would be read
from the host. Nothing here knows a model family by name or changes a module.

What the sizes are for: device buffers are as large as the largest unit that streams, and a copy below a megabyte does
not reach the link's speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

MIB = 1024**2

Unit = tuple[str, torch.nn.Module]
Judgement = Callable[[torch.nn.Module], bool]

# A parent may call the children of these itself: `Sequential` is called in one model and walked over in the next.
CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)

# The only layout whose linear layers ComfyUI runs without calling them, see `is_folded`.
FOLDED_LAYOUT = "TensorWiseINT8Layout"


class UnitLimits(NamedTuple):
    """How large a unit may be before it is divided, and how small before it simply stays on the card."""

    largest_bytes: int = 96 * MIB
    smallest_bytes: int = MIB


class Rules(NamedTuple):
    """What decides whether a module is a unit, beside its size."""

    limits: UnitLimits
    is_called: Judgement
    """Whether the module's forward runs around every use of its weights."""
    is_whole: Judgement
    """Whether that is not so for its parts, though they are called where a model is plain."""


def has_forward(module: torch.nn.Module) -> bool:
    """Whether the module can be called at all; some only hold what their parent calls."""
    return not isinstance(module, CONTAINERS) and type(module).forward is not torch.nn.Module.forward


def divide(name: str, module: torch.nn.Module, rules: Rules) -> Iterator[Unit]:
    """Units of a module whose class is known: the largest parts that are called and within the limit.

    What is still larger and has no parts is a unit of its own, whatever its size.
    """
    size_bytes = weight_bytes(module)
    if size_bytes < rules.limits.smallest_bytes:
        return
    if rules.is_called(module) and (size_bytes <= rules.limits.largest_bytes or not is_divisible(module, rules)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from divide(f"{name}.{child_name}", child, rules)


def divide_to_leaves(name: str, module: torch.nn.Module, rules: Rules) -> Iterator[Unit]:
    """Units of a module that nobody described: leaves, which are called whoever walks over what holds them.

    Where all leaves are too small for a unit, the smallest module that is large enough is one.
    """
    size_bytes = weight_bytes(module)
    if size_bytes < rules.limits.smallest_bytes:
        return
    is_called = rules.is_called(module)
    if is_called and not is_divisible(module, rules):
        yield name, module
        return
    found = False
    for child_name, child in module.named_children():
        for unit in divide_to_leaves(f"{name}.{child_name}", child, rules):
            found = True
            yield unit
    if not found and is_called and size_bytes <= rules.limits.largest_bytes:
        yield name, module


def is_divisible(module: torch.nn.Module, rules: Rules) -> bool:
    """False for a leaf, and for a module whose own forward uses large weights: its own, or those of leaves without one,
    as of the banks of experts in mixed-precision models.
    """
    holders = [module, *(child for child in module.children() if _only_holds(child))]
    own_bytes = sum(stored_bytes(tensor) for holder in holders for tensor in own_weights(holder))
    if own_bytes >= rules.limits.smallest_bytes or rules.is_whole(module):
        return False
    return any(weight_bytes(child) for child in module.children())


def _only_holds(module: torch.nn.Module) -> bool:
    return not has_forward(module) and next(module.children(), None) is None


def is_folded(module: torch.nn.Module) -> bool:
    """Whether the module holds weights that ComfyUI may use without calling the layer they are in.

    `comfy.ops.linear_input_act` folds an activation into the quantiser of an int8 linear layer.
    """
    return any(getattr(parameter, "_layout_cls", None) == FOLDED_LAYOUT for parameter in module.parameters())


def without_overlap(units: Iterable[Unit]) -> list[Unit]:
    """The units less those that share a module with an earlier one: a model may hold a block in two places."""
    owned: set[torch.nn.Module] = set()
    kept = []
    for name, unit in units:
        modules = set(unit.modules())
        if owned.isdisjoint(modules):
            owned |= modules
            kept.append((name, unit))
    return kept


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers in a module, each counted once."""
    return sum(stored_bytes(tensor) for table in (module.parameters(), module.buffers()) for tensor in table)


def own_weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers that the module holds itself, not in a part of it."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes a weight takes, for a quantised one those of its codes."""
    codes = getattr(tensor, "_qdata", tensor)
    return int(codes.nbytes)
