"""Packs what people install: the tracked files less those that `.comfyignore` names, as `comfy node pack` does."""

import argparse
import subprocess
import zipfile
from pathlib import Path

from .pack import ROOT

IGNORED = ROOT / ".comfyignore"


def packed_files() -> list[str]:
    """The files that are packed, by their paths in the repository."""
    command = ["git", "ls-files", "--cached", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    ignored = tuple(IGNORED.read_text(encoding="utf-8").split())
    return [name for name in listed if name and (ROOT / name).is_file() and not name.startswith(ignored)]


def write_zip(target: Path) -> Path:
    """Write the packed files to `target` and give it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed_files():
            archive.write(ROOT / name, name)
    return target


def main() -> None:
    """Write `node.zip`, or the file that is named, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, default=ROOT / "node.zip")
    target = write_zip(parser.parse_args().target)
    print(f"{target}: {len(packed_files())} files, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
