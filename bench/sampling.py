"""One sampling run, timed step by step, with the same inputs for every contender.

In: a patched model and a `StepSpec`. Out: the final latent and when each step ended.
All inputs come from the CPU's generator with the spec's seed, so that they are the same on every card.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from bench.measured import SamplingRun
from bench.model_file import last_axis
from bench.spec import SAMPLER, SCHEDULER, StepSpec


class StepClock:
    """Host times at the ends of steps, each taken after the device has caught up."""

    def __init__(self, device: str, synchronize: str) -> None:
        self._device = device
        self._synchronize = synchronize
        self._marks_s: list[float] = []

    def mark(self) -> None:
        """Wait for the step's work and note the time."""
        if self._device == "cuda":
            import torch

            if self._synchronize == "device":
                torch.cuda.synchronize()
            else:
                torch.cuda.current_stream().synchronize()
        self._marks_s.append(time.perf_counter())

    def durations_s(self) -> list[float]:
        return [end - begin for begin, end in itertools.pairwise(self._marks_s)]


class CallCounter:
    """Counts the model calls: guidance in two passes walks the model twice a step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, executor, *args, **kwargs):
        """Wrap one call as the host's wrapper points ask for it."""
        self.calls += 1
        return executor(*args, **kwargs)


def random_conditioning(spec: StepSpec, seed: int) -> list:
    """Random text of the family's width and a prompt's usual length, in the host's form for conditioning, with
    whatever else the family's model is given."""
    import torch

    text = spec.text
    generator = torch.Generator(device="cpu").manual_seed(seed)
    extra: dict[str, object] = {}
    if text.pooled_width_tensor is not None:
        width = last_axis(spec.checkpoint_path, text.pooled_width_tensor) - text.sizes_width
        extra["pooled_output"] = torch.randn(1, width, generator=generator)
    if text.guidance is not None:
        extra["guidance"] = text.guidance
    if text.is_masked:
        extra["attention_mask"] = torch.ones(1, text.tokens, dtype=torch.long)
    width = last_axis(spec.checkpoint_path, text.width_tensor)
    tokens = torch.randn(1, text.tokens, width, generator=generator)
    for name, latent in spec.inputs.latents.items():
        sides = (spec.picture.height // latent.downscale, spec.picture.width // latent.downscale)
        extra[name] = torch.randn(1, latent.channels, *sides, generator=generator)
    return [[tokens, extra]]


def empty_latent(model, spec: StepSpec):
    """Zeros (batch, channels, height, width), with frames before the height where the model's format has them."""
    import torch

    latent_format = model.get_model_object("latent_format")
    frames, height, width = spec.latent_size()
    sides = (frames, height, width) if latent_format.latent_dimensions == 3 else (height, width)
    return torch.zeros(spec.batch, latent_format.latent_channels, *sides)


def sample(model, spec: StepSpec, after_step: Callable[[], None] | None = None) -> SamplingRun:
    """Sample `spec.steps` steps from an empty latent of the spec's picture and time them.

    `after_step` is called at the end of every step; what it takes counts to the next one.
    """
    import comfy.patcher_extension
    import comfy.sample

    counter = CallCounter()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "layerstream_bench", counter)
    latent = empty_latent(model, spec)
    noise = comfy.sample.prepare_noise(latent, spec.seed)
    positive, negative = random_conditioning(spec, spec.seed + 1), random_conditioning(spec, spec.seed + 2)

    clock = StepClock(spec.device, spec.synchronize)

    def end_step(*_: object) -> None:
        clock.mark()
        if after_step is not None:
            after_step()

    clock.mark()
    result = comfy.sample.sample(
        model,
        noise,
        spec.steps,
        spec.cfg,
        SAMPLER,
        SCHEDULER,
        positive,
        negative,
        latent,
        callback=end_step,
        disable_pbar=True,
        seed=spec.seed,
    )
    first_step_s, *steps_s = clock.durations_s()
    return SamplingRun(result.cpu(), first_step_s, steps_s, counter.calls / spec.steps)
