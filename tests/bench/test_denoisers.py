"""diffusers' denoisers that are measured beside the host's models are of the same size. Skipped without diffusers."""

from typing import Any

import pytest
import torch

from bench.denoisers import DENOISERS
from scripts.checkpoints import diffusion_model_layout

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", DENOISERS)
def test_a_denoiser_has_as_many_weights_as_the_hosts_file(family: Any) -> None:
    denoiser = DENOISERS[family]
    with torch.device("meta"):
        model = getattr(diffusers, denoiser.class_name)(**denoiser.configuration)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights == sum(tensor.elements for tensor in diffusion_model_layout(family, "full"))
