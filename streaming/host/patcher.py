"""StreamingModelPatcher: a ModelPatcher whose model streams.

In: a MODEL and settings. Out: a MODEL that ComfyUI's memory manager loads, unloads and clones like any other. The file
is long because it is one contract: nearly every method answers one that ComfyUI calls.

The ledger. A model has several patchers (clones, an unstreamed branch of the graph), and any of them may be loaded
after this one without our being told. So everything done to the model is written down where ComfyUI itself looks
before it loads: `backup` has the home tensor of each parameter that was replaced, `model_lowvram` and
`prev_comfy_cast_weights` the modules whose casting was switched on, and `current_weight_patches_uuid` an id that is
nobody else's. Whoever comes next restores the model from these; our device memory is held by the model's parameters
alone and goes with them.
"""

from __future__ import annotations

import collections
import logging
import uuid
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, move_weight_functions, wipe_lowvram_weight
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..engine.block import Weight
from ..engine.plan import BudgetTooSmall, Plan, make_plan
from ..engine.session import Marks, Progress
from .devices import device_for, why_not
from .passes import WRAPPER_KEY, note_guidance, note_memory, stream_pass
from .settings import GIB, Mode, StreamingSettings
from .streams import ROOT, ModelStream, stream_for
from .telemetry import report

logger = logging.getLogger("layerstream")

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])  # the shape of ComfyUI's own entries

# A plan that still fits is kept unless a new one would keep this much more of the model on the card.
WORTH_A_NEW_PLAN = 0.02

# What free memory may fall by between runs, as a share of the model, before a plan that worked is given up.
STEADY_SHARE = 0.03


class NothingToStream(ValueError):
    """There is no device to stream to, or the model has no blocks that the engine can find."""


