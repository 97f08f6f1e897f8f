"""How near the estimates of what a stage takes beside weights come to what it really takes.

`python -m bench.estimates` builds narrow models of every listed family with ComfyUI's own classes, estimates each stage
by formula and by dry run, runs it, and compares: on a card with the allocator's peak, on the CPU with the storages that
the real run held at once. ComfyUI's formulas are made for published widths, so only dry runs are to be near here.
Prints a table, and last a line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from bench.arguments import find_host_path
from bench.hosting import start_host

MIB = 1024**2
FAMILIES = ("zimage", "flux", "flux2", "qwen-image", "sdxl", "sd35-medium", "wan21-t2v", "hunyuan-video", "ltxv")
ENCODERS = ("clip_l", "clip_g", "t5xxl", "qwen3_4b", "mistral3_24b", "gemma2_2b")
VAE_SCALE = 8
PUBLISHED_LATENT = (1, 16, 128, 128)
"""Of an image of 1024x1024; what a VAE takes besides tensors depends on its widths."""
COLUMNS = ("formula_mib", "dryrun_mib", "measured_mib", "dryrun_share")


class Stage(NamedTuple):
    """One stage: its work as `streaming.host.dryrun` has it, and ComfyUI's own number."""

    name: str
    work: Any
    formula: Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--host", help="a ComfyUI folder or version; the newest that is found otherwise")
    add("--scale", type=int, help="how many times larger than in the tests latents are: 4 on a card, 1 on the CPU")
    arguments = parser.parse_args()
    start_host(str(find_host_path(arguments.host)), device=arguments.device, dynamic=False)
    import torch

    from scripts.pack import load_pack

    load_pack()
    from layerstream.streaming.engine.live_bytes import peak_of

    rows: list[dict[str, Any]] = []
    print("| stage | formula MiB | dry run MiB | measured MiB | dry run / measured |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for stage in stages(arguments.scale or (4 if arguments.device == "cuda" else 1), arguments.device):
            estimated = peak_of(*stage.work)
            measured = measure(stage.work, arguments.device)
            numbers = [stage.formula() / MIB, estimated / MIB, measured / MIB, estimated / measured]
            rows.append({"stage": stage.name, **dict(zip(COLUMNS, numbers, strict=True))})
            print(f"| {stage.name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |", flush=True)
    worst = max(abs(row["dryrun_share"] - 1) for row in rows)
    print(json.dumps({"device": arguments.device, "worst_dryrun_error": worst, "rows": rows}))


def stages(scale: int, device: str) -> Iterator[Stage]:
    """Every stage, one after the other, its model made when it is asked for; on a card FLUX's whole VAE first."""
    from layerstream.streaming.host import dryrun, estimate

    from scripts import tiny_components, tiny_models

    if device == "cuda":
        vae = published_vae()
        formula = partial(vae.memory_used_decode, PUBLISHED_LATENT, vae.vae_dtype)
        yield Stage("decode, FLUX 1024x1024", dryrun.decode(vae, PUBLISHED_LATENT), formula)
    vae = tiny_components.tiny_vae()
    shape = (1, 4, 16 * scale, 16 * scale)
    pixels = (1, 3, *(VAE_SCALE * side for side in shape[2:]))
    yield Stage("decode", dryrun.decode(vae, shape), lambda: int(vae.memory_used_decode(shape, vae.vae_dtype)))
    yield Stage("encode", dryrun.encode(vae, pixels), lambda: int(vae.memory_used_encode(pixels, vae.vae_dtype)))
    for name in ENCODERS:
        clip, tokens = tiny_components.tiny_clip(name), tiny_components.tokens_for(name)
        yield Stage(f"text {name}", dryrun.encode_text(clip, tokens), partial(estimate.text_bytes, clip, tokens))
    for name in FAMILIES:
        if not tiny_models.is_in_host(name):
            continue
        yield from (_sampling(name, scale, is_guided) for is_guided in (False, True))


def published_vae() -> Any:
    """FLUX's VAE with random weights, as ComfyUI loads it."""
    import comfy.sd
    import comfy.utils

    from scripts import checkpoint_cache

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(checkpoint_cache.vae("zimage"))))


def _sampling(name: str, scale: int, is_guided: bool) -> Stage:
    import comfy.sampler_helpers
    import torch
    from layerstream.streaming.host import dryrun, estimate

    from scripts import tiny_models
    from scripts.model_configurations import MODELS

    model, generator = MODELS[name], torch.Generator().manual_seed(0)
    patcher = tiny_models.build_tiny_model(name)
    conds = {
        side: comfy.sampler_helpers.convert_cond(tiny_models.conditioning(model, generator))
        for side in ("positive", "negative")
    }
    *rest, height, width = model.latent
    shape = (1, *rest, height * scale, width * scale)
    return Stage(
        f"{name}{' guided' if is_guided else ''}",
        dryrun.sample(patcher, shape, conds, is_guided),
        lambda: estimate.sampling_bytes(patcher, shape, conds, is_guided),
    )


def measure(work: Any, device: str) -> int:
    """The peak of a real run beside the weights, in bytes; on a card of the second run, when libraries are loaded."""
    import torch
    from layerstream.streaming.engine.live_bytes import LiveBytes

    if device == "cpu":
        with LiveBytes(work.device) as live:
            work.run()
        return live.peak_bytes
    work.module.to(work.device)
    work.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work.run()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    work.module.to("cpu")
    return peak_bytes


if __name__ == "__main__":
    main()
