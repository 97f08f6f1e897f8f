"""A walker as loaders of files leave a model: its weights are mapped, and it is known where in the file they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.host_memory import HostMemory
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Session
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import make_walker

# As in safetensors files, weights begin anywhere.
HEADER_BYTES = 1000


class MappedWalker:
    """A walker whose weights are mapped from a file, and where in it they are."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16, **sizes) -> None:
        self.path = path
        self.walker = make_walker(dtype=dtype, **(sizes or {"width": 256, "inner": (1024,)}))
        parameters = dict(self.walker.named_parameters())
        stored = (bytes(parameter.view(torch.uint8).numpy()) for parameter in parameters.values())
        path.write_bytes(bytes(HEADER_BYTES) + b"".join(stored))
        self.file = path.open("rb")
        memory = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.slices: dict[int, FileSlice] = {}
        offset = HEADER_BYTES
        for parameter in parameters.values():
            mapped = torch.frombuffer(memory, dtype=dtype, count=parameter.numel(), offset=offset)
            self.slices[mapped.data_ptr()] = FileSlice(self.file.fileno(), offset, mapped.nbytes, mapped.data_ptr())
            parameter.data = mapped.view(parameter.shape)
            offset += mapped.nbytes
        self.size_bytes = offset

    def attach(
        self,
        dtype: torch.dtype | None = None,
        device: SimulatedDevice | None = None,
        host_memory: HostMemory | None = None,
    ) -> Session:
        parts = take_apart(self.walker, self.walker.units(), lambda module, name: dtype)
        device = device or SimulatedDevice(1 << 30, packer=PlainPacker())
        return Session(
            parts,
            device,
            lambda _: True,
            host_memory=host_memory,
            file_of=lambda tensor: self.slices.get(tensor.data_ptr()),
        )
