"""Makes the pictures of the example workflows, and the README's, out of the ones that a browser took.

LAYERSTREAM_SCREENSHOTS=FOLDER python -m pytest tests/browser/test_examples.py
python -m scripts.workflow_pictures FOLDER
"""

import argparse
from pathlib import Path

from PIL import Image

from .example import EXAMPLES, workflow_of
from .pack import ROOT

WIDTH = 1280
QUALITY = 85
README_EXAMPLE = "zimage"
README_PICTURE = ROOT / "docs" / "images" / "graph.png"


def main() -> None:
    """Write a picture for each example that the folder has one of; the README's shows the graph without the note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("layerstream_*.png")):
        taken = Image.open(path).convert("RGB")
        shrunk(taken).save(EXAMPLES / f"{path.stem}.jpg", quality=QUALITY, progressive=True, optimize=True)
        name = path.stem.removeprefix("layerstream_")
        if name == README_EXAMPLE:
            shrunk(taken.crop((width_of_note(name), 0, *taken.size))).quantize().save(README_PICTURE, optimize=True)


def shrunk(taken: Image.Image) -> Image.Image:
    return taken.resize((WIDTH, round(taken.height * WIDTH / taken.width)), Image.Resampling.LANCZOS)


def width_of_note(name: str) -> int:
    """Pixels of the picture that are left of the groups."""
    workflow = workflow_of(name)
    left = min(node["pos"][0] for node in workflow["nodes"])
    return int(min(group["bounding"][0] for group in workflow["groups"]) - left)


if __name__ == "__main__":
    main()
