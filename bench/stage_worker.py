"""One case of `bench.stages` in its own process: runs whole prompts, and prints what they took as one line of JSON.

In: the case's name and its spec. Out: JSON on the last line of standard output, the image as safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.hosting import start_host
from bench.spec import GIB, SAMPLER, SCHEDULER
from bench.stage_cases import CASES, StageSpec

LATENT_DOWNSCALE = 8
TILE_PIXELS = 512
OVERLAP_PIXELS = 64


class Parts(NamedTuple):
    """What a workflow is made of, as ComfyUI's loaders and then the policy's node give it."""

    model: Any
    clip: Any
    vae: Any


class Prompt(NamedTuple):
    """One prompt: its image and the seconds of its stages."""

    image: Any
    seconds: dict[str, float]


def run(name: str, spec: StageSpec, image_path: Path) -> dict:
    """Run the prompts of case `name`; the last one's image goes to `image_path`."""
    case = CASES[name]
    start_host(spec.host_path, device=spec.device, dynamic=case.is_dynamic)
    import torch
    from safetensors.torch import save_file

    from scripts.pack import load_pack

    load_pack()
    with torch.inference_mode():
        parts = _governed(case.mode, _load(spec, is_text_on_cpu=case.is_text_on_cpu))
        prompts = [_run_prompt(parts, spec, index, is_tiled=case.is_tiled) for index in range(spec.prompts)]
    save_file({"image": prompts[-1].image.contiguous()}, image_path)
    return {
        "name": name,
        "first_prompt_s": sum(prompts[0].seconds.values()),
        "prompt_s": min(sum(prompt.seconds.values()) for prompt in prompts[1:] or prompts),
        "stages_s": prompts[-1].seconds,
        "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB if spec.device == "cuda" else None,
        "moves": {part: _moves(value) for part, value in zip(Parts._fields, _patchers(parts), strict=True)},
    }


def _load(spec: StageSpec, *, is_text_on_cpu: bool) -> Parts:
    import comfy.sd
    import comfy.utils
    import torch

    cpu = torch.device("cpu")
    options = {"load_device": cpu, "offload_device": cpu} if is_text_on_cpu else {}
    return Parts(
        comfy.sd.load_diffusion_model(spec.model_path),
        comfy.sd.load_clip([spec.text_path], clip_type=comfy.sd.CLIPType.LUMINA2, model_options=options),
        comfy.sd.VAE(sd=comfy.utils.load_torch_file(spec.vae_path)),
    )


def _governed(mode: str | None, parts: Parts) -> Parts:
    """The parts under the Offload Policy node; stock where there is no mode."""
    if mode is None:
        return parts
    from layerstream.streaming.host.govern import Parts as Governed
    from layerstream.streaming.host.govern import govern
    from layerstream.streaming.host.policy import PolicyMode, PolicySettings

    return Parts(*govern(Governed(*parts), PolicySettings(PolicyMode(mode))))


def _run_prompt(parts: Parts, spec: StageSpec, index: int, *, is_tiled: bool) -> Prompt:
    """Text to image as the nodes do it; the texts of each prompt are new, so that they are encoded."""
    import comfy.sample
    import torch

    seconds: dict[str, float] = {}
    with _timed("text", spec.device, seconds):
        positive, negative = (
            parts.clip.encode_from_tokens_scheduled(parts.clip.tokenize(f"{text}, number {index}"))
            for text in ("a lighthouse in a storm at night, oil on canvas", "blurred")
        )
    side = spec.resolution // LATENT_DOWNSCALE
    latent = comfy.sample.fix_empty_latent_channels(parts.model, torch.zeros(1, 4, side, side))
    noise = comfy.sample.prepare_noise(latent, spec.seed + index)
    with _timed("sampling", spec.device, seconds):
        samples = comfy.sample.sample(
            parts.model, noise, spec.steps, spec.cfg, SAMPLER, SCHEDULER, positive, negative, latent,
            disable_pbar=True, seed=spec.seed + index,
        )  # fmt: skip
    with _timed("decode", spec.device, seconds):
        if is_tiled:
            tile, overlap = TILE_PIXELS // LATENT_DOWNSCALE, OVERLAP_PIXELS // LATENT_DOWNSCALE
            image = parts.vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=overlap)
        else:
            image = parts.vae.decode(samples)
    return Prompt(image.cpu(), seconds)


@contextlib.contextmanager
def _timed(stage: str, device: str, seconds: dict[str, float]) -> Iterator[None]:
    import torch

    begin = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    seconds[stage] = time.perf_counter() - begin


def _patchers(parts: Parts) -> tuple[Any, Any, Any]:
    return parts.model, parts.clip.patcher, parts.vae.patcher


def _moves(patcher: Any) -> dict[str, float] | None:
    """What LayerStream counted of a part; ComfyUI's own moves are not counted by anyone."""
    stream = getattr(patcher, "stream", None)
    if stream is None:
        return None
    moves = stream.moves
    return {
        "returns": moves.returns.count,
        "returned_gib": moves.returns.bytes / GIB,
        "return_gib_s": moves.returns.bytes / GIB / moves.returns.seconds if moves.returns.count else 0.0,
        "departures": moves.departures.count,
        "departed_gib": moves.departures.bytes / GIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    print(json.dumps(run(arguments.case, StageSpec.read(arguments.spec), arguments.image)), flush=True)


if __name__ == "__main__":
    main()
