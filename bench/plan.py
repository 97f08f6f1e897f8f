"""How long planning takes, and what comes of it, for models of many uneven blocks.

    python -m bench.plan

Needs no card: the planner sees sizes and times alone. Prints a row for each number of blocks and share of the model
that fits, with the step that the plan is expected to take beside its floor; ends with one line of JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import Any

from scripts.pack import load_pack

load_pack()

from layerstream.streaming.engine.forecast import BlockCost, Form, Rates  # noqa: E402
from layerstream.streaming.engine.planner import make_plan  # noqa: E402

MIB, GIB = 1024**2, 1024**3
LINK_GIB_S, RESTORE_GIB_S = 50, 1800
COUNTS = (60, 200, 1000)
SHARES = (0.2, 0.5, 0.8)
REPEATS = 5


def uneven_blocks(count: int, seed: int = 0) -> list[BlockCost]:
    """Blocks of 4 to 90 MiB; the early ones compute long for their size and the late ones little, as in a UNet."""
    chance = random.Random(seed)
    blocks = []
    for index in range(count):
        size = int(chance.uniform(4, 90) * MIB)
        compute_ms = size / GIB * chance.uniform(4, 14) * (2 - index / count)
        blocks.append(BlockCost(f"block.{index}", 4096, size, int(0.67 * size), 0.05, compute_ms))
    return blocks


def main() -> None:
    rates = Rates(LINK_GIB_S * GIB / 1000, RESTORE_GIB_S * GIB / 1000, tail_ms=3.0)
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        blocks = uneven_blocks(count)
        total = sum(block.moving_bytes for block in blocks)
        for share in SHARES:
            times_ms = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                plan = make_plan(blocks, budget_bytes=int(share * total), rates=rates)
                times_ms.append((time.perf_counter() - begin) * 1000)
            assert plan.expected is not None and plan.device_bytes <= share * total
            rows.append(
                {
                    "blocks": count,
                    "fits": share,
                    "planning_ms": statistics.median(times_ms),
                    "step_ms": plan.expected.step_ms,
                    "floor_ms": plan.expected.floor_ms,
                    "compute_ms": plan.expected.compute_ms,
                    "limit": plan.expected.limit,
                    **{form.name.lower(): plan.forms.count(form) for form in Form},
                }
            )
            print(*(f"{key}={value if isinstance(value, str) else round(value, 1)}" for key, value in rows[-1].items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