class StreamingModelPatcher(ModelPatcher):
    """Loads a model as a streaming plan says. Made by `from_patcher`; a plain constructor call makes clones."""

    stream: ModelStream
    settings: StreamingSettings
    source: ModelPatcher

    @classmethod
    def from_patcher(cls, source: ModelPatcher, settings: StreamingSettings) -> StreamingModelPatcher:
        """Give a streaming patcher of the model of `source`, which keeps working beside it.

        Raises NothingToStream when there is no device to stream to or no block to stream.
        """
        if isinstance(source, StreamingModelPatcher):
            patcher = source.clone()
        else:
            device = device_for(source.load_device)
            if device is None:
                raise NothingToStream(why_not(source.load_device))
            stream = stream_for(source, device)
            if stream is None:
                raise NothingToStream(f"no list of blocks was found in {type(source.model).__name__}")
            patcher = cls(source.model, source.load_device, source.offload_device, source.model_size())
            _carry_over(source, patcher)
            patcher.stream, patcher.source = stream, source
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, stream_pass)
            patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, note_guidance)
            patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPER_KEY, note_memory)
        patcher.settings = settings
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> StreamingModelPatcher:
        clone = super().clone(*args, **kwargs)
        clone.stream, clone.settings, clone.source = self.stream, self.settings, self.source
        return clone

    # -- what the memory manager asks ----------------------------------------------------------------------------

    def loaded_size(self) -> int:
        """Bytes this model holds on the card now, ring included."""
        if not self.stream.is_in_place:
            return super().loaded_size()
        session = self.stream.session
        return session.resident_bytes + session.ring_bytes

    # -- loading -------------------------------------------------------------------------------------------------

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **kwargs: Any,
    ) -> None:
        """Plan for `lowvram_model_memory` bytes and bring the model to that plan. `full_load` means no bound."""
        with self.use_ejected():
            self.unpatch_hooks()
            self._take_over()
            stream, session = self.stream, self.stream.session
            allowed = float("inf") if full_load else lowvram_model_memory
            plan = self._plan(allowed)
            fresh = plan is not session.plan or not stream.is_in_place
            self._load_rest(device_to)
            progress = comfy.utils.ProgressBar(session.total_bytes).update_absolute if fresh else _no_progress
            self._load_plan(plan, progress)
            if session.slot_bytes > plan.slot_bytes:
                # Something did not pack as small as planned; a raw plan is exact, now and in later loads.
                stream.packs_well = False
                self._load_plan(self._plan(allowed), progress)
            stream.load_id = stream.load_id or uuid.uuid4()
            self._write_ledger()
            if fresh:
                logger.info("LayerStream: %s", self.summary())
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Load with `extra_memory` bytes more than are held now; give the bytes that came to the card."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            held = self.loaded_size() if self.stream.is_in_place else 0
            before = self.loaded_size()
            super().unpatch_model(self.offload_device, unpatch_weights=False)  # object patches of the last load
            self.patch_model(load_weights=False)
            try:
                self.load(device_to, held + extra_memory, force_patch_weights)
            except BaseException:
                self.detach()
                raise
            return max(0, self.loaded_size() - before)

    def _take_over(self) -> None:
        """Have the model's own weights in place, unchanged and on the host, if someone else loaded it last."""
        if self.stream.is_in_place:
            return
        if self.stream.is_open:
            self.stream.session.forget()
        is_dynamic = getattr(self.source, "is_dynamic", lambda: False)()
        if is_dynamic:
            # A dynamic patcher keeps copies in page-locked memory and switches casting on for good.
            self.source.unpatch_model(self.offload_device, unpatch_weights=True)
            for module in self.model.modules():
                module.__dict__.pop("comfy_cast_weights", None)
        super().unpatch_model(self.offload_device, unpatch_weights=True)
        super().patch_model(load_weights=False)
        self.stream.open(is_dynamic)

    def _load_plan(self, plan: Plan, progress: Progress) -> None:
        self.stream.session.load(plan, marks=self._marks(), changed=self._changed_weight, progress=progress)

    def _packs(self) -> bool:
        """Whether weights shall cross the link packed: only where the link held up an earlier run.

        Not under scheduled hooks: those change weights in place on the host, where the packed ones would not follow.
        """
        stream = self.stream
        can_pack = stream.device.packer is not None and stream.packs_well and not self.hook_patches
        return can_pack and stream.is_link_bound and stream.has_room_for_packed()

    def _plan(self, allowed_bytes: float) -> Plan:
        """Make a plan for what may be used, or keep the present one where a new one would gain little."""
        stream, session, settings = self.stream, self.stream.session, self.settings
        held = self.loaded_size() if stream.is_in_place else 0
        budget = settings.budget_bytes(stream.device.free_bytes() + held, allowed_bytes, stream.reserve_bytes)
        stream.budget_bytes = budget
        everything = settings.mode is Mode.ALWAYS
        is_packed = self._packs()

        def plan_with(prefetch: int, budget_bytes: int | None, stream_all: bool = everything) -> Plan:
            # Spread by compute time, bytes fit the gaps better, but blocks that compute little take residency that
            # others would use better. Where the link is the limit, what streams less wins.
            plans = (
                make_plan(
                    session.sizes(is_timed),
                    budget_bytes=budget_bytes,
                    outside_bytes=session.outside_bytes,
                    prefetch=prefetch,
                    is_packed=is_packed,
                    stream_all=stream_all,
                )
                for is_timed in ((True, False) if stream.is_link_bound else (False,))
            )
            return min(plans, key=lambda plan: plan.streamed_bytes)

        try:
            plan = plan_with(settings.prefetch_blocks, budget)
        except BudgetTooSmall as error:
            if settings.is_explicit:
                raise
            plan = plan_with(1, None, stream_all=True)
            logger.warning("LayerStream: %s. Trying with the least possible, %.2f GiB", error, plan.device_bytes / GIB)
        present = session.plan if stream.is_in_place else None
        if present is None or present == plan:
            return present or plan
        alike = (present.prefetch, present.is_packed) == (plan.prefetch, plan.is_packed)
        if not alike or plan.is_resident or everything:
            return plan
        gain = plan.resident_bytes - present.resident_bytes
        # Free memory reads a little lower after a first run, which loads kernels and libraries; that is no reason.
        is_exact = settings.is_explicit or not stream.device.holds_activations
        slack = 0 if is_exact else STEADY_SHARE * session.total_bytes
        fits = present.device_bytes <= max(budget + slack, plan.device_bytes)
        is_steady = -slack <= gain < WORTH_A_NEW_PLAN * session.total_bytes
        return present if fits and is_steady else plan

    def _marks(self) -> Marks:
        """Blocks with patches are out of date whenever the patches change."""

        def mark(weights: tuple[Weight, ...]) -> uuid.UUID | None:
            is_patched = any(_key(name) in self.patches for weight in weights for name in weight.keys)
            return self.patches_uuid if is_patched else None

        parts = self.stream.session.parts
        return Marks(tuple(mark(block.weights) for block in parts.blocks), mark(parts.outside.weights))

    def _changed_weight(self, weight: Weight) -> torch.Tensor | None:
        """The weight with its patches, computed by ComfyUI on the card as for a full load; None if it has none."""
        key = next((_key(name) for name in weight.keys if _key(name) in self.patches), None)
        if key is None:
            return None
        weight.put(weight.home)
        self.patch_weight_to_device(key, device_to=self.load_device)
        return comfy.utils.get_attr(self.model, key)

    def _load_rest(self, device_to: torch.device | None) -> None:
        """Move what is not part of the diffusion model (sampling tables and the like), patched, as ComfyUI does."""
        for key in self.patches:
            if not key.startswith(f"{ROOT}."):
                self.patch_weight_to_device(key, device_to=device_to)
        for name, child in self.model.named_children():
            if name != ROOT:
                child.to(device_to)

    def _write_ledger(self) -> None:
        """Write down what was done to the model, in ComfyUI's own terms; see the module's docstring."""
        stream, session, model = self.stream, self.stream.session, self.model
        for block in (*session.parts.blocks, session.parts.outside):
            for weight in block.weights:
                if not weight.sites[0].is_buffer:
                    for name in weight.keys:
                        self.backup[_key(name)] = Backup(weight.home, False)
        streamed = session.streamed_modules()
        for name, module in model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            wipe_lowvram_weight(module)
            # Casting makes a streamed weight that is used outside its block's forward slow, but right.
            if module in streamed or self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            for kind in ("weight", "bias"):
                functions = self.weight_wrapper_patches.get(f"{name}.{kind}")
                if functions:
                    getattr(module, f"{kind}_function").extend(functions)
            move_weight_functions(module, self.load_device)
        model.model_lowvram = True
        model.lowvram_patch_counter = 0
        model.device = self.load_device
        model.model_loaded_weight_memory = session.resident_bytes
        model.current_weight_patches_uuid = stream.load_id

    # -- unloading -----------------------------------------------------------------------------------------------

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Free `memory_to_free` bytes of the card if that is possible without giving up the model; say how many.

        Between runs whole blocks leave until the next load. During a run the plan is made anew with less. Inside a
        pass nothing can be freed.
        """
        if not self.stream.is_in_place:
            return super().partially_unload(device_to, memory_to_free, force_patch_weights)
        session = self.stream.session
        if session.is_running:
            return 0
        before = self.loaded_size()
        if session.is_in_run:
            self._shrink(memory_to_free)
        else:
            session.evict(int(memory_to_free))
        self.model.model_loaded_weight_memory = session.resident_bytes
        freed = before - self.loaded_size()
        logger.info("LayerStream: gave back %.2f GiB, %.2f GiB stay", freed / GIB, self.loaded_size() / GIB)
        return freed

    def _shrink(self, memory_to_free: float) -> None:
        session = self.stream.session
        assert session.plan is not None
        try:
            plan = make_plan(
                session.sizes(),
                budget_bytes=int(session.plan.device_bytes - memory_to_free),
                outside_bytes=session.outside_bytes,
                prefetch=session.plan.prefetch,
                is_packed=session.plan.is_packed,
            )
        except BudgetTooSmall:
            return
        self._load_plan(plan, _no_progress)
        self._write_ledger()

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Restore the model. With `unpatch_weights` its weights leave the card; the slabs stay for the next load."""
        if self._is_running:
            logger.warning("LayerStream: asked to unload inside a pass; the model stays until its next unload")
            return
        if unpatch_weights and self.stream.is_in_place:
            self.unpatch_hooks()
            self.stream.session.unload()
            self.stream.load_id = None
        super().unpatch_model(device_to, unpatch_weights)

    def cleanup(self) -> None:
        """End a run: the ring goes, residents stay."""
        super().cleanup()
        if self.stream.is_open and not self._is_running:
            if self.stream.session.is_in_run:
                self.stream.judge_link()
            self.stream.session.end_run()

    @property
    def _is_running(self) -> bool:
        return self.stream.is_open and self.stream.session.is_running

    def patch_hooks(self, hooks: Any) -> None:
        """Change weights for scheduled hooks; what was fetched ahead of the change is stale."""
        if self.stream.is_open:
            self.stream.session.discard_fetched()
        super().patch_hooks(hooks)

    # -- telling -------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """One line: what was achieved."""
        session, plan = self.stream.session, self.stream.session.plan
        assert plan is not None
        name = f"{type(self.model).__name__} ({self.stream.device.name})"
        if plan.is_resident:
            return f"{name}: fits, {session.resident_bytes / GIB:.2f} GiB resident, nothing streams"
        return (
            f"{name}: {len(session.parts.blocks)} blocks, {session.resident_bytes / GIB:.2f} GiB resident, "
            f"{plan.streamed_bytes / GIB:.2f} GiB streamed a step {self._form()}, "
            f"ring {plan.ring_bytes / GIB:.2f} GiB, host {session.host_bytes / GIB:.2f} GiB"
        )

    def _form(self) -> str:
        """How the weights travel, and why not packed."""
        session = self.stream.session
        assert session.plan is not None
        if session.plan.is_packed:
            return f"as {session.link_bytes / GIB:.2f} GiB packed"
        if not self.stream.is_link_bound:
            return "raw"
        if self.stream.device.packer is None:
            return "raw (packing needs Triton)"
        if not self.stream.packs_well:
            return "raw (these weights do not pack well)"
        return "raw (scheduled hooks change weights)" if self.hook_patches else "raw (packing needs more free RAM)"

    def streaming_report(self) -> dict[str, Any]:
        """Figures of this model's streaming, ready for JSON, as `telemetry.report` has them."""
        return report(self.stream)


def _carry_over(source: ModelPatcher, patcher: StreamingModelPatcher) -> None:
    """Give `patcher` all that a clone of `source` would have; `clone` itself can only make its own class."""
    clone = source.clone()
    patcher.__dict__.update(clone.__dict__)
    patcher.parent = source
    # The clone is finished with; emptied, its end cannot touch what it shared.
    clone.callbacks, clone.injections, clone.pinned = {}, {}, set()
    clone.model_options = {"transformer_options": {}}


def _key(name: str) -> str:
    """A weight's name in the model's state dict, from its name in the diffusion model."""
    return f"{ROOT}.{name}"


def _no_progress(done: int, total: int) -> None:
    pass
