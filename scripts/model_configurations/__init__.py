"""The models of every family: as they are published, and narrow ones with the same parts.

In: a name. Out: what ComfyUI's classes are built from and what a sampler must give them. "full" is what ComfyUI detects
in the published file; "narrow" replaces widths and depths so that a pass takes milliseconds, and keeps every choice of
parts. Plain data; nothing here imports torch or ComfyUI.
"""

from . import convolution, flux, image, unlisted, video, wan
from .model import NEWER, OLDER, Model, Random, Values, Vision

MODELS: dict[str, Model] = {
    **flux.MODELS,
    **image.MODELS,
    **convolution.MODELS,
    **wan.MODELS,
    **video.MODELS,
    **unlisted.MODELS,
}

__all__ = ["MODELS", "NEWER", "OLDER", "Model", "Random", "Values", "Vision"]
