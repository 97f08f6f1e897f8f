"""The streaming session of a ComfyUI model, shared by every patcher of that model.

In: a model and the patcher it came with. Out: one `ModelStream` a model, however many nodes and clones refer to it, so
that its weights are in host memory once.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher

from ..engine.block import take_apart
from ..engine.device import Device
from ..engine.session import Session
from .families import Family, family_of

ROOT = "diffusion_model"


@dataclass(eq=False)
class ModelStream:
    """A session with what the host needs to know of it.

    `load_id` is the identity that the model carries in `current_weight_patches_uuid` while our weights are in it;
    ComfyUI takes any id that is not its own as a reason to restore the model from the ledger, see `patcher.py`.
    """

    model: torch.nn.Module
    device: Device
    family: Family
    session: Session
    load_id: uuid.UUID | None = None
    reserve_bytes: int = 0
    budget_bytes: int = 0
    is_guided: bool = False

    @property
    def is_in_place(self) -> bool:
        """True while the model holds our tensors: nobody else has loaded or unloaded it since."""
        return self.load_id is not None and self.model.current_weight_patches_uuid is self.load_id


# Patchers hold the streams and a stream holds its model, so neither is kept alive from here.
_streams: weakref.WeakValueDictionary[int, ModelStream] = weakref.WeakValueDictionary()


def live_streams() -> list[ModelStream]:
    return list(_streams.values())


def stream_for(patcher: ModelPatcher, device: Device) -> ModelStream | None:
    """Find or make the stream of `patcher`'s model; None when the model has no blocks."""
    model = patcher.model
    stream = _streams.get(id(model))
    if stream is not None and stream.model is model and stream.device.name == device.name:
        return stream
    diffusion_model = getattr(model, ROOT, None)
    if not isinstance(diffusion_model, torch.nn.Module):
        return None
    family = family_of(diffusion_model)
    if not family.units:
        return None
    # Only a dynamic patcher leaves weights as the file has them; it says in these attributes what the model wants.
    is_dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    parts = take_apart(
        diffusion_model,
        family.units,
        lambda module, name: getattr(module, f"{name}_comfy_model_dtype", None) if is_dynamic else None,
    )
    stream = ModelStream(model, device, family, Session(parts, device, keep_home=_is_mapped))
    _streams[id(model)] = stream
    return stream


def _is_mapped(tensor: torch.Tensor) -> bool:
    """True for a weight that ComfyUI maps from its file: its pages cost nothing that the system cannot take back."""
    return tensor.is_meta or hasattr(_plain(tensor).untyped_storage(), "_comfy_tensor_file_slice")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_qdata", tensor)
