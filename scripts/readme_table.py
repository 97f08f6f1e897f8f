"""Writes the README's table and picture of measured step times from the files in `bench/results`.

    python -m scripts.readme_table

Only what the files hold is written: the newest measurement of each case, times as ratios to the resident run beside
it. What stands outside the marks is left as it is.
"""

from __future__ import annotations

from .measured import newest, picture, read_results, table
from .pack import ROOT

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
PICTURE = "docs/images/measured.svg"


def main() -> None:
    results = newest(read_results(ROOT / "bench" / "results"))
    readme = ROOT / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    body = f"![Seconds a denoising step]({PICTURE})\n\n{table(results)}"
    readme.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}", encoding="utf-8")
    (ROOT / PICTURE).write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
