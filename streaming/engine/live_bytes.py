"""How much memory a computation holds at its peak, by the storages of its tensors.

In: code that runs under `LiveBytes`, on real tensors or on fake ones that have shapes and no values. Out: the most
bytes that were alive at once of what the code made. What a kernel takes for itself while it runs is not seen, and known
of convolutions only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What CUDA's allocator rounds sizes up to.
ROUND_BYTES = 512

# With 3 channels cuDNN was seen to convolve them as they lie, with 16 it was not; nothing between was tried.
LEAST_CHANNELS = 8


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make on `device`, each once, from when it is made until it is freed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._device = device
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            self._know(tensor)  # what came from outside is not counted
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            self._count(tensor)
        if func is torch.ops.aten.convolution.default and self._device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + convolution_bytes(result, args))
        return result

    def _storage(self, tensor: Any) -> torch.UntypedStorage | None:
        """The storage of a tensor on the device that was not seen yet."""
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != self._device.type:
            return None
        storage = tensor.untyped_storage()
        return None if id(storage) in self._known else storage

    def _know(self, tensor: Any) -> None:
        storage = self._storage(tensor)
        if storage is not None:
            self._remember(storage, 0)

    def _count(self, tensor: Any) -> None:
        storage = self._storage(tensor)
        if storage is None:
            return
        size_bytes = -(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._remember(storage, size_bytes)

    def _remember(self, storage: torch.UntypedStorage, size_bytes: int) -> None:
        key = id(storage)

        def free(_: object) -> None:
            self.live_bytes -= size_bytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, free)


def convolution_bytes(result: torch.Tensor, arguments: Sequence[Any]) -> int:
    """What cuDNN takes of the card beside the tensors of a convolution, by `arguments` of `aten::convolution`.

    Tensor cores want channels last. Where they are not, it makes copies of input, weight and output in which they are.
    Measured with cuDNN 9 on an H200 in bf16, fp16 and fp32, in two and three dimensions, with 16 to 1280 channels, to
    within 4 %. Not so were 1280 channels, which took up to 1.2 times that, and 16 of fp32, which took nothing. Nor do
    kernels of size 1, three channels of input and channels that are last. Not known of transposed and grouped ones.
    """
    given, weight, *_, is_transposed, _, groups = arguments
    is_product = all(size == 1 for size in weight.shape[2:])
    if is_product or is_transposed or groups != 1 or weight.shape[1] < LEAST_CHANNELS or not given.is_contiguous():
        return 0
    return given.nbytes + weight.nbytes + result.nbytes


class Called(Module):
    """A function of a module, as a module's forward: `torch.func.functional_call` takes nothing else."""

    def __init__(self, module: Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def peak_of(module: Module, function: Callable[[], Any], device: torch.device) -> int:
    """Run `function`, which uses `module`, without values or memory; give the peak bytes of what it makes.

    Every weight of the module counts as being on `device`. Tensors that the function makes there count; it must make
    its inputs itself. Raises whatever code raises that looks at values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        tables = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        weights = {
            f"module.{name}": torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
            for table in tables
            for name, weight in table
        }
        with LiveBytes(device) as live:
            torch.func.functional_call(Called(module, function), weights, (), tie_weights=False)
        return live.peak_bytes
