"""What a configuration says of one model. Plain data; nothing here imports torch or ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Settings = dict[str, Any]
Shape = tuple[int, ...]

OLDER, NEWER = "0.3.75", "0.33.0"
TEXT_TOKENS = 20


class Random(NamedTuple):
    """An input of random values, one a batch item."""

    shape: Shape


class Values(NamedTuple):
    """An input tensor of these values."""

    values: list[Any]


class Vision(NamedTuple):
    """What a vision encoder gives: its last two hidden states, random, of this shape, for an image of this size."""

    shape: Shape
    image: Shape | None = None


@dataclass(frozen=True)
class Model:
    """One model of a family.

    `supported` is its class in `comfy.supported_models`. Shapes are without the batch. `inputs` are further entries of
    its conditioning: `Random`, `Values`, `Vision`, lists of them, anything else as it is. `newer` are settings that
    only hosts from `NEWER` on know. `loads_since` is the first host that finds a narrow model's widths in its file.
    `is_listed` says whether the pack has a row for it; a slow one has parts that cannot be narrow.
    """

    supported: str
    full: Settings
    narrow: Settings
    latent: Shape
    text: Shape | None = None
    more_latents: tuple[Shape, ...] = ()
    pooled: int | None = None
    inputs: Settings = field(default_factory=dict)
    newer: Settings = field(default_factory=dict)
    since: str = OLDER
    loads_since: str | None = None
    is_listed: bool = True
    is_slow: bool = False
    family: str = ""

    def settings(self, *, narrow: bool, is_newer: bool) -> Settings:
        """What the host's class is built from."""
        return {**self.full, **(self.newer if is_newer else {}), **(self.narrow if narrow else {})}


TEXT_MASK: Settings = {"attention_mask": Values([[1] * TEXT_TOKENS])}


def text(width: int, tokens: int = TEXT_TOKENS) -> Shape:
    return (tokens, width)
