"""How tests of the host run a governed workflow: narrow parts of ComfyUI's own classes on a simulated card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import nodes
import torch
from layerstream.streaming.host.govern import Parts, govern
from layerstream.streaming.host.policy import PolicySettings

from scripts.tiny_components import tiny_clip, tiny_vae, tokens_for

ENCODER = "clip_l"


class Results(NamedTuple):
    """What a workflow made."""

    positive: torch.Tensor
    negative: torch.Tensor
    latent: torch.Tensor
    image: torch.Tensor


class Workflow:
    """Text to image with parts that ComfyUI or a policy moves; the latent is not the one that is decoded."""

    def __init__(self, parts: Parts, sample: Callable[..., torch.Tensor]) -> None:
        self.model, self.clip, self.vae = parts
        self._sample = sample

    def encode(self, seed: int = 0) -> torch.Tensor:
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(tokens_for(ENCODER, seed))[0][0]

    def sample(self, **how: Any) -> torch.Tensor:
        return self._sample(self.model, **how)

    def decode(self) -> torch.Tensor:
        samples = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            return nodes.VAEDecode().decode(self.vae, {"samples": samples})[0]

    def encode_image(self) -> torch.Tensor:
        pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            return nodes.VAEEncode().encode(self.vae, pixels)[0]["samples"]

    def run(self) -> Results:
        return Results(self.encode(0), self.encode(1), self.sample(), self.decode())

    def on_card(self) -> set[str]:
        """Which parts have weights on the card, by the stream of their patcher."""
        patchers = {"model": self.model, "clip": self.clip.patcher, "vae": self.vae.patcher}
        return {name for name, patcher in patchers.items() if held_bytes(patcher) > 0}


def held_bytes(patcher: Any) -> int:
    return patcher.stream.held_bytes if hasattr(patcher, "stream") else 0


def make_parts(load: Callable[..., Any]) -> Parts:
    with torch.inference_mode():
        return Parts(load("flux", size="tiny"), tiny_clip(ENCODER), tiny_vae())


def governed(parts: Parts, sample: Callable[..., torch.Tensor], **settings: Any) -> Workflow:
    return Workflow(govern(parts, PolicySettings(**settings)), sample)
