"""Samples every narrow family resident and streamed, as the benchmark does, in one ComfyUI; prints one line of JSON.

    python tests/bench/sample.py COMFYUI FAMILY ...

Inputs and ways are the benchmark's own, with a shorter text; the card is simulated, with room for about half of each
model. Run in a process of its own: two hosts never share one.
"""

import gc
import json
import os
import sys
from pathlib import Path

from bench.host_contenders import run_layerstream, run_stock
from bench.spec import FAMILIES, Picture, StepSpec
from scripts.example import half_resident_budget
from scripts.hosts import open_host, read_host

STEPS = 3
VIDEO_FRAMES = 9
TOKENS = 24
"""Of text, fewer than a prompt's: narrow models are thin in some families alone."""


def narrow_file(family: str) -> Path:
    """The family's narrow file, with one block of each kind where the depth is free; kept between runs."""
    from scripts import checkpoint_cache, published

    depth = {"zimage": {"layers": 1}, "flux": {"double": 1, "single": 1}, "qwen-image": {"layers": 1}}
    if family in depth:
        return checkpoint_cache.diffusion_model(family, **depth[family])  # type: ignore[arg-type]  # a family of its
    name = f"bench-{published.file_stem(family, 'narrow')}"
    return checkpoint_cache.cached(name, lambda path: published.write_file(family, "narrow", path))


def small_picture(family: str) -> Picture:
    """Two latent values a side at least, and two latent frames of a video."""
    row = FAMILIES[family]
    least = 2 * max([row.pixel_step, row.downscale, *(latent.downscale for latent in row.latents.values())])
    side = -(-least // row.pixel_step) * row.pixel_step
    return Picture(side, side, VIDEO_FRAMES if row.frame_downscale > 1 else 1)


def compare(family: str, host_path: Path) -> dict:
    """The resident run's only latent, whether the streamed one's is the same, and how much streamed."""
    import comfy.model_management
    import torch

    file = narrow_file(family)
    budget = half_resident_budget(file)
    os.environ.update(budget.environment)
    spec = StepSpec(
        family=family,
        size="narrow",
        device="cpu",
        host_path=str(host_path),
        checkpoint_path=str(file),
        free_gib=budget.vram_gib,
        picture=small_picture(family),
        steps=STEPS,
        runs=1,
    )
    row = FAMILIES[family]
    FAMILIES[family] = row._replace(text=row.text._replace(tokens=TOKENS))
    resident, streamed = run_stock(spec), run_layerstream(spec)
    comfy.model_management.unload_all_models()
    gc.collect()
    (latent,), (streamed_latent,) = resident.run.latent, streamed.run.latent
    return {
        "shape": list(latent.shape),
        "is_finite": bool(latent.isfinite().all()),
        "is_equal": torch.equal(latent, streamed_latent),
        "largest": latent.abs().max().item(),
        "streamed_bytes": streamed.residency.streamed_bytes_per_step,
        "patchers": [resident.facts["patcher"], streamed.facts["patcher"]],
    }


def main() -> None:
    host_path, *families = sys.argv[1:]
    open_host(read_host(Path(host_path)), "--cpu", "--bf16-unet")
    import torch

    # Layers this small gain nothing from more threads, which only wait for each other on a busy machine.
    torch.set_num_threads(1)
    print(json.dumps({family: compare(family, Path(host_path)) for family in families}))


if __name__ == "__main__":
    main()
