"""CLIP, VAE and MODEL objects that tell when their stages begin and end.

In: the objects that ComfyUI's loaders made. Out: copies of them that share model and tokenizer; what was given stays as
it is. A copy's class is the original's with the stages mixed in, so everything else about it is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..engine.python_stack import on_one_chunk
from . import estimate, retries
from .families import text_family
from .gguf_patches import streaming_patcher_for
from .ladder import STREAMED_RUNGS, VAE_RUNGS, Rung, Standing, climb_down
from .need import Need
from .passes import is_guided
from .patcher import NothingToStream, StreamingModelPatcher
from .policy import Estimation, Stage
from .settings import StreamingSettings
from .stages import Component, stage
from .streams import Way
from .tables import looking_up_first

WRAPPER_KEY = "layerstream.stages"

ESTIMATES = {Stage.DECODE: estimate.decode_bytes, Stage.IMAGE_ENCODE: estimate.encode_bytes}

# What ComfyUI's VAE asks for the bytes that its work needs.
FORMULAS = {Stage.DECODE: "memory_used_decode", Stage.IMAGE_ENCODE: "memory_used_encode"}

# Where a MODEL carries the component that it is, None where its weights are ComfyUI's to move, and how to estimate.
ATTACHMENT = "layerstream.component"


class StagedText:
    """Mixed into a CLIP's class: encoding is a stage, and within it the model may stream."""

    patcher: Any
    component: Component | None
    estimation: Estimation
    _scope: ExitStack | None = None
    _need: Need | None = None

    def encode_from_tokens(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        encode = super().encode_from_tokens  # type: ignore[misc]
        return self._in_stage(tokens, lambda: encode(tokens, *args, **kwargs))

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        encode = super().encode_from_tokens_scheduled  # type: ignore[misc]
        return self._in_stage(tokens, lambda: encode(tokens, *args, **kwargs))

    def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        generate = super().generate  # type: ignore[misc]
        return self._in_stage(tokens, lambda: generate(tokens, *args, **kwargs), "generate")

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        if self._scope is not None:
            self._scope.close()  # nothing can be loaded inside a pass
        patcher = super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self._scope is not None and isinstance(patcher, StreamingModelPatcher):
            # ComfyUI tells the end of a run of diffusion models only.
            self._scope.callback(patcher.end_run)
            self._scope.enter_context(patcher.passing())
            if self._need is not None:
                self._scope.enter_context(self._need.measuring(patcher))
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        clone = super().clone(*args, **kwargs)  # type: ignore[misc]
        return staged_text(clone, clone.patcher, self.component, self.estimation)

    def _in_stage(self, tokens: Any, run: Callable[[], Any], what: str = "encode") -> Any:
        if self._scope is not None:
            return run()  # a stage within a stage
        estimated = partial(estimate.text_bytes, self, tokens, self.estimation)
        need = Need(self.patcher.model, what, estimated, estimate.token_count(tokens))
        # What was given up before it was known how much is needed is not given up for good.
        work = what, estimate.token_shape(tokens), need.is_measured
        is_streamed = isinstance(self.patcher, StreamingModelPatcher)
        if is_streamed:
            self.patcher.stream.begin_run(work)
            self.patcher.stream.estimates = (Way(reserve_bytes=need.with_margin() if need.seen else 0),)

        def attempt(standing: Standing) -> Any:
            looking_up = looking_up_first(self.patcher.model) if is_streamed else nullcontext()
            self._need = need
            try:
                with (
                    stage(Stage.TEXT_ENCODE, self.component, self.patcher, need),
                    looking_up,
                    ExitStack() as self._scope,
                ):
                    return on_one_chunk(run)
            finally:
                self._scope = self._need = None

        rungs = STREAMED_RUNGS if is_streamed else (Rung.EVICT,)
        return climb_down(
            Stage.TEXT_ENCODE, self.patcher, work, rungs, attempt, lambda: "use a text encoder of fewer bytes a weight"
        )


class StagedVae:
    """Mixed into a VAE's class: encoding and decoding are stages."""

    patcher: Any
    first_stage_model: Any
    component: Component | None
    estimation: Estimation

    _may_tile = True

    def decode(self, samples_in: Any, *args: Any, **kwargs: Any) -> Any:
        decode = super().decode  # type: ignore[misc]
        return self._in_stage(Stage.DECODE, samples_in, lambda: decode(samples_in, *args, **kwargs))

    def decode_tiled(self, samples: Any, *args: Any, **kwargs: Any) -> Any:
        decode = super().decode_tiled  # type: ignore[misc]
        return self._in_stage(Stage.DECODE, samples, lambda: decode(samples, *args, **kwargs), is_tiled=True)

    def encode(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        encode = super().encode  # type: ignore[misc]
        return self._in_stage(Stage.IMAGE_ENCODE, pixel_samples, lambda: encode(pixel_samples, *args, **kwargs))

    def encode_tiled(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        encode = super().encode_tiled  # type: ignore[misc]
        run = partial(encode, pixel_samples, *args, **kwargs)
        return self._in_stage(Stage.IMAGE_ENCODE, pixel_samples, run, is_tiled=True)

    def _in_stage(self, kind: Stage, images: Any, run: Callable[[], Any], is_tiled: bool = False) -> Any:
        """Run a stage; ComfyUI goes over to tiles by itself, but only once everything idle has left the card."""
        estimated = partial(ESTIMATES[kind], self, images, self.estimation)
        work = kind, tuple(images.shape), is_tiled
        need = Need(self.first_stage_model, work, estimated)
        stream = getattr(self.patcher, "stream", None)
        # Of several images ComfyUI works on as many at once as it has room for, by its own figure.
        is_measuring = images.shape[0] == 1 and not is_tiled and stream is not None and stream.device.holds_activations

        def attempt(standing: Standing) -> Any:
            self._may_tile = is_tiled or Rung.TILE in standing.rungs
            try:
                measuring = self._measuring(kind, images, need) if is_measuring else nullcontext()
                with stage(kind, self.component, self.patcher, need), measuring:
                    return run()
            finally:
                self._may_tile = True

        return climb_down(
            kind,
            self.patcher,
            work[1:],
            (Rung.EVICT,) if is_tiled else VAE_RUNGS,
            attempt,
            lambda: "make the tiles smaller, with VAE Decode (Tiled) or VAE Encode (Tiled)",
        )

    @contextmanager
    def _measuring(self, kind: Stage, images: Any, need: Need) -> Iterator[None]:
        """The scope of work on one image: it is measured, or ComfyUI, which makes room for it too, goes by what was."""
        if not need.is_measured:
            # As ComfyUI is going to do first of all.
            comfy.model_management.load_models_gpu([self.patcher], memory_required=ESTIMATES[kind](self, images))
            with need.measuring(self.patcher):
                yield
            return
        formula = getattr(self, FORMULAS[kind])
        setattr(self, FORMULAS[kind], lambda *_: need.with_margin())
        try:
            yield
        finally:
            setattr(self, FORMULAS[kind], formula)

    def decode_tiled_(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().decode_tiled_, *args, **kwargs)  # type: ignore[misc]

    def decode_tiled_1d(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().decode_tiled_1d, *args, **kwargs)  # type: ignore[misc]

    def decode_tiled_3d(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().decode_tiled_3d, *args, **kwargs)  # type: ignore[misc]

    def _decode_tiled_owned(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super()._decode_tiled_owned, *args, **kwargs)  # type: ignore[misc]

    def encode_tiled_(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().encode_tiled_, *args, **kwargs)  # type: ignore[misc]

    def encode_tiled_1d(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().encode_tiled_1d, *args, **kwargs)  # type: ignore[misc]

    def encode_tiled_3d(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super().encode_tiled_3d, *args, **kwargs)  # type: ignore[misc]

    def _encode_tiled_owned(self, *args: Any, **kwargs: Any) -> Any:
        return self._tiled(super()._encode_tiled_owned, *args, **kwargs)  # type: ignore[misc]

    def _tiled(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._may_tile:
            raise torch.OutOfMemoryError("the whole image at once ran out of memory")
        return run(*args, **kwargs)


def streamed_text(clip: Any, settings: StreamingSettings) -> Any:
    """A copy of a CLIP whose text encoder streams as `settings` say.

    Raises NothingToStream when there is no device to stream to or no layer to stream.
    """
    model = clip.patcher.model
    family = text_family(model)
    if not family.units:
        raise NothingToStream(f"no layers were found in {type(model).__name__}")
    patcher = streaming_patcher_for(clip.patcher).from_patcher(clip.patcher, settings, family)
    estimation = getattr(clip, "estimation", Estimation.FORMULA)
    return staged_text(clip, patcher, getattr(clip, "component", None), estimation)


def staged_text(clip: Any, patcher: Any, component: Component | None, estimation: Estimation) -> Any:
    return _copy_as(StagedText, clip, patcher, component, estimation)


def staged_vae(vae: Any, patcher: Any, component: Component | None, estimation: Estimation) -> Any:
    return _copy_as(StagedVae, vae, patcher, component, estimation)


def staged_model(patcher: ModelPatcher, component: Component | None, estimation: Estimation) -> Any:
    """A clone of `patcher` whose sampling is a stage; its clones are the same component."""
    clone = patcher.clone()
    clone.set_attachments(ATTACHMENT, (component, estimation))
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, retries.WRAPPER_KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, retries.WRAPPER_KEY, retries.retry_sampling)
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, sample_in_stage)
    return clone


def sample_in_stage(executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: sampling as a stage, from before ComfyUI loads the model."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    component, estimation = patcher.get_attachment(ATTACHMENT)
    estimated = partial(estimate.sampling_bytes, patcher, noise.shape, guider.conds, is_guided(guider), estimation)
    with stage(Stage.SAMPLING, component, patcher, Need(patcher.model, Stage.SAMPLING, estimated)):
        return executor(noise, *args, **kwargs)


def _copy_as(mixin: type, original: Any, patcher: Any, component: Component | None, estimation: Estimation) -> Any:
    kind = type(original)
    if not issubclass(kind, mixin):
        kind = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})
    copy: Any = object.__new__(kind)
    copy.__dict__.update(original.__dict__)
    copy.patcher, copy.component, copy.estimation = patcher, component, estimation
    return copy
