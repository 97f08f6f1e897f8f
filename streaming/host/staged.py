"""CLIP, VAE and MODEL objects that tell when their stages begin and end.

In: the objects that ComfyUI's loaders made. Out: copies of them that share model and tokenizer; what was given stays as
it is. A copy's class is the original's with the stages mixed in, so everything else about it is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from . import estimate
from .families import text_family
from .passes import is_guided
from .patcher import NothingToStream, StreamingModelPatcher
from .policy import Estimation, Stage
from .settings import StreamingSettings
from .stages import Component, stage

WRAPPER_KEY = "layerstream.stages"

# Where a MODEL carries the component that it is, None where its weights are ComfyUI's to move, and how to estimate.
ATTACHMENT = "layerstream.component"


class StagedText:
    """Mixed into a CLIP's class: encoding is a stage, and within it the model may stream."""

    patcher: Any
    component: Component | None
    estimation: Estimation
    _scope: ExitStack | None = None

    def encode_from_tokens(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(tokens):
            return super().encode_from_tokens(tokens, *args, **kwargs)  # type: ignore[misc]

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(tokens):
            return super().encode_from_tokens_scheduled(tokens, *args, **kwargs)  # type: ignore[misc]

    def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(tokens):
            return super().generate(tokens, *args, **kwargs)  # type: ignore[misc]

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        if self._scope is not None:
            self._scope.close()  # nothing can be loaded inside a pass
        patcher = super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self._scope is not None and isinstance(patcher, StreamingModelPatcher):
            self._scope.enter_context(patcher.passing())
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        clone = super().clone(*args, **kwargs)  # type: ignore[misc]
        return staged_text(clone, clone.patcher, self.component, self.estimation)

    @contextmanager
    def _stage(self, tokens: Any) -> Iterator[None]:
        if self._scope is not None:
            yield
            return
        if isinstance(self.patcher, StreamingModelPatcher):
            self.patcher.stream.begin_run(estimate.token_shape(tokens))
        with stage(
            Stage.TEXT_ENCODE,
            self.component,
            self.patcher,
            lambda: estimate.text_bytes(self, tokens, self.estimation),
        ):
            try:
                with ExitStack() as self._scope:
                    yield
            finally:
                self._scope = None


class StagedVae:
    """Mixed into a VAE's class: encoding and decoding are stages."""

    patcher: Any
    component: Component | None
    estimation: Estimation

    def decode(self, samples_in: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(Stage.DECODE, lambda: estimate.decode_bytes(self, samples_in, self.estimation)):
            return super().decode(samples_in, *args, **kwargs)  # type: ignore[misc]

    def decode_tiled(self, samples: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(Stage.DECODE, lambda: estimate.decode_bytes(self, samples, self.estimation)):
            return super().decode_tiled(samples, *args, **kwargs)  # type: ignore[misc]

    def encode(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(Stage.IMAGE_ENCODE, lambda: estimate.encode_bytes(self, pixel_samples, self.estimation)):
            return super().encode(pixel_samples, *args, **kwargs)  # type: ignore[misc]

    def encode_tiled(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stage(Stage.IMAGE_ENCODE, lambda: estimate.encode_bytes(self, pixel_samples, self.estimation)):
            return super().encode_tiled(pixel_samples, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _stage(self, kind: Stage, work_bytes: Callable[[], int]) -> Iterator[None]:
        with stage(kind, self.component, self.patcher, work_bytes):
            yield


def streamed_text(clip: Any, settings: StreamingSettings) -> Any:
    """A copy of a CLIP whose text encoder streams as `settings` say.

    Raises NothingToStream when there is no device to stream to or no layer to stream.
    """
    model = clip.patcher.model
    family = text_family(model)
    if not family.units:
        raise NothingToStream(f"no layers were found in {type(model).__name__}")
    patcher = StreamingModelPatcher.from_patcher(clip.patcher, settings, family)
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
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, sample_in_stage)
    return clone


def sample_in_stage(executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: sampling as a stage, from before ComfyUI loads the model."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    component, estimation = patcher.get_attachment(ATTACHMENT)
    with stage(
        Stage.SAMPLING,
        component,
        patcher,
        lambda: estimate.sampling_bytes(patcher, noise.shape, guider.conds, is_guided(guider), estimation),
    ):
        return executor(noise, *args, **kwargs)


def _copy_as(
    mixin: type, original: Any, patcher: Any, component: Component | None, estimation: Estimation
) -> Any:
    kind = type(original)
    if not issubclass(kind, mixin):
        kind = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})
    copy: Any = object.__new__(kind)
    copy.__dict__.update(original.__dict__)
    copy.patcher, copy.component, copy.estimation = patcher, component, estimation
    return copy
