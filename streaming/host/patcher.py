"""StreamingModelPatcher: a ModelPatcher whose model streams.

In: a MODEL and settings. Out: a MODEL that ComfyUI's memory manager loads, unloads and clones like any other. The file
is long because it is one contract: nearly every method answers one that ComfyUI calls.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..engine.block import Weight
from ..engine.plan import BudgetTooSmall, Packing, Plan
from ..engine.session import Marks
from . import retries
from .budget import host_memory, leave_budget, within
from .casting import FLAG
from .compiling import is_compiled, unless_streaming
from .conditioning import bring_conditioning
from .devices import device_for, why_not
from .families import Family
from .ledger import keep_ledger, write_ledger
from .locked_patches import Ferry
from .passes import WRAPPER_KEY, begin_sampling, note_memory, stream_pass
from .patched import baked, is_patched_when_read, patch_key
from .planning import choose_plan, kept_whole, least_left, least_streamed_bytes
from .run_time_patches import RunTimePatch, bring, decide
from .settings import GIB, Mode, StreamingSettings
from .streams import ModelStream, stream_for
from .summary import summary
from .telemetry import report

logger = logging.getLogger("layerstream")

# Packed sizes differ a little from what was expected; more than this is planned for again.
SMALL_EXCESS_BYTES = 32 * 1024**2

FITTING_ROUNDS = 2


class NothingToStream(ValueError):
    """There is no device to stream to, or the model has no blocks that the engine can find."""


class StreamingModelPatcher(ModelPatcher):
    """Loads a model as a streaming plan says. Made by `from_patcher`; a plain constructor call makes clones."""

    stream: ModelStream
    settings: StreamingSettings
    source: ModelPatcher
    # Whether the last load was asked for patched weights in the model's own tensors, as it is before saving.
    _is_to_be_read = False

    @classmethod
    def from_patcher(
        cls, source: ModelPatcher, settings: StreamingSettings, family: Family | None = None
    ) -> StreamingModelPatcher:
        """Give a streaming patcher of the model of `source`, which keeps working beside it.

        `family` says what the units are where that shall not be looked up.
        Raises NothingToStream when there is no device to stream to or no block to stream.
        """
        if isinstance(source, StreamingModelPatcher):
            patcher = source.clone()
        else:
            device = device_for(source.load_device)
            if device is None:
                raise NothingToStream(why_not(source.load_device))
            stream = stream_for(source, device, family)
            if stream is None:
                raise NothingToStream(f"no list of blocks was found in {type(source.model).__name__}")
            patcher = cls(source.model, source.load_device, source.offload_device, source.model_size())
            _carry_over(source, patcher)
            patcher.stream, patcher.source = stream, source
            patcher.offload_device = torch.device("cpu")  # with --highvram, ComfyUI's own is the card
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, stream_pass)
            patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, begin_sampling)
            patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPER_KEY, note_memory)
            patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, bring_conditioning)
            if not patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, retries.WRAPPER_KEY):  # Offload Policy adds it too
                patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, retries.WRAPPER_KEY, retries.retry_sampling)
            patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, retries.WRAPPER_KEY, retries.split_guidance)
        patcher.settings = settings
        if settings.budget is not None:
            settings.budget.add(patcher.stream)
        patcher.stream.note_node()
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> StreamingModelPatcher:
        clone: Any = super().clone(*args, **kwargs)
        if clone.model is not self.model:
            clone.__class__ = ModelPatcher  # a copy of the model for another card is ComfyUI's to load
            return clone
        clone.stream, clone.settings, clone.source = self.stream, self.settings, self.source
        return clone

    # -- what other nodes add ------------------------------------------------------------------------------------

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        is_compiling = wrapper_type == WrappersMP.APPLY_MODEL and key == COMPILE_KEY
        super().add_wrapper_with_key(wrapper_type, key, unless_streaming(wrapper) if is_compiling else wrapper)

    def add_object_patch(self, name: str, obj: Any) -> None:
        if is_compiled(obj):
            logger.warning("LayerStream: `%s` stays uncompiled, because the model it is part of is streamed", name)
            return
        super().add_object_patch(name, obj)

    # -- what the memory manager asks ----------------------------------------------------------------------------

    def loaded_size(self) -> int:
        """Bytes this model holds on the card now, patches and ring included."""
        return self.held_bytes if self.stream.is_in_place else super().loaded_size()

    @property
    def held_bytes(self) -> int:
        """The same of what streaming holds: nothing while somebody else has loaded the model."""
        stream = self.stream
        return stream.held_bytes + stream.session.ring_bytes if stream.is_in_place else 0

    def get_free_memory(self, device: torch.device) -> float:
        """Bytes that compute can take, by which ComfyUI decides whether conditional and unconditional fit in one batch.

        Where they were seen to fit there is nothing to estimate.
        """
        if self.stream.is_in_place and self.stream.is_batch_sure:
            return float("inf")
        return super().get_free_memory(device)

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
        if self._is_elsewhere:
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
            return
        with self.use_ejected():
            self.unpatch_hooks()
            was_in_place = self.stream.is_in_place
            self._take_over()
            stream, session = self.stream, self.stream.session
            self._is_to_be_read = force_patch_weights
            if not force_patch_weights:
                stream.run_time = decide(self)
            allowed = float("inf") if full_load else lowvram_model_memory
            bring(self, allowed)
            plan = self._choose(allowed)
            fresh = plan is not session.plan or not stream.is_in_place
            self._load_rest(device_to)
            # Where less stays than did, what goes would leave holes between that compute finds no room in.
            is_less = session.plan is not None and plan.resident_bytes < session.plan.resident_bytes
            has_moved = self._load_plan(plan, fresh, afresh=is_less)
            stream.load_id = stream.load_id or uuid.uuid4()
            keep = keep_ledger if was_in_place and not has_moved else write_ledger
            keep(self)
            if fresh:
                logger.info("LayerStream: %s", summary(self))
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Load with `extra_memory` bytes more than are held now; give the bytes that came to the card.

        Inside a pass nothing comes: patches that bring a model of their own there have ComfyUI load this one again.
        """
        if self._is_elsewhere:
            return super().partially_load(device_to, extra_memory, force_patch_weights)
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            if self._is_running and self._is_current:
                return 0
            held, before = self.held_bytes, self.loaded_size()
            super().unpatch_model(self.offload_device, unpatch_weights=False)  # object patches of the last load
            self.patch_model(load_weights=False)
            try:
                self.load(device_to, held + extra_memory, force_patch_weights)
            except BaseException:
                self.detach()
                raise
            return max(0, self.loaded_size() - before)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether a node behind this one has chosen the processor for it, where ComfyUI loads it as any other."""
        return self.load_device.type != self.stream.device.torch_device.type

    def _take_over(self) -> None:
        """Have the model's own weights in place, unchanged and on the host, if someone else loaded it last."""
        if self.stream.is_in_place:
            return
        if self.stream.is_open:
            self.stream.session.forget()
        self.stream.leave_patches()
        is_dynamic = getattr(self.source, "is_dynamic", lambda: False)()
        if is_dynamic:
            # A dynamic patcher keeps copies in page-locked memory and switches casting on for good.
            self.source.unpatch_model(self.offload_device, unpatch_weights=True)
            for module in self.model.modules():
                module.__dict__.pop(FLAG, None)
        super().unpatch_model(self.offload_device, unpatch_weights=True)
        self.stream.open(is_dynamic)  # weights are known by their places in the model that nobody has patched
        super().patch_model(load_weights=False)

    def _load_plan(self, plan: Plan, fresh: bool, afresh: bool = False) -> bool:
        """Bring the model to `plan`; give whether anything was not there already.

        Where weights did not pack as small as thought, plan again with what is known.
        """
        session = self.stream.session
        progress = comfy.utils.ProgressBar(session.total_bytes).update_absolute if fresh else _no_progress
        marks, ferry = self._marks(), Ferry(self.stream.device, host_memory(), self.stream.patch_files)
        # Scheduled hooks change weights in place, where a file cannot be changed.
        load = partial(
            session.load,
            marks=marks,
            changed=partial(baked, self, ferry),
            will_change=lambda weight: patch_key(self, weight) is not None,
            progress=progress,
            afresh=afresh,
            all_in_slabs=bool(self.hook_patches),
        )
        with self._without_hooks(), self.stream.moving(), closing(ferry):
            has_moved = load(plan)
            if session.device_bytes > plan.device_bytes + SMALL_EXCESS_BYTES:
                is_all_streamed = not plan.resident_bytes
                has_moved |= load(
                    session.propose(
                        plan.device_bytes,
                        packing=self._packing(),
                        unpacked=self._unpacked(),
                        stream_all=is_all_streamed,
                    )
                )
        if not self.patches:
            self.stream.patch_files.keep_only(())
        return has_moved

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """The scope in which weights move: what scheduled hooks change in place would be lost, and is changed again."""
        hooks = self.current_hooks
        self.unpatch_hooks()
        yield
        if hooks is not None:
            self.patch_hooks(hooks)

    def _choose(self, allowed_bytes: float) -> Plan:
        stream, settings, held_bytes = self.stream, within(self.settings, self.stream), self.held_bytes
        plan = kept_whole(stream, settings, allowed_bytes, held_bytes)
        if plan is None:
            plan = choose_plan(stream, settings, allowed_bytes, held_bytes, self._packing(), self._unpacked())
        return plan

    def _packing(self) -> Packing:
        """Whether weights may be packed.

        Not under scheduled hooks: those change weights in place on the host, where the packed ones would not follow.
        """
        stream = self.stream
        if not stream.session.can_pack or self.hook_patches or not stream.has_room_for_packed():
            return Packing.NEVER
        # A simulated card has no times to decide by; one that can pack is there to have packing tried.
        is_auto, is_blind = self.settings.packing is Packing.AUTO, not stream.device.has_clock
        # What RAM has no room for is read from its file in every pass, which takes longer than anything else.
        is_short = stream.note_ram(least_streamed_bytes(stream, within(self.settings, stream)))
        return Packing.ALWAYS if is_auto and (is_blind or is_short) else self.settings.packing

    def _marks(self) -> Marks:
        """Blocks with patches are out of date whenever the patches change."""

        def mark(weights: tuple[Weight, ...]) -> uuid.UUID | None:
            is_patched = any(patch_key(self, weight) is not None for weight in weights)
            return self.patches_uuid if is_patched else None

        parts = self.stream.session.parts
        if not self.patches:
            return Marks((None,) * len(parts.blocks), None)
        return Marks(tuple(mark(block.weights) for block in parts.blocks), mark(parts.outside.weights))

    def _unpacked(self) -> set[int]:
        """The blocks whose weights the model itself must hold, patched; of a packed block it has the unpatched ones."""
        blocks = self.stream.session.parts.blocks
        patched = (index for index, mark in enumerate(self._marks().blocks) if mark is not None)
        return {index for index in patched if self._is_to_be_read or not is_patched_when_read(self, blocks[index])}

    @property
    def run_time_patches(self) -> dict[str, RunTimePatch]:
        """The patches that are applied as their layer runs, by weight. Others are baked, and for readers all are."""
        run_time = None if self._is_to_be_read else self.stream.run_time
        return run_time.by_key if run_time else {}

    @property
    def applied_patches(self) -> list[RunTimePatch]:
        """All patches that layers apply as they run, those of GGUF weights too."""
        wrappers = [function for functions in self.weight_wrapper_patches.values() for function in functions]
        own = [function for function in wrappers if isinstance(function, RunTimePatch)]
        return [*self.run_time_patches.values(), *own]

    def _load_rest(self, device_to: torch.device | None) -> None:
        """Move what is not part of the diffusion model (sampling tables and the like), patched, as ComfyUI does."""
        root = self.stream.root
        if not root:
            return
        for key in self.patches:
            if not key.startswith(f"{root}."):
                self.patch_weight_to_device(key, device_to=device_to)
        for name, child in self.model.named_children():
            if name != root:
                child.to(device_to)

    # -- unloading -----------------------------------------------------------------------------------------------

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Free `memory_to_free` bytes of the card if that is possible without giving up the model; say how many.

        Between runs whole blocks leave until the next load. During a run the plan is made anew with less, and its ring
        is taken at once, lest others take its place. Inside a pass nothing can be freed.
        """
        if not self.stream.is_in_place:
            return super().partially_unload(device_to, memory_to_free, force_patch_weights)
        session = self.stream.session
        if session.is_running or session.plan is None:
            return 0
        before = self.loaded_size()
        if self.stream.is_in_run:
            has_ring = self._has_ring
            self._shrink(memory_to_free)
            if has_ring:
                session.begin_run()
        else:
            with self.stream.moving():
                session.evict(int(memory_to_free))
            self.stream.note_leaving()
        self.stream.tell_loaded()
        freed = before - self.loaded_size()
        logger.info("LayerStream: gave back %.2f GiB, %.2f GiB stay", freed / GIB, self.loaded_size() / GIB)
        return freed

    @property
    def _has_ring(self) -> bool:
        """Whether all that the plan takes of the card is taken, its ring too where it has one."""
        session = self.stream.session
        return session.is_in_run or session.plan is None or session.plan.is_resident

    def _shrink(self, memory_to_free: float, afresh: bool = False) -> None:
        """Make a plan with so much less, if there is one, and load it."""
        plan = self._smaller_plan(memory_to_free)
        if plan is not None:
            self._load_plan(plan, fresh=False, afresh=afresh)
            write_ledger(self)

    def _smaller_plan(self, memory_to_free: float) -> Plan | None:
        """A plan by which so many bytes of the card come free; while there is no ring yet, of residents alone."""
        session, settings = self.stream.session, within(self.settings, self.stream)
        present, has_ring = session.plan, self._has_ring
        assert present is not None
        propose = partial(session.propose, packing=self._packing(), unpacked=self._unpacked())
        for prefetch in dict.fromkeys((settings.prefetch_blocks, 1)):
            budget_bytes = present.device_bytes - memory_to_free
            for _ in range(FITTING_ROUNDS):
                try:
                    plan = propose(int(budget_bytes), prefetch=prefetch, stream_all=settings.mode is Mode.ALWAYS)
                except BudgetTooSmall:
                    break
                freed_bytes = present.resident_bytes - plan.resident_bytes
                if has_ring:
                    freed_bytes = present.device_bytes - plan.device_bytes
                if freed_bytes >= memory_to_free:
                    return plan
                budget_bytes -= memory_to_free - freed_bytes
        return None

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Restore the model. With `unpatch_weights` its weights leave the card; the slabs stay for the next load."""
        if self._is_running:
            logger.warning("LayerStream: asked to unload inside a pass; the model stays until its next unload")
            return
        if unpatch_weights and self.stream.is_in_place:
            self.unpatch_hooks()
            with self.stream.moving():
                self.stream.session.unload()
            self.stream.leave_patches()
            self.stream.note_leaving()
            self.stream.load_id = None
        super().unpatch_model(device_to, unpatch_weights)

    # -- running -------------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Before a run: have other models of the same budget make way. Another node may have put this one elsewhere."""
        if self.settings.budget is None:
            leave_budget(self.stream)
        else:
            self.settings.budget.add(self.stream)
            wanted_bytes = 0 if self.settings.mode is Mode.ALWAYS else self.model_size()
            self.settings.budget.make_room(self.stream, wanted_bytes)

    def come_back(self) -> None:
        """Before a pass: have ComfyUI load the model again if it has left the card since its run began.

        Others may have been loaded between two steps, and wanted more than this one could give. Without being loaded it
        would go on with unpatched weights.
        """
        if self.stream.is_in_place or self._is_elsewhere:
            return
        with self._without_hooks():
            comfy.model_management.load_models_gpu([self])

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The scope of one pass of the model, which begins by acting on what the passes before it measured."""
        session = self.stream.session
        if not session.is_running and self.stream.measure():
            self.replan()
        with session.one_pass():
            yield

    def replan(self) -> None:
        """Between two passes of a run, once its first plan was measured: make a better one if there is one.

        What a plan really takes of the card shows when it is loaded; what is too much is given back at once.
        """
        plan, session = self._choose(float("inf")), self.stream.session
        if plan is session.plan:
            return
        self._load_plan(plan, fresh=True, afresh=True)
        for _ in range(FITTING_ROUNDS):
            session.begin_run()
            missing_bytes = least_left(within(self.settings, self.stream)) - self.stream.note_fitting()
            if missing_bytes <= 0 or not self.stream.device.holds_activations:
                break
            self._shrink(missing_bytes, afresh=True)
        write_ledger(self)
        logger.info("LayerStream: measured and planned anew: %s", summary(self))

    def cleanup(self) -> None:
        super().cleanup()
        self.end_run()

    def end_run(self) -> None:
        """After a run: the ring goes, residents stay."""
        if self.stream.is_open and not self._is_running:
            self.stream.session.end_run()

    @property
    def _is_running(self) -> bool:
        return self.stream.is_open and self.stream.session.is_running

    @property
    def _is_current(self) -> bool:
        """Whether a pass that is under way runs with the patches of this patcher."""
        current = getattr(self.model, "current_patcher", None)
        return self.stream.is_in_place and current is not None and current.patches_uuid == self.patches_uuid

    def patch_hooks(self, hooks: Any) -> None:
        """Change weights for scheduled hooks; what was fetched ahead of the change is stale."""
        if self.stream.is_open:
            self.stream.session.discard_fetched()
        super().patch_hooks(hooks)

    # -- telling -------------------------------------------------------------------------------------------------

    def streaming_report(self) -> dict[str, Any]:
        """Figures of this model's streaming, ready for JSON, as `telemetry.report` has them."""
        return report(self.stream)


def _carry_over(source: ModelPatcher, patcher: StreamingModelPatcher) -> None:
    """Give `patcher` all that a clone of `source` would have; `clone` itself can only make its own class."""
    clone = source.clone()
    patcher.__dict__.update(clone.__dict__)
    patcher.parent = source
    for wrapper in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).pop(COMPILE_KEY, []):
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, wrapper)
    patcher.object_patches = {}
    for name, obj in clone.object_patches.items():
        patcher.add_object_patch(name, obj)
    # The clone is finished with; emptied, its end cannot touch what it shared.
    clone.callbacks, clone.injections, clone.pinned = {}, {}, set()
    clone.model_options = {"transformer_options": {}}


def _no_progress(done: int, total: int) -> None:
    pass
