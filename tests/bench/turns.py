"""Contenders whose turns are made up: what a worker process would find, without one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from bench.child import ChildError
from bench.spec import StepSpec
from bench.worker import latent_sha256


class Turn(SimpleNamespace):
    """What a worker is to find: seconds a step, the loop's time, the latent's values; or the error it ends with."""

    def __init__(self, step_s: float = 1.0, loop_ms: float = 10.0, latent: float = 0.5, error: str = "") -> None:
        super().__init__(step_s=step_s, loop_ms=loop_ms, latent=latent, error=error)


class Workers:
    """Stands for the worker processes: gives each contender's turns in order, and writes their latents."""

    def __init__(self, **turns: list[Turn]) -> None:
        self.turns = {name.replace("_", "-"): list(listed) for name, listed in turns.items()}
        self.order: list[str] = []
        self.free_gib: list[float | None] = []
        self.timeouts_s: list[float] = []

    def run(self, module: str, arguments: list[str], *, timeout_s: float, **options: Any) -> dict[str, Any]:
        name, _, spec_path, _, latent_path = arguments
        turn = self.turns[name].pop(0)
        self.order.append(name)
        self.free_gib.append(StepSpec.read(Path(spec_path)).free_gib)
        self.timeouts_s.append(timeout_s)
        if turn.error:
            raise ChildError(turn.error)
        latent = torch.full((2, 3), turn.latent)
        save_file({"latent": latent}, latent_path)
        row = {
            "name": name,
            "step_s_median": turn.step_s,
            "step_s_min": turn.step_s,
            "step_s_max": turn.step_s,
            "loop_ms": turn.loop_ms,
            "first_step_s": turn.step_s,
            "calls_per_step": 1.0,
            **dict.fromkeys(("resident_gib", "streamed_gib_per_step", "moved_gib_per_step"), 1.0),
            **dict.fromkeys(("allocated_peak_gib", "reserved_peak_gib"), 1.0),
            "dtype": "bfloat16",
            "comfyui": "0",
            "latent_sha256": latent_sha256(latent),
            "latent_is_finite": True,
            "report": {},
            "trace": None,
        }
        return json.loads(json.dumps(row))
