"""Records one step under torch's profiler and says what the card did in it.

In: the calls between steps. Out: the values of `bench.timeline`. Profiling slows the host, so that a step under it is
longer than one without; what is reported is where the time goes, not how long a step takes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.timeline import summarise

# Two steps pass unseen while the plan settles, one starts the profiler, two are recorded.
UNSEEN_STEPS, STARTING_STEPS, RECORDED_STEPS = 2, 1, 2
TRACED_STEPS = UNSEEN_STEPS + STARTING_STEPS + RECORDED_STEPS
# The first of the two: the second is the run's last, after which nothing is fetched ahead.
WINDOW_NAME = f"ProfilerStep#{UNSEEN_STEPS + STARTING_STEPS}"


class StepProfiler:
    """A context manager around a run of `TRACED_STEPS` steps; `step` is called at the end of each."""

    def __init__(self, device: str) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        self._events: list[dict[str, Any]] = []
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=UNSEEN_STEPS, warmup=STARTING_STEPS, active=RECORDED_STEPS, repeat=1),
            on_trace_ready=self._read,
        )

    def __enter__(self) -> StepProfiler:
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)

    def step(self) -> None:
        self._profile.step()

    def timeline(self) -> dict[str, Any]:
        """The recorded step; raises ValueError when fewer than `TRACED_STEPS` were run."""
        return summarise(self._events, WINDOW_NAME)

    def _read(self, profile: Any) -> None:
        # The exported file is the one place where every event has its stream and the call that asked for it.
        with tempfile.TemporaryDirectory(prefix="layerstream-trace-") as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            self._events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
