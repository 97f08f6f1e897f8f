"""Writes the README's table of measured step times from the files in `bench/results`.

    python -m scripts.readme_table

Only what the files hold is written: one row a measurement, times as ratios to the resident run beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .pack import ROOT

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
CONTENDERS = (("resident", "resident"), ("dynamic", "ComfyUI DynamicVRAM"), ("lowvram", "ComfyUI low VRAM"))


def read_results(folder: Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(results, key=lambda result: (result["family"], -result["free_gib"]))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: seconds a step for each way and, for LayerStream, its ratio to the resident step."""
    heads = ["model", "free on the card", *(title for _, title in CONTENDERS), "**LayerStream**", "ratio", "date"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        rows = {row["name"]: row for row in result["contenders"]}
        ours = rows["layerstream"]
        cells = [f"{result['family']} ({result['weights_gib']:.1f} GiB)", f"{result['free_gib']:g} GiB"]
        cells += [_seconds(rows.get(name)) for name, _ in CONTENDERS]
        cells += [f"**{_seconds(ours)}**", f"{ours['ratio_to_resident']:.2f}", result["date"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "-"
    return f"{row['step_s_median']:.3f} s" if row["bit_equal"] else f"{row['step_s_median']:.3f} s (other bits)"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    body = table(read_results(ROOT / "bench" / "results"))
    readme.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
