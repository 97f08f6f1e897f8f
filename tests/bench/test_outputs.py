"""What is compared of a contender: the outputs of all its prompts, also those that are not timed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import host_contenders, sampling
from bench.host_contenders import Prepared, run_stock
from bench.measured import Residency, SamplingRun
from bench.spec import StepSpec
from scripts import hosts


@pytest.mark.parametrize("has_lora", [False, True])
def test_the_prompt_in_which_a_plan_is_made_and_the_one_of_another_strength_count(
    monkeypatch: pytest.MonkeyPatch, spec: StepSpec, has_lora: bool
) -> None:
    prompts: list[Any] = []

    def sample(model: Any, spec: StepSpec) -> SamplingRun:
        prompts.append(model)
        return SamplingRun(torch.full((1, 2), float(len(prompts))), 1.0, [0.5], 1.0)

    model, weaker = (SimpleNamespace(model=SimpleNamespace(get_dtype=lambda: torch.bfloat16)) for _ in range(2))
    prepared = Prepared(model, lambda calls: Residency(0, 0, 0, {}), (lambda strength: weaker) if has_lora else None)
    monkeypatch.setattr(sampling, "sample", sample)
    monkeypatch.setattr(host_contenders, "open_stock", lambda spec: lambda: prepared)
    monkeypatch.setattr(hosts, "read_host", lambda path: SimpleNamespace(version="0"))
    run = run_stock(spec).run
    assert prompts == [model, model] + [weaker] * has_lora
    assert run.latent[:, 0, 0].tolist() == [1.0, 2.0, 3.0][: len(prompts)]
