"""The family matrix: every family, streamed in every way, gives the resident result bit for bit, in every ComfyUI.

    python -m bench.families

In: the ComfyUI trees that are found. Out: the table in `docs/families.md`, and one line of JSON. Runs on the CPU with
a simulated card that fills what it frees with NaN and delays copies at random; nothing is timed. Each model is sampled
by ComfyUI's own sampler with all of it streamed, half, and nearly all resident; with one and two latents; with guidance
and without. Sizes are those of the published models; what runs are narrow ones of the same classes.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.child import ROOT, child_command
from scripts.model_configurations import MODELS

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
GIB, MIB = 1024**3, 1024**2

Rows = dict[str, dict[str, Any]]
"""By model: how the published one is divided, and what the narrow one showed."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"comma-separated, of: {', '.join(MODELS)}; the page is not written then")
    parser.add_argument("--few", action="store_true", help="three cases a model and not twelve")
    parser.add_argument("--host", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.names = arguments.models.split(",") if arguments.models else list(MODELS)
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}: choose of {', '.join(MODELS)}")
    return arguments


def run_in_host(host_path: Path, names: Sequence[str], few: bool) -> Rows:
    """Run the matrix in the ComfyUI tree at `host_path`, in this process, which must not have another one open."""
    from scripts.hosts import open_host, read_host

    host = read_host(host_path)
    open_host(host, "--cpu", "--bf16-unet")
    logging.disable(logging.WARNING)
    import comfy.utils

    from scripts.family_matrix import CASES, FEW_CASES, run_model
    from scripts.tiny_models import is_in_host

    comfy.utils.PROGRESS_BAR_ENABLED = False
    rows: Rows = {}
    with tempfile.TemporaryDirectory(prefix="layerstream-families-") as folder:
        for name in filter(is_in_host, names):
            outcome = run_model(name, Path(folder), FEW_CASES if few else CASES)
            rows[name] = asdict(outcome)
            print(f"{host.name}: {name}: {verdict(rows[name])}", *outcome.wrong, sep="\n    ", flush=True)
    return rows


def run_in_child(host_path: Path, arguments: argparse.Namespace, out: Path) -> Rows:
    """Run the matrix of one host in a process of its own, since two hosts' modules have the same names."""
    options = ["--host", str(host_path), "--out", str(out), "--models", ",".join(arguments.names)]
    options += ["--few"] if arguments.few else []
    subprocess.run(child_command("families", options), cwd=ROOT, check=True)
    return json.loads(out.read_text(encoding="utf-8"))


def verdict(row: Mapping[str, Any]) -> str:
    """One host's cell of the table."""
    source = "file" if row["from_file"] else "class"
    return f"{row['equal']} of {row['cases']} equal, {row['departures']} departures, {source}"


def table(found: Mapping[str, Rows]) -> str:
    """Markdown: one row a model, sizes of the published one, and each host's verdict."""
    heads = ["model", "class", "found by", "GiB", "units", "largest MiB", "median MiB", "in no unit MiB", *found]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, model in MODELS.items():
        rows = [rows.get(name) for rows in found.values()]
        full = next((row["full"] for row in reversed(rows) if row), None)
        if full is None:
            continue
        cells = [model.family, full["family"].rpartition(".")[2], "row" if full["is_listed"] else "search"]
        cells += [f"{full['total_bytes'] / GIB:.1f}", str(full["units"])]
        cells += [f"{full[key] / MIB:.0f}" for key in ("largest_bytes", "median_bytes", "outside_bytes")]
        cells += [verdict(row) if row else "-" for row in rows]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(body: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    PAGE.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    if arguments.host is not None:
        arguments.out.write_text(json.dumps(run_in_host(arguments.host, arguments.names, arguments.few)), "utf-8")
        return
    from scripts.hosts import HostError, find_hosts, prepare_host

    try:
        hosts = sorted(find_hosts(), key=lambda host: [int(part) for part in host.version.split(".") if part.isdigit()])
    except HostError as error:
        sys.exit(f"bench.families: {error}")
    with tempfile.TemporaryDirectory(prefix="layerstream-families-") as folder:
        found = {
            host.version: run_in_child(prepare_host(host), arguments, Path(folder) / f"{host.name}.json")
            for host in hosts
        }
    print("\n" + table(found) + "\n")
    is_whole = not arguments.few and not arguments.models
    if is_whole:
        write_page(table(found))
    rows = [row for rows in found.values() for row in rows.values()]
    wrong = sum(len(row["wrong"]) for row in rows)
    summary = {"models": len(rows), "cases": sum(row["cases"] for row in rows), "wrong": wrong, "hosts": list(found)}
    print(json.dumps({**summary, "written": is_whole}), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
