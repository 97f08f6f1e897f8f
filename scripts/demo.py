"""Shows that streaming a model changes where its bytes are, never the image.

Writes a model set with random weights, starts a real ComfyUI server with this pack, and runs the example workflow
twice: with everything resident, and with about half of the diffusion model streamed. Compares the two images bit for
bit, prints what the pack measured, and ends with one JSON line. Without a GPU the pack streams to a simulated card.
"""

import argparse
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from .checkpoint_cache import WORKFLOW_FILES, workflow_models
from .checkpoints import stored_bytes
from .client import ServerError
from .example import GIB, Budget, example_prompt, half_resident_budget
from .hosts import Host, HostError, find_host
from .pack import ROOT
from .server import Server, run_server
from .workflow import WorkflowError

OUTPUT = ROOT / "output" / "demo"
FAMILY = "zimage"
RESIDENT_MODE, STREAMED_MODE = "off", "auto"
# Z-Image pads this many image tokens (81) to a multiple of 32, so its pad tokens take part.
CPU_PIXELS, CPU_STEPS = 144, 2
GPU_PIXELS, GPU_STEPS = 1024, 8

STATE_KEYS = (
    "blocks",
    "resident_bytes",
    "streamed_bytes_per_step",
    "moved_bytes_per_step",
    "ring_bytes",
    "host_bytes",
    "peak_bytes",
    "budget_bytes",
    "departures",
)
"""What the JSON line quotes from the pack's own figures."""

Result = TypeVar("Result")


class Run(NamedTuple):
    """One run of the example workflow."""

    image: bytes
    seconds: float


def main() -> None:
    """Run the demo and exit with status 0 only if the images are equal and bytes were streamed."""
    options = _parse_options()
    # Ended from outside, the server must end too: an exception runs the clean-up, the signal's own action would not.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        host = find_host(options.host)
        ok = run_demo(host, size=options.size, serve=options.serve)
    except (HostError, ServerError, WorkflowError) as error:
        sys.exit(f"layerstream: {error}")
    sys.exit(0 if ok else 1)


def run_demo(host: Host, *, size: Any, serve: bool) -> bool:
    """Write the models, run the workflow both ways, report; True if streaming took place and changed no bit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = _timed(f"writing the {size} model set", lambda: workflow_models(size=size, device=device))
    diffusion_model = models[WORKFLOW_FILES["diffusion_model"]]
    budget = half_resident_budget(diffusion_model)
    with _started(host, models, budget) as server:
        resident = _run(server, RESIDENT_MODE, budget, "everything resident")
        streamed = _run(server, STREAMED_MODE, budget, "about half streamed")
        session = _session(server)
        report = _report(host, resident, streamed, session)
        _summarise(report, resident, streamed, stored_bytes(diffusion_model))
        print(json.dumps(report), flush=True)
        if serve:
            _serve(server)
    return report["ok"]


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", metavar="NAME|FOLDER", help="which ComfyUI: a version, a name or a folder")
    parser.add_argument(
        "--size",
        choices=("narrow", "full"),
        default="narrow",
        help="narrow: 2.6 GB of models, a few blocks of the real width; full: Z-Image's real size, 20 GB",
    )
    parser.add_argument("--serve", action="store_true", help="keep the server running for a browser afterwards")
    return parser.parse_args()


def _timed(what: str, work: Callable[[], Result]) -> Result:
    print(f"{what} ...", flush=True)
    begin = time.monotonic()
    result = work()
    print(f"  done in {time.monotonic() - begin:.1f} s", flush=True)
    return result


@contextmanager
def _started(host: Host, models: Any, budget: Budget) -> Iterator[Server]:
    print(f"starting {host.name} ...", flush=True)
    begin = time.monotonic()
    with run_server(host, models, environment=budget.environment) as server:
        print(f"  ready at {server.client.address} in {time.monotonic() - begin:.1f} s", flush=True)
        yield server


def _run(server: Server, mode: str, budget: Budget, label: str) -> Run:
    from tqdm import tqdm

    on_gpu = torch.cuda.is_available()
    pixels, steps = (GPU_PIXELS, GPU_STEPS) if on_gpu else (CPU_PIXELS, CPU_STEPS)
    prompt = example_prompt(
        server.client, mode=mode, budget=budget, pixels=pixels, steps=steps, prefix=f"layerstream-{mode}"
    )
    begin = time.monotonic()
    with tqdm(total=steps, desc=label, unit="step") as bar:

        def show(done: int, total: int) -> None:
            # Loading reports progress too, in other units.
            if total == steps:
                bar.update(done - bar.n)

        history = server.client.queue(prompt, show)
    (image,) = server.client.images(history)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{mode}.png").write_bytes(image)
    return Run(image, time.monotonic() - begin)


def equal_pixels(first: bytes, second: bytes) -> bool:
    """True if two image files show the same pixels; their metadata, which names the workflow, may differ."""
    import numpy
    from PIL import Image

    one, other = (numpy.asarray(Image.open(io.BytesIO(file))) for file in (first, second))
    return one.shape == other.shape and numpy.array_equal(one, other)


def _session(server: Server) -> dict[str, Any]:
    sessions = server.client.get_json("/layerstream/state")["sessions"]
    if len(sessions) != 1:
        raise ServerError(f"one model should stream, the pack reports {len(sessions)}")
    return sessions[0]


def _report(host: Host, resident: Run, streamed: Run, session: dict[str, Any]) -> dict[str, Any]:
    bit_equal = equal_pixels(resident.image, streamed.image)
    return {
        "ok": bit_equal and bool(session["moved_bytes_per_step"]),
        "bit_equal": bit_equal,
        "host": host.name,
        "backend": session["backend"],
        "family": FAMILY,
        **{key: session[key] for key in STATE_KEYS},
    }


def _summarise(report: dict[str, Any], resident: Run, streamed: Run, model_bytes: int) -> None:
    def gib(key: str) -> str:
        return f"{(report[key] or 0) / GIB:.2f} GiB"

    verdict = "equal, bit for bit" if report["bit_equal"] else "DIFFERENT"
    card = f"{gib('resident_bytes')} resident + {gib('ring_bytes')} ring, peak {gib('peak_bytes')}"
    print(f"\n{report['host']}, {report['backend']}: Z-Image, {model_bytes / GIB:.2f} GiB, {report['blocks']} blocks")
    print(f"  images     {verdict}; see {OUTPUT.relative_to(ROOT).as_posix()}/")
    print(f"  card       {card}, budget {gib('budget_bytes')}")
    print(f"  each step  {gib('streamed_bytes_per_step')} of weights streamed as {gib('moved_bytes_per_step')}")
    print(f"  host       {gib('host_bytes')} of weights kept for streaming")
    print(f"  order      {report['departures']} departures from the learned order of blocks")
    print(f"  whole run  {resident.seconds:.1f} s resident (with loading files), {streamed.seconds:.1f} s streamed\n")


def _serve(server: Server) -> None:
    print(f"open {server.client.address} in a browser; Ctrl-C stops the server", flush=True)
    try:
        status = server.process.wait()
    except KeyboardInterrupt:
        return
    raise ServerError(f"the server ended with status {status}")


if __name__ == "__main__":
    main()
