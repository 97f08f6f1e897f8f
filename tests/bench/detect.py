"""Asks a ComfyUI what it makes of every layout, without a value in memory; prints one line of JSON.

    python tests/bench/detect.py FOLDER

Run in a process of its own: two hosts never share one.
"""

import json
import sys
from pathlib import Path

from bench.spec import FAMILIES
from scripts import published
from scripts.checkpoints import Size
from scripts.hosts import open_host, read_host
from scripts.layouts.tensors import TensorLayout


def compare(tensors: list[TensorLayout]) -> dict:
    """What the host takes the tensors for, where its own model's names and shapes differ from theirs, and its latent.

    Pixels and frames a latent value are None where the host does not say.
    """
    import torch
    from comfy import model_detection

    stored = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in tensors}
    config = model_detection.model_config_from_unet(dict(stored), "")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(dict(stored), "", device="meta")
    wanted = {name: tuple(value.shape) for name, value in model.diffusion_model.state_dict().items()}
    # Some names of published files are another in the class; the loader turns them over.
    loaded = config.process_unet_state_dict(dict(stored))
    given = {name: tuple(value.shape) for name, value in loaded.items()}
    differing = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    return {
        "model": type(model).__name__,
        "differing": differing,
        "elements": sum(tensor.elements for tensor in tensors),
        "tensors": sorted([tensor.name, list(tensor.shape)] for tensor in tensors),
        # The older host has no such figures, and calls them by this name where it has.
        "downscale": getattr(model.latent_format, "spacial_downscale_ratio", None),
        "frame_downscale": getattr(model.latent_format, "temporal_downscale_ratio", None),
    }


def main() -> None:
    host = read_host(Path(sys.argv[1]))
    open_host(host, "--cpu")
    known = [family for family in FAMILIES if published.is_known_to(host, family)]
    sizes: list[Size] = ["narrow", "full"]
    print(
        json.dumps({f"{family} {size}": compare(published.layout(family, size)) for family in known for size in sizes})
    )


if __name__ == "__main__":
    main()
