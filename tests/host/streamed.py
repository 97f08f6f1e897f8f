"""How tests of the host stream a model: on a simulated card, with a budget given as a share of the model."""

from __future__ import annotations

import comfy.model_management
import psutil
import torch
from layerstream.streaming.engine import meter
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.plan import GIB, Packing
from layerstream.streaming.engine.session import Session
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.host.budget import LEAST_LEFT_BYTES, LEFT_SHARE, host_memory
from layerstream.streaming.host.devices import PACKED_VARIABLE, SEED_VARIABLE, SIMULATE_VARIABLE
from layerstream.streaming.host.families import family_of
from layerstream.streaming.host.gguf_patches import streaming_patcher_for
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import Mode, StreamingSettings

from steady_clock import give_steady_clock

CARD_GIB = 8.0


def on_simulated_card(monkeypatch, seed: int = 0, size_gib: float = CARD_GIB, is_packed: bool = False) -> None:
    """Give the pack a card of its own that delays copies at random, by `seed`."""
    monkeypatch.setenv(PACKED_VARIABLE, "1" if is_packed else "0")
    monkeypatch.setenv(SIMULATE_VARIABLE, str(size_gib))
    monkeypatch.setenv(SEED_VARIABLE, str(seed))


def give_ram(monkeypatch, size_bytes: int) -> None:
    """Let it seem as though copies of mapped weights may take `size_bytes` more than now. Pages of files are free to a
    system, locked or not.
    """
    real, memory = psutil.virtual_memory(), host_memory()
    full_bytes = memory.total_bytes + size_bytes + max(LEAST_LEFT_BYTES, int(LEFT_SHARE * real.total))

    def shown() -> object:
        return real._replace(available=full_bytes - memory.total_bytes + memory.file_bytes)

    monkeypatch.setattr(psutil, "virtual_memory", shown)


def locks_of(monkeypatch, streamed: StreamingModelPatcher) -> list[int]:
    """A list that gets the size of each piece of memory as it is locked for the card of `streamed`."""
    device, locked = type(streamed.stream.device), []
    lock = device.page_lock
    monkeypatch.setattr(
        device, "page_lock", lambda *args, **how: (locked.append(args[1].nbytes), lock(*args, **how))[1]
    )
    return locked


def believe_times(monkeypatch, streamed: StreamingModelPatcher, share: float) -> None:
    """Have the card of `streamed` give times that plans are made by, and room for no more than a share of its model.

    They are those of a steady clock: plans do not depend on how busy the machine is.
    """
    give_steady_clock(monkeypatch)
    device = streamed.stream.device
    limit = int(share * streamed.model_size())
    monkeypatch.setattr(meter, "TELLING_COPY_BYTES", 1)
    monkeypatch.setattr(device, "has_clock", True)
    monkeypatch.setattr(device, "holds_activations", True, raising=False)
    monkeypatch.setattr(device, "free_bytes", lambda: limit - device.used_bytes)
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 0)


def stream(model, kept: float, prefetch: int = 1) -> StreamingModelPatcher:
    """A streaming patcher that may keep the share `kept` of what does not have to be on the card."""
    if kept == 0.0:
        return streaming_patcher_for(model).from_patcher(
            model, StreamingSettings(Mode.ALWAYS, prefetch_blocks=prefetch, min_free_mib=0)
        )
    return streaming_patcher_for(model).from_patcher(
        model,
        StreamingSettings(Mode.AUTO, prefetch, vram_gib=budget_gib(model, kept, prefetch), min_free_mib=0),
    )


def budget_gib(model, kept: float, prefetch: int = 1) -> float:
    """A budget for raw or packed streaming: packed blocks need no more of the card than raw ones but in small rings."""
    diffusion_model = model.model.diffusion_model
    session = Session(take_apart(diffusion_model, family_of(diffusion_model).units), SimulatedDevice(0), lambda _: True)
    session.device.packer = PlainPacker()
    least = max(
        session.propose(None, prefetch=prefetch, packing=packing, stream_all=True).device_bytes
        for packing in (Packing.NEVER, Packing.ALWAYS)
    )
    return (least + kept * (session.total_bytes - least)) / GIB


def weights_of(model) -> dict[str, torch.Tensor]:
    """Copies of all weights of the model behind a patcher, wherever they are."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.model.state_dict().items()}


def assert_same_weights(model, before: dict[str, torch.Tensor]) -> None:
    after = weights_of(model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
