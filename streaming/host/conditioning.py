"""What conditions a run goes to the card once, before its first pass.

ComfyUI has it in RAM and copies it in every pass. While weights stream, such a copy stands in line behind those that
are on their way, and the card waits for it.
"""

from __future__ import annotations

from typing import Any

import torch

# Smaller copies out of memory that is not page-locked pass those in line: measured, 64 KiB did and 68 did not.
STANDING_IN_LINE_BYTES = 64 * 1024


def bring_conditioning(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
    """SAMPLER_SAMPLE: have the conditioning of a run whose model streams on the card, for as long as the run lasts."""
    patcher = guider.model_patcher
    stream = getattr(patcher, "stream", None)
    if stream is not None and stream.is_streaming:
        guider.conds = {
            name: [on_device(cond, patcher.load_device) for cond in conds] for name, conds in guider.conds.items()
        }
    return executor(guider, *args, **kwargs)


def on_device(cond: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of one of ComfyUI's conditionings, whose large tensors that the model is given are on `device`."""
    given = cond.get("model_conds")
    if not given:
        return cond
    return {**cond, "model_conds": {name: _moved(value, device) for name, value in given.items()}}


def _moved(value: Any, device: torch.device) -> Any:
    """A value as ComfyUI wraps it, around a tensor, a list of them, or anything else."""
    content = getattr(value, "cond", None)
    if isinstance(content, torch.Tensor):
        moved: Any = _tensor_on(content, device)
    elif isinstance(content, list):
        moved = [_tensor_on(item, device) if isinstance(item, torch.Tensor) else item for item in content]
    else:
        return value
    return value._copy_with(moved)


def _tensor_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device) if tensor.nbytes >= STANDING_IN_LINE_BYTES else tensor
