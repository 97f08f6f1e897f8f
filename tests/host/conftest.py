"""Gives the tests of this folder the ComfyUI that they test, models and a sampler."""

import gc
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import pytest
import torch

from opened import HOST  # test modules import ComfyUI at their top, so it must be open before they are collected
from scripts import checkpoint_cache, tiny_models
from scripts.checkpoints import Family
from scripts.hosts import Host

GIB = 1024**3

Patcher = Any
"""A ComfyUI `ModelPatcher`; its class exists only while a host is open."""

TEXT_TOKENS = 20
POOLED_WIDTH = 768
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8


class LoadModel(Protocol):
    """Gives a freshly loaded model of a family as a ComfyUI patcher."""

    def __call__(self, family: Family, *, size: Literal["tiny", "narrow"] = "narrow", **depth: int) -> Patcher: ...


class Sample(Protocol):
    """Samples with random conditioning and returns the latent, shape (batch, 16, pixels / 8, pixels / 8)."""

    def __call__(
        self,
        model: Patcher,
        *,
        steps: int = 2,
        cfg: float = 1.0,
        batch: int = 1,
        seed: int = 0,
        pixels: int = 96,
    ) -> torch.Tensor: ...


@pytest.fixture(autouse=True)
def ample_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine of 64 GiB be seen, three quarters of them free: what is free of a real one changes with the hour.

    Tests of scarce RAM let less of it be seen.
    """
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=64 * GIB, available=48 * GIB))


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI under test."""
    return HOST


@pytest.fixture(scope="session")
def checkpoint() -> Any:
    """A function from a family to its narrow diffusion model file, written once and kept between runs."""

    def give(family: Family, **depth: int) -> Path:
        return checkpoint_cache.diffusion_model(family, **depth)

    return give


@pytest.fixture
def load(checkpoint: Any) -> Iterator[LoadModel]:
    """A function that loads a model afresh; ComfyUI forgets all of them after the test.

    "narrow" goes through ComfyUI's own file loader; "tiny" has the same classes without a file and is far quicker.
    """
    import comfy.model_management
    import comfy.sd

    def load_model(family: Family, *, size: Literal["tiny", "narrow"] = "narrow", **depth: int) -> Patcher:
        # As ComfyUI loads within a node: weights become inference tensors, which some operations refuse.
        with torch.inference_mode():
            if size == "tiny":
                return tiny_models.build_tiny_model(family)
            return comfy.sd.load_diffusion_model(str(checkpoint(family, **depth)))

    yield load_model
    gc.collect()  # ComfyUI 0.3.75 loses count where a model dies while it unloads all of them
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture
def sample() -> Sample:
    """A function that samples as the KSampler node does, with conditioning that depends only on the seed."""
    import nodes

    def sample_latent(
        model: Patcher,
        *,
        steps: int = 2,
        cfg: float = 1.0,
        batch: int = 1,
        seed: int = 0,
        pixels: int = 96,
    ) -> torch.Tensor:
        # 96 pixels make 36 image tokens, so that Z-Image pads them and its pad tokens matter.
        side = pixels // PIXELS_PER_LATENT
        latent = {"samples": torch.zeros(batch, LATENT_CHANNELS, side, side)}
        generator = torch.Generator().manual_seed(seed)
        positive, negative = (_conditioning(model, generator) for _ in range(2))
        with torch.inference_mode():
            (result,) = nodes.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, latent)
        return result["samples"]

    return sample_latent


def _conditioning(model: Patcher, generator: torch.Generator) -> list[Any]:
    configuration = model.model.model_config.unet_config
    text_width = configuration.get("cap_feat_dim") or configuration["context_in_dim"]
    text = torch.randn(1, TEXT_TOKENS, text_width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, POOLED_WIDTH, generator=generator)}]]


@pytest.fixture
def mapped_model(load: LoadModel, tmp_path: Path) -> Iterator[Patcher]:
    """A model whose large weights are mapped, marked with ComfyUI's own record; its own mapping needs a card."""
    memory_management = pytest.importorskip("comfy.memory_management", reason="this ComfyUI maps no weights")
    model = load("zimage", size="tiny")
    path, lock = tmp_path / "weights", threading.Lock()
    weights = [weight for weight in model.model.diffusion_model.parameters() if weight.nbytes > 0]
    path.write_bytes(b"".join(bytes(weight.data.contiguous().view(torch.uint8).numpy()) for weight in weights))
    with path.open("rb") as file:
        offset = 0
        for weight in weights:
            page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            memory = mmap.mmap(file.fileno(), offset - page + weight.nbytes, access=mmap.ACCESS_COPY, offset=page)
            tensor = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=offset - page)
            where = memory_management.TensorFileSlice(file.fileno(), lock, offset, weight.nbytes)
            tensor.untyped_storage()._comfy_tensor_file_slice = where
            offset += weight.nbytes
            weight.data = tensor.view(weight.shape)
        yield model
