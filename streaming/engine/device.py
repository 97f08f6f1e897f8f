"""What the engine needs of a device, and CUDA as the one that ships.

A device gives memory, copies on a stream, events and page-locking. It holds no policy: who copies what and when is the
pipeline's business. `simulated.py` has the other implementation.
"""

from __future__ import annotations

import logging
import sys
from typing import Protocol

import torch

from .packing import Decoder, Layout, Packer
from .pages import keep_freed_pages

logger = logging.getLogger("layerstream")

# From <driver_types.h>, and HIP's <hip_runtime_api.h>; torch has no name for it. Where it is not known it is refused.
REGISTER_READ_ONLY = 0x08


class Event(Protocol):
    """A point in a stream's work; the same meaning as torch.cuda.Event. Only a timed one tells times."""

    def record(self, stream: Stream) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event) -> float: ...


class Stream(Protocol):
    """Work in order; the same meaning as torch.cuda.Stream."""

    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...


class Device(Protocol):
    """Memory, copies and events of one accelerator."""

    name: str
    torch_device: torch.device
    holds_activations: bool
    """True where compute takes memory from the same place as weights."""
    has_clock: bool
    """True where the times between events mean something."""
    assumed_restore: float
    """Raw bytes a millisecond that the packer is taken to restore until it was measured."""
    packer: Packer | None
    """What packs weights for the link and restores them here; None where nothing can."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Give a uint8 tensor [size_bytes] that is returned when its last view dies.

        Raises torch.OutOfMemoryError.
        """

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream, compute: Stream) -> None:
        """Start copying host bytes `source` to device bytes `destination` on `stream` and return at once.

        `compute` is the stream that is current, before and after.
        """

    def restorer(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        """What starts restoring device bytes `packed` into device bytes `out` on a stream and returns at once.

        It may be called again and again while both lie where they are now. Only where there is a packer.
        """

    def note_read(self, memory: torch.Tensor, stream: Stream) -> None:
        """Take note that work on `stream`, up to now, reads `memory`."""

    def discard(self, memory: torch.Tensor, stream: Stream) -> None:
        """Take note that what is in `memory` will not be read again, after what `stream` has to do so far."""

    def copy_stream(self) -> Stream: ...
    def restore_stream(self) -> Stream: ...
    def compute_stream(self) -> Stream: ...
    def event(self, is_timed: bool = False) -> Event: ...

    def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
        """Lock a host uint8 tensor's pages, in any thread; False when the system refuses. Those of a file are locked
        where the system keeps them, for reading.
        """

    def page_unlock(self, address: int) -> None: ...

    def free_bytes(self) -> int:
        """Memory that can be taken, what the allocator holds unused included."""

    def taken_bytes(self) -> int:
        """Memory that this process's tensors take."""

    def limit(self, most_bytes: int | None) -> None:
        """Bound what this process takes in all, None for no bound; more raises torch.OutOfMemoryError."""

    def spilled_bytes(self) -> int:
        """Memory of this process that the driver keeps in RAM because the device was full, by arithmetic."""

    def unused_bytes(self) -> int:
        """Memory that nobody holds, this process's allocator included: what was needed so far leaves it alone."""

    def trim(self) -> None:
        """Give what the allocator holds unused back to the system, so that larger pieces can be made of it."""

    def peak_bytes(self) -> int: ...


def _triton_packer(torch_device: torch.device) -> Packer | None:
    try:
        from .packing_triton import TritonPacker
    except ImportError:
        return None  # torch brings Triton on Linux only; whoever plans says that weights travel raw
    return TritonPacker(torch_device)


class CudaDevice:
    """A CUDA (or ROCm) device through torch."""

    name = "cuda"
    holds_activations = True
    has_clock = True

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self.packer = _triton_packer(torch_device)
        keep_freed_pages()
        self._limit_bytes = torch.cuda.mem_get_info(torch_device)[1]
        # 1.3 TB/s on the 132 multiprocessors of an H200, which restores 2.3 alone and 0.6 to 1.5 beside compute.
        self.assumed_restore = 1e7 * torch.cuda.get_device_properties(torch_device).multi_processor_count

    def allocate(self, size_bytes: int) -> torch.Tensor:
        # ComfyUI runs nodes in inference mode; memory made there could not be written to outside it.
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream, compute: Stream) -> None:
        # The context manager for this asks which stream is current, which takes longer than the copy's start.
        torch.cuda.set_stream(stream)  # type: ignore[arg-type]
        destination.copy_(source, non_blocking=True)
        torch.cuda.set_stream(compute)  # type: ignore[arg-type]

    def restorer(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        assert self.packer is not None
        return self.packer.decoder(packed, layout, out)

    def note_read(self, memory: torch.Tensor, stream: Stream) -> None:
        pass  # events order it; only a simulation checks that they do

    def discard(self, memory: torch.Tensor, stream: Stream) -> None:
        pass

    def copy_stream(self) -> Stream:
        # A stream of its own, so that copies run beside compute instead of between its kernels.
        return torch.cuda.Stream(self.torch_device)  # type: ignore[return-value]

    def restore_stream(self) -> Stream:
        # What is restored is needed before what computes now is done, and takes a fraction of its time.
        return torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[return-value]

    def compute_stream(self) -> Stream:
        return torch.cuda.current_stream(self.torch_device)  # type: ignore[return-value]

    def event(self, is_timed: bool = False) -> Event:
        return torch.cuda.Event(enable_timing=is_timed)  # type: ignore[return-value]

    def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
        # Every thread has a device of its own that is current, and an error of its own that was last.
        with torch.cuda.device(self.torch_device):
            flags = REGISTER_READ_ONLY if is_file else 0
            failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) != 0
            if failed:
                self._clear_error()
        return not failed

    def page_unlock(self, address: int) -> None:
        try:
            # After a run that broke off, copies of what lies there may still be under way.
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError as error:
            logger.debug("the device could not be waited for: %s", error)
        if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
            self._clear_error()

    def _clear_error(self) -> None:
        # CUDA keeps the last error until someone reads it; the next kernel launch would report ours as its own.
        try:
            torch.zeros(1, device=self.torch_device).add_(1)
        except RuntimeError as error:
            logger.debug("cleared a CUDA error left by page-locking: %s", error)

    def free_bytes(self) -> int:
        """What the driver has free plus what torch's allocator holds unused."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - self.taken_bytes()
        return min(free + cached, self._limit_bytes - self.taken_bytes())

    def taken_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.torch_device)

    def limit(self, most_bytes: int | None) -> None:
        total_bytes = torch.cuda.mem_get_info(self.torch_device)[1]
        self._limit_bytes = total_bytes if most_bytes is None else min(most_bytes, total_bytes)
        torch.cuda.set_per_process_memory_fraction(self._limit_bytes / total_bytes, self.torch_device)

    def spilled_bytes(self) -> int:
        """Only Windows drivers do this; elsewhere what does not fit is refused."""
        if sys.platform != "win32":
            return 0
        total_bytes = torch.cuda.mem_get_info(self.torch_device)[1]
        return max(0, torch.cuda.memory_reserved(self.torch_device) - total_bytes)

    def unused_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return min(free, self._limit_bytes - torch.cuda.memory_reserved(self.torch_device))

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)
