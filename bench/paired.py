"""What streaming costs on a machine whose speed changes by the minute: both ways in one process, prompt by prompt.

    python -m bench.paired --family flux-fp8 --vram-gb 4.2

`bench.step` has each contender alone on a card that is too small, and so at another time. Here the card holds all of
the model beside what LayerStream may take of it by `--vram-gb`: the model with everything on the card samples a prompt,
then the streamed one, then that one first, and so on. Ratios are of neighbours; what both meet cancels. What it does
not show is a card that is full, and whatever else a process has only when it is alone.

Prints a row a pair, and ends with one line of JSON, which is written to `bench/results/paired/` too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import add_shared_arguments, make_spec
from bench.case import pack_version
from bench.child import saying_why
from bench.host_contenders import Prepared, open_layerstream, open_stock
from bench.hosting import has_dynamic_vram, start_host
from bench.machine import find_checkpoint, find_machine
from bench.processor import loop_times_ms
from bench.results import make_result, write_result
from bench.spec import FAMILIES, GIB, WARMUP_STEPS, StepSpec

NAMES = ("resident", "layerstream")


class Prompt(NamedTuple):
    """One prompt: the median of its steps but the first ones, how fast the processor was before it (`bench.processor`),
    the pages that the system had to give or find again, where it counts them, and the latent's bits."""

    step_s: float
    loop_ms: float
    page_faults_per_step: float | None
    latent_sha256: str


Pair = dict[str, Prompt]
"""A prompt of each of `NAMES`."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.paired", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True)
    parser.add_argument("--cfg", type=float, default=1.0, help="above 1 the model runs for a negative prompt too")
    parser.add_argument("--pairs", type=int, default=8, help="prompts of each that are timed")
    add_shared_arguments(parser)
    parser.set_defaults(layerstream_dynamic="off", results=Path(__file__).parent / "results" / "paired")
    arguments = parser.parse_args()
    arguments.contenders = list(NAMES)
    if arguments.pairs < 1:
        parser.error(f"--pairs is {arguments.pairs}: at least one is needed")
    if arguments.vram_gb <= 0:
        parser.error("say with --vram-gb how many GiB of the card LayerStream may take: the card has room for all")
    return arguments


def measure_pairs(spec: StepSpec, count: int) -> list[Pair]:
    """`count` pairs of prompts in the open host, after `spec.runs` of each that are not timed.

    Raises ValueError when the card does not hold both models.
    """
    import torch

    pairs = []
    with torch.inference_mode():
        models = {"resident": open_stock(spec)(), "layerstream": open_layerstream(spec, "auto")()}
        for number in range(spec.runs + count):
            names = NAMES if number % 2 == 0 else NAMES[::-1]
            pair = {name: _prompt(models[name], spec) for name in names}
            if number >= spec.runs:
                pairs.append(pair)
                _print_pair(len(pairs), pair)
            elif spec.device == "cuda":
                _check_is_whole(models["resident"].model)
    return pairs


def _check_is_whole(model: Any) -> None:
    kept_bytes, whole_bytes = model.loaded_size(), model.model_size()
    if kept_bytes < whole_bytes:
        raise ValueError(
            f"of the model that shall be resident {kept_bytes / GIB:.2f} of {whole_bytes / GIB:.2f} GiB are on the "
            "card: lower --vram-gb, or take a card that holds both"
        )


def _prompt(prepared: Prepared, spec: StepSpec) -> Prompt:
    from bench.sampling import sample
    from bench.worker import latent_sha256

    loop_ms, before = statistics.median(loop_times_ms()), _page_faults()
    run = sample(prepared.model, spec)
    faults = None if before is None else (_page_faults() - before) / spec.steps
    return Prompt(statistics.median(run.steps_s[WARMUP_STEPS - 1 :]), loop_ms, faults, latent_sha256(run.latent))


def _page_faults() -> Any:
    """Of this process so far, without those that read a disk; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def summarise(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios of streamed to resident steps: the median over the pairs, and the quarters beside it; and whether all
    latents have the same bits."""
    ratios = [pair["layerstream"].step_s / pair["resident"].step_s for pair in pairs]
    low, median, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "ratio_median": median,
        "ratio_low_quarter": low,
        "ratio_high_quarter": high,
        "bit_equal": len({prompt.latent_sha256 for pair in pairs for prompt in pair.values()}) == 1,
        **{f"{name}_step_s_median": statistics.median(pair[name].step_s for pair in pairs) for name in NAMES},
    }


def _print_pair(number: int, pair: Pair) -> None:
    row = [f"{number:>4}{pair['layerstream'].step_s / pair['resident'].step_s:>8.3f}"]
    for name in NAMES:
        step_s, loop_ms, faults, _ = pair[name]
        row.append(f"{step_s:>15.4f}{loop_ms:>9.1f}{'-' if faults is None else f'{faults:.0f}':>9}")
    print("".join(row), flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for."""
    spec = make_spec(arguments, arguments.family, arguments.vram_gb, arguments.cfg)
    machine, checkpoint = find_machine(arguments), find_checkpoint(arguments, arguments.family)
    spec = dataclasses.replace(spec, checkpoint_path=checkpoint.path)
    if spec.device == "cpu":
        os.environ["LAYERSTREAM_SIMULATE_GIB"] = str(checkpoint.bytes / GIB + 1)
    dynamic = spec.layerstream_dynamic and has_dynamic_vram(spec.host_path)
    version = start_host(spec.host_path, device=spec.device, dynamic=dynamic)
    print(
        f"{machine['device']}: {spec.family}, {checkpoint.bytes / GIB:.2f} GiB, LayerStream may take {spec.vram_gib:g}"
    )
    print(f"{'pair':>4} {'ratio':>7}" + "".join(f"{f'{name} s':>15}{'loop ms':>9}{'faults':>9}" for name in NAMES))
    pairs = measure_pairs(spec, arguments.pairs)
    summary = summarise(pairs)
    low, high, bits = summary["ratio_low_quarter"], summary["ratio_high_quarter"], summary["bit_equal"]
    print(f"median {summary['ratio_median']:.3f}, half of the pairs between {low:.3f} and {high:.3f}")
    print("bits equal" if bits else "BITS DIFFER")
    rows = [{name: prompt._asdict() for name, prompt in pair.items()} for pair in pairs]
    versions = {"layerstream": pack_version(), "comfyui": version, "torch": machine["torch"], "cuda": machine["cuda"]}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    result = make_result(spec, machine, versions=versions, date=date, paired=summary, pairs=rows)
    print(f"written: {write_result(arguments.results, result).name}\n")
    print(json.dumps({"family": spec.family, "vram_gib": spec.vram_gib, **summary}), flush=True)


def main() -> None:
    with saying_why("paired"):
        run(parse_arguments())


if __name__ == "__main__":
    main()
