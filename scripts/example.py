"""The example workflow, made ready to queue: as a prompt, and with a memory budget that makes the model stream."""

import json
from pathlib import Path
from typing import NamedTuple

from .checkpoints import largest_block_bytes, stored_bytes
from .client import Client
from .pack import ROOT
from .workflow import Prompt, set_inputs, to_prompt

EXAMPLE_WORKFLOW = ROOT / "example_workflows" / "layerstream_zimage.json"
STREAMING_NODE = "LayerStreamModel"
SIMULATED_CARD = "LAYERSTREAM_SIMULATE_GIB"
"""The environment variable that gives a machine without a GPU a simulated card of so many GiB."""

GIB = 1024**3
PREFETCH_BLOCKS = 0
STREAMED_SHARE = 0.5
RING_BLOCKS = 0.6
# A card needs a little beside the budget, or rounding to whole tensors would not fit.
CARD_SLACK_GIB = 0.05


class Budget(NamedTuple):
    """How much of the card a model may take."""

    vram_gib: float

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the server: the simulated card is hardly larger than the budget."""
        return {SIMULATED_CARD: f"{self.vram_gib + CARD_SLACK_GIB:.3f}"}


def half_resident_budget(diffusion_model: Path) -> Budget:
    """The budget under which half of a diffusion model file stays on the card and half streams.

    What streams needs room on the card too: a ring of the largest parts of blocks, which are less than a third each.
    """
    resident = (1 - STREAMED_SHARE) * stored_bytes(diffusion_model)
    ring = RING_BLOCKS * largest_block_bytes(diffusion_model)
    return Budget(round((resident + ring) / GIB, 3))


def example_prompt(client: Client, *, mode: str, budget: Budget, pixels: int, steps: int, prefix: str) -> Prompt:
    """The example workflow as a prompt for the server behind `client`, with these settings in place of its own.

    Raises:
        WorkflowError: the server lacks one of the workflow's nodes.
    """
    workflow = json.loads(EXAMPLE_WORKFLOW.read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, client.get_json("/object_info"))
    set_inputs(prompt, "EmptySD3LatentImage", width=pixels, height=pixels)
    set_inputs(prompt, "KSampler", steps=steps)
    set_inputs(prompt, "SaveImage", filename_prefix=prefix)
    set_inputs(
        prompt,
        STREAMING_NODE,
        mode=mode,
        prefetch_blocks=PREFETCH_BLOCKS,
        vram_gb=budget.vram_gib,
        min_free_mb=0,
    )
    return prompt
