"""VRAM Budget: one bound on the card for all nodes that it is connected to."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..streaming.host.budget import Budget
from ..streaming.host.devices import device_for, why_not
from .widgets import BudgetType, min_free_input, vram_input


class VramBudget(io.ComfyNode):
    """Gives a budget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerStreamVramBudget",
            display_name="VRAM Budget",
            category="advanced/layerstream",
            description=(
                "Bounds how much of the graphics card and of RAM the connected nodes take together. Models that share "
                "a budget make way for each other."
            ),
            inputs=[
                vram_input("all connected models may take together"),
                min_free_input(),
                io.Float.Input(
                    "ram_gb",
                    default=0.0,
                    min=0.0,
                    max=2048.0,
                    step=1.0,
                    tooltip=(
                        "Most GiB of RAM that weights may take, page-locked or not. 0: as much as they need and is "
                        "free, at most half of all RAM page-locked. What finds no room is read from its file in every "
                        "pass."
                    ),
                ),
                io.Boolean.Input(
                    "hard_limit",
                    default=False,
                    tooltip=(
                        "Bound all that ComfyUI takes of the card, the work as well as the weights. Whatever asks for "
                        "more runs out of memory, as on a smaller card. Does not bind ComfyUI's DynamicVRAM."
                    ),
                ),
            ],
            outputs=[BudgetType.Output("budget_out", display_name="budget")],
        )

    @classmethod
    def execute(cls, vram_gb: float, min_free_mb: int, ram_gb: float, hard_limit: bool) -> io.NodeOutput:
        budget = Budget(vram_gb, min_free_mb, ram_gb)
        if hard_limit:
            load_device = comfy.model_management.get_torch_device()
            device = device_for(load_device)
            if device is None:
                raise ValueError(f"hard_limit cannot be kept: {why_not(load_device)}; turn it off")
            budget.limit(device)
        return io.NodeOutput(budget)
