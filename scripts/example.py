"""The example workflows, made ready to queue: as prompts, and with a memory budget that makes their models stream."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import largest_block_bytes, stored_bytes
from .client import Client
from .pack import ROOT
from .workflow import Prompt, set_inputs, to_prompt

EXAMPLES = ROOT / "example_workflows"
STREAMING_NODE = "LayerStreamModel"
SIMULATED_CARD = "LAYERSTREAM_SIMULATE_GIB"
"""The environment variable that gives a machine without a GPU a simulated card of so many GiB."""

GIB = 1024**3
STREAMED_SHARE = 0.5
# Blocks are fetched whole up to this size, larger ones in parts.
LARGEST_UNIT_BYTES = 96 * 1024**2
LARGEST_PART = 0.3
UNITS_IN_FLIGHT = 2
# A card needs a little beside the budget, or rounding to whole tensors would not fit.
CARD_SLACK_GIB = 0.05


class Budget(NamedTuple):
    """How much of the card a model may take."""

    vram_gib: float

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the server: the simulated card is hardly larger than the budget."""
        return {SIMULATED_CARD: f"{self.vram_gib + CARD_SLACK_GIB:.3f}"}


def half_resident_budget(file: Path) -> Budget:
    """The budget under which about half of the diffusion model in a file stays on the card and half streams.

    What streams takes room there too: a ring for two units, which are blocks or the largest parts of large ones.
    """
    block = largest_block_bytes(file)
    ring = UNITS_IN_FLIGHT * min(block, max(LARGEST_UNIT_BYTES, LARGEST_PART * block))
    resident = (1 - STREAMED_SHARE) * (stored_bytes(file) - ring)
    return Budget(round((resident + ring) / GIB, 3))


def workflow_of(name: str) -> dict[str, Any]:
    """The example workflow of this name, as the browser saves it."""
    workflow: dict[str, Any] = json.loads((EXAMPLES / f"layerstream_{name}.json").read_text(encoding="utf-8"))
    return workflow


def example_prompt(client: Client, *, mode: str, budget: Budget, pixels: int, steps: int, prefix: str) -> Prompt:
    """The Z-Image workflow as a prompt for the server behind `client`, with these settings in place of its own.

    Raises:
        WorkflowError: the server lacks one of the workflow's nodes.
    """
    prompt = to_prompt(workflow_of("zimage"), client.get_json("/object_info"))
    set_inputs(prompt, "EmptySD3LatentImage", width=pixels, height=pixels)
    set_inputs(prompt, "KSampler", steps=steps)
    set_inputs(prompt, "SaveImage", filename_prefix=prefix)
    set_inputs(prompt, STREAMING_NODE, mode=mode, vram_gb=budget.vram_gib, min_free_mb=0)
    return prompt
