"""Small real models that walk over blocks in the ways diffusion models do, and how tests stream them."""

from __future__ import annotations

import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.host_memory import HostMemory
from layerstream.streaming.engine.plan import Packing, Plan
from layerstream.streaming.engine.session import Session
from layerstream.streaming.engine.simulated import SimulatedDevice
from torch import nn
from torch.nn import LayerNorm, Linear

ALL_STREAMED = 0.0


class Block(nn.Module):
    """A residual MLP; its `shift` is a raw parameter and its `scale` a buffer, as some families have them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)
        self.shift = nn.Parameter(torch.randn(width))
        self.register_buffer("scale", torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x) + self.shift))) * self.scale


class Walker(nn.Module):
    """Calls its blocks in `order`, by default each once from first to last."""

    def __init__(self, count: int = 8, width: int = 96, inner: tuple[int, ...] = (512,)) -> None:
        super().__init__()
        self.entry = Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, inner[i % len(inner)]) for i in range(count))
        self.order: list[int] = list(range(count))
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for index in self.order:
            x = self.blocks[index](x)
        return x

    def units(self) -> list[tuple[str, nn.Module]]:
        return [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]


def make_walker(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **sizes) -> Walker:
    torch.manual_seed(seed)
    return Walker(**sizes).requires_grad_(False).to(dtype)


def make_input(walker: Walker, batch: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, walker.width, generator=generator).to(walker.entry.weight.dtype)


def attach(
    walker: Walker,
    device: SimulatedDevice,
    keep_home=lambda tensor: False,
    host_memory: HostMemory | None = None,
) -> Session:
    return Session(take_apart(walker, walker.units()), device, keep_home, host_memory=host_memory)


def plan_for(session: Session, kept: float, prefetch: int = 2, is_packed: bool = False) -> Plan:
    """A plan whose budget is the least possible plus the share `kept` of what remains."""
    how = {"prefetch": prefetch, "packing": Packing.ALWAYS if is_packed else Packing.NEVER}
    least = session.propose(None, stream_all=True, **how)
    if kept == ALL_STREAMED:
        return least
    return session.propose(least.device_bytes + int(kept * (session.total_bytes - least.device_bytes)), **how)


def one_pass(session: Session, walker: Walker, x: torch.Tensor) -> torch.Tensor:
    with session.one_pass():
        y = walker(x)
    session.check()
    return y
