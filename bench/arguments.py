"""The command-line options that benchmarks of sampling share, and the spec that they make.

In: an `argparse` parser or what it read. Out: options, contenders' names, a `StepSpec` without its model file.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bench.contenders import CONTENDERS, HOST_REFERENCE, STANDARD, with_references
from bench.spec import FAMILIES, Picture, StepSpec


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is asked of every case alike."""
    add = parser.add_argument
    add("--contenders", help=f"comma-separated, of: {', '.join(CONTENDERS)}; standard are {', '.join(STANDARD)}")
    add("--resolution", help="side, or WIDTHxHEIGHT[xFRAMES]; what the family's example workflow makes otherwise")
    add("--batch", type=int, default=1)
    add("--steps", type=int, default=6, help="the first two are not timed")
    add("--runs", type=int, default=2, help="prompts in a row; all but the first step are timed in the last")
    add("--host", help="a ComfyUI folder or version; the newest that is found otherwise")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that all runs, its times mean nothing")
    add("--size", choices=("full", "narrow"), help="narrow is a few blocks, and the default on the CPU")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "layerstream-bench", help="folder of model files")
    add("--prefetch", type=int, help="blocks that LayerStream fetches ahead; 0 is its own choice")
    add("--layerstream-mode", choices=("auto", "always"), default="auto", help="what LayerStream streams")
    add("--layerstream-dynamic", choices=("on", "off"), default="on", help="the host's DynamicVRAM beneath it")
    add("--vram-gb", type=float, default=0.0, help="LayerStream's own memory limit in GiB; 0 for none")
    add("--ram-gb", type=float, default=0.0, help="GiB of RAM that LayerStream may take for weights; 0 for its choice")
    add("--lora-rank", type=int, default=0, help="put a LoRA of this rank on every block, for all contenders")
    add("--patching", choices=("auto", "baked", "run_time"), default="auto", help="how LayerStream applies it")
    add("--synchronize", choices=("device", "stream"), default="stream", help="what the end of a step waits for")
    add(
        "--trace",
        action="store_true",
        help="add the timeline of one step of ComfyUI's own ways and LayerStream, after the timed ones",
    )
    add("--link-gib-s", type=float, help="use this link bandwidth and not the measured one")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    add("--keep", type=Path, help="keep the contenders' logs and latents in this folder")
    add("--timeout-s", type=float, default=300.0, help="longest run of one contender, in each round")


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Add how often a case's contenders run in turn."""
    parser.add_argument(
        "--rounds",
        type=_read_rounds,
        default=1,
        help="run all contenders in turn so often; the figures of each are those of its median round",
    )


def _read_rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError(f"{rounds} rounds: at least one is needed")
    return rounds


def read_contenders(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, standard: Sequence[str] = STANDARD
) -> list[str]:
    """The contenders' names, each after the reference that it needs; ends the program when one is unknown."""
    if arguments.contenders:
        names = arguments.contenders.split(",")
    else:
        names = ["resident", "layerstream"] if arguments.device == "cpu" else list(standard)
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown contender {', '.join(unknown)}: choose of {', '.join(CONTENDERS)}")
    return with_references(names)


def model_size(arguments: argparse.Namespace) -> Literal["narrow", "full"]:
    """The size of the random model files: narrow ones on the CPU unless something else was asked for."""
    return arguments.size or ("narrow" if arguments.device == "cpu" else "full")


def read_picture(text: str | None, family: str) -> Picture:
    """`1024`, `832x480` or `832x480x33` in pixels and frames, and the family's own where nothing is said.

    Raises ValueError when it is anything else.
    """
    own = FAMILIES[family].picture
    if text is None:
        return own
    match = re.fullmatch(r"(\d+)(?:x(\d+)(?:x(\d+))?)?", text)
    if match is None:
        raise ValueError(f"resolution `{text}` is no side and not WIDTHxHEIGHT[xFRAMES]")
    width, height, frames = match.groups()
    return Picture(int(width), int(height or width), int(frames or own.frames))


def make_spec(arguments: argparse.Namespace, family: str, free_gib: float | None, cfg: float) -> StepSpec:
    """What is asked for, checked, without the model file's path; no `free_gib` is half of the model.

    Raises ValueError and HostError.
    """
    if free_gib is None and HOST_REFERENCE not in arguments.contenders:
        raise ValueError(f"half of a model is known once it ran resident: name {HOST_REFERENCE} among the contenders")
    return StepSpec(
        family=family,
        size=model_size(arguments),
        device=arguments.device,
        host_path=str(find_host_path(arguments.host)),
        checkpoint_path="",
        free_gib=free_gib,
        picture=read_picture(arguments.resolution, family),
        is_half=free_gib is None,
        batch=arguments.batch,
        cfg=cfg,
        steps=arguments.steps,
        runs=arguments.runs,
        synchronize=arguments.synchronize,
        layerstream_mode=arguments.layerstream_mode,
        layerstream_dynamic=arguments.layerstream_dynamic == "on",
        prefetch_blocks=arguments.prefetch,
        vram_gib=arguments.vram_gb,
        ram_gib=arguments.ram_gb,
        patching=arguments.patching,
        lora_rank=arguments.lora_rank,
        trace=arguments.trace,
    )


def find_host_path(choice: str | None) -> Path:
    """The ComfyUI tree to run: `choice`, a folder or version, or the newest that is found."""
    from scripts.hosts import find_host, find_hosts, prepare_host

    if choice is not None:
        return prepare_host(find_host(choice))
    return prepare_host(max(find_hosts(), key=lambda host: [int(part) for part in re.findall(r"\d+", host.version)]))
