"""The streaming session of a ComfyUI model, shared by every patcher of that model.

In: a model and the patcher it came with. Out: one `ModelStream` a model, however many nodes and clones refer to it, so
that its weights are in host memory once. The file is long because all that the host must know of a model is one value.
"""

from __future__ import annotations

import itertools
import time
import uuid
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ..engine.block import take_apart
from ..engine.codec import align
from ..engine.device import Device
from ..engine.meter import PassTimes
from ..engine.originals import Originals
from ..engine.plan import Packing
from ..engine.session import Session
from .budget import SPARE_RAM_BYTES, available_ram_bytes, host_memory
from .casting import CastSwitch
from .families import Family, family_of
from .files import file_of, is_mapped
from .moves import Moves
from .restraint import FREE, Restraint
from .settings import Patching, StreamingSettings

if TYPE_CHECKING:
    from .run_time_patches import RunTimePatch, RunTimePatches

ROOT = "diffusion_model"

# What a model that was short of RAM wants of it, against what it needs, before it is taken to have enough again.
ENOUGH = 1.2

# Of how many shapes it is kept what their runs have shown.
MOST_SHAPES = 16

# Packed bytes of a weight against its own, at the worst seen.
PACKED_SHARE = 0.75


class Way(NamedTuple):
    """A way to run a step: in how many walks over the blocks, and what it is estimated to need besides weights.

    Guided runs can have conditional and unconditional in one batch, which needs more memory, or walk once for each.
    """

    walks: int = 1
    reserve_bytes: int = 0
    is_batch: bool = False


class Measured(NamedTuple):
    """What runs of one shape have shown, as `ModelStream` has it: the next one of that shape is planned by it."""

    times: PassTimes | None = None
    fitting_bytes: int | None = None
    compute_bytes: int = 0
    batch: int = 0


@dataclass(eq=False)
class ModelStream:
    """A session with what the host needs to know of it.

    `load_id` is the identity that the model carries in `current_weight_patches_uuid` while our weights are in it;
    ComfyUI takes any id that is not its own as a reason to restore the model from the ledger, see `ledger.py`.
    """

    model: torch.nn.Module
    device: Device
    family: Family
    root: str = ROOT
    """The module of the model that holds its units; "" for a text encoder or an autoencoder, which is all units."""
    keeps_copies: bool = False
    """Whether it comes back to the card at link speed once it has left it."""
    is_shelved: bool = False
    """Whether what is on the card keeps a page-locked copy on the host."""
    moves: Moves = field(default_factory=Moves)
    restraint: Restraint = FREE
    """What the run gives up because one like it ran out of memory."""
    load_id: uuid.UUID | None = None
    ledger_key: Hashable = None
    """What the ledger was last written for, as `ledger.py` has it."""
    told_bytes: int = 0
    """What ComfyUI was told that the model has on the card."""
    is_guided: bool = False
    estimates: tuple[Way, ...] = (Way(),)
    """How the coming run can go, the one in a single walk first, by ComfyUI's estimates of what compute needs."""
    beside: weakref.WeakSet[ModelPatcher] = field(default_factory=weakref.WeakSet)
    """The models that the coming run has on the card besides this one: control models and the like."""
    batch: int = 0
    """The most that passes of this kind of run had in a batch."""
    whole_batch: int = 1
    """What they have where nothing is split."""
    budget_bytes: int = 0
    """What weights, patches and ring may take of the card."""
    settings: tuple[StreamingSettings, Packing] | None = None
    """What the plan in place was made for."""
    shape: Hashable = None
    """What kind of run it is: its latent's shape, what is estimated for it, whether it is guided and by what."""
    fitting_bytes: int | None = None
    """What weights, patches and ring can take on the card in a run of this shape, as seen in one; None until then."""
    compute_bytes: int = 0
    """What compute took of the card beside them at its peak."""
    measured: dict[Hashable, Measured] = field(default_factory=dict)
    """What runs of other shapes have shown, the latest last: those of one prompt take turns, small and large say."""
    is_short_of_ram: bool = False
    """Whether RAM had no room for slabs of what streams when it was last asked."""
    run_time: RunTimePatches | None = None
    """Which patches are applied as their layer runs, as it was decided at the last load."""
    brought: tuple[RunTimePatch, ...] = ()
    """The patches that were brought to the card; whoever else unloads the model has them leave it."""
    without_room: set[tuple[uuid.UUID, Patching]] = field(default_factory=set)
    """The sets of patches that RAM once had no room to bake."""
    patch_files: Originals = field(init=False)
    """The files of the patches that were baked last, locked where the system keeps them while RAM has room."""
    casting: CastSwitch = field(default_factory=CastSwitch)
    number: int = field(default_factory=itertools.count(1).__next__)
    """What tells it from other streams where it is shown."""
    node_ids: set[str] = field(default_factory=set)
    """The nodes of graphs that asked for it, which show what it does."""
    _session: Session | None = None

    def __post_init__(self) -> None:
        self.patch_files = Originals(self.device, host_memory())

    @property
    def spare_bytes(self) -> int:
        """What is locked of RAM and makes way for anything else."""
        return self.patch_files.size_bytes + (self.session.spare_bytes if self.is_open else 0)

    @property
    def is_in_place(self) -> bool:
        """True while the model holds our tensors: nobody else has loaded or unloaded it since.

        A patcher that ComfyUI has in place of one of ours that is gone may put home tensors back and leave the id.
        """
        if self.load_id is None or self.model.current_weight_patches_uuid is not self.load_id:
            return False
        return bool(self.model.model_loaded_weight_memory == self.told_bytes)

    def tell_loaded(self) -> None:
        """Tell ComfyUI what the model has on the card now."""
        self.told_bytes = self.session.resident_bytes + self.patch_bytes
        self.model.model_loaded_weight_memory = self.told_bytes  # type: ignore[assignment]

    @property
    def missing_bytes(self) -> int:
        """What the models beside this one have yet to bring to the card; ComfyUI loads them before it or after it."""
        return sum(max(0, other.model_size() - other.loaded_size()) for other in self.beside)

    @property
    def ways(self) -> tuple[Way, ...]:
        """How the coming run can go, with what it needs of the card for everything but this model."""
        missing_bytes = self.missing_bytes
        return tuple(way._replace(reserve_bytes=way.reserve_bytes + missing_bytes) for way in self.estimates)

    @property
    def is_streaming(self) -> bool:
        """True while the model is loaded by a plan under which something streams or is restored."""
        return self.is_in_place and self.session.plan is not None and not self.session.plan.is_resident

    @property
    def is_in_run(self) -> bool:
        """True while a run is under way, also before its first pass: ComfyUI loads nothing anew until it ends."""
        return self.session.is_in_run or getattr(self.model, "current_patcher", None) is not None

    @property
    def is_open(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> Session:
        assert self._session is not None, "the session opens with the first load"
        return self._session

    @property
    def is_batch_sure(self) -> bool:
        """True where runs of this kind were seen to fit in one batch, and ComfyUI asks us before it splits one."""
        is_asked = hasattr(ModelPatcher, "get_free_memory")
        return is_asked and self.fitting_bytes is not None and self.batch >= self.whole_batch

    @property
    def held_bytes(self) -> int:
        """Bytes of the card that weights and patches take now, the ring not counted."""
        return self.session.resident_bytes + self.patch_bytes if self.is_in_place else 0

    @property
    def patch_bytes(self) -> int:
        """Bytes of the card that patches take."""
        return sum(patch.card_bytes for patch in self.brought)

    def leave_patches(self) -> None:
        """Have patches give back what they take of the card."""
        for patch in self.brought:
            patch.leave()
        self.brought = ()

    def key(self, name: str) -> str:
        """A weight's name in the model's state dict, from its name in the root."""
        return f"{self.root}.{name}" if self.root else name

    def shelve(self) -> None:
        """Keep page-locked copies of what is on the card, from the next load on."""
        self.is_shelved = True
        if self._session is not None:
            self._session.shelve()

    def note_leaving(self) -> None:
        """Take note that what was on the card has left it, in part or as a whole."""
        if self.keeps_copies:
            self.shelve()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Count and time what comes to the card or leaves it meanwhile; nobody else may hold the model's weights."""
        before, begun = self.session.resident_bytes, time.perf_counter()
        try:
            yield
        finally:
            self.moves.note(self.session.resident_bytes - before, time.perf_counter() - begun)

    def note_node(self) -> None:
        """Take note of the node that is executed now, if one is: it asks for this stream."""
        context = get_executing_context()
        if context is not None:
            self.node_ids.add(context.node_id)

    def begin_run(self, shape: Hashable) -> None:
        """Take note that a run of `shape` comes: only what another one of that shape has shown holds for it."""
        if shape == self.shape:
            return
        shown = self.measured.pop(shape, Measured())  # first, lest it make way for what is noted now
        times = self.session.times if self.is_open else None
        self.measured[self.shape] = Measured(times, self.fitting_bytes, self.compute_bytes, self.batch)
        if len(self.measured) > MOST_SHAPES:
            del self.measured[next(iter(self.measured))]
        self.shape = shape
        self._recall(shown)

    def forget_measured(self) -> None:
        """Take note that coming runs take other memory and time than those before."""
        self.measured.clear()
        self._recall(Measured())

    def _recall(self, measured: Measured) -> None:
        times, self.fitting_bytes, self.compute_bytes, self.batch = measured
        if self.is_open:
            self.session.take_times(times)

    def measure(self) -> bool:
        """Between passes: take what the session measured, once a plan; True when it did.

        What is free now was free at the peak of the passes before, because torch keeps what it once took.
        """
        if not self.session.measure():
            return False
        if self.device.holds_activations:
            at_peak = self.device.unused_bytes()
            self.device.trim()
            self.compute_bytes = self.device.unused_bytes() - at_peak
            self.note_fitting()
        return True

    def note_fitting(self) -> int:
        """Note what weights, patches and ring may take by what is free now, before compute; give what is left."""
        left_bytes = self.device.unused_bytes() - self.compute_bytes
        self.fitting_bytes = self.session.resident_bytes + self.session.ring_bytes + self.patch_bytes + left_bytes
        return left_bytes

    def has_room_for_packed(self) -> bool:
        """Whether RAM holds packed copies beside the original weights, which packing keeps.

        Weights mapped from their file need none; what is in slabs already counts as free.
        """
        needed = sum(
            align(weight.codec.stored_bytes)
            for block in self.session.parts.blocks
            for weight in block.weights
            if not is_mapped(weight.home)
        )
        return self.has_ram_for(int(PACKED_SHARE * needed) - self.session.host_bytes)

    @property
    def room_for_copies(self) -> float:
        """Bytes of RAM that slabs of this model may take where they hold copies of what can be read from its file."""
        return host_memory().room_for_copies() + (self.session.host_bytes if self.is_open else 0)

    def note_ram(self, wanted_bytes: int) -> bool:
        """Whether RAM has no room for slabs of `wanted_bytes`; once it had none, room for a little more is needed."""
        self.is_short_of_ram = wanted_bytes * (ENOUGH if self.is_short_of_ram else 1.0) > self.room_for_copies
        return self.is_short_of_ram

    def has_ram_for(self, size_bytes: int) -> bool:
        """Whether so many bytes more leave the RAM that the system and other programs need."""
        return size_bytes <= 0 or available_ram_bytes() > size_bytes + SPARE_RAM_BYTES

    def open(self, is_dynamic: bool) -> None:
        """Make the session if there is none. The model must hold its own weights, unchanged, on the host.

        A dynamic patcher leaves weights in their file's dtype and says in attributes what the model wants.
        """
        if self._session is None:
            parts = take_apart(
                self.model.get_submodule(self.root),
                self.family.units,
                lambda module, name: getattr(module, f"{name}_comfy_model_dtype", None) if is_dynamic else None,
            )
            self._session = Session(parts, self.device, is_mapped, self.casting.note_bound, host_memory(), file_of)
        if self.is_shelved:
            self._session.shelve()


# Patchers hold the streams and a stream holds its model, so neither is kept alive from here.
_streams: weakref.WeakValueDictionary[int, ModelStream] = weakref.WeakValueDictionary()


def live_streams() -> list[ModelStream]:
    """The streams that have been loaded at least once. Any thread may ask, while models come and go."""
    streams = (reference() for reference in _streams.valuerefs())
    return [stream for stream in streams if stream is not None and stream.is_open]


def stream_for(patcher: ModelPatcher, device: Device, family: Family | None = None) -> ModelStream | None:
    """Find or make the stream of `patcher`'s model; None when the model has no blocks.

    `family` says what the units are, which may be none: such a model is on the card whole or not at all.
    """
    model = patcher.model
    stream = _streams.get(id(model))
    if stream is not None and stream.model is model:
        return stream
    root = ROOT if isinstance(getattr(model, ROOT, None), torch.nn.Module) else ""
    if family is None:
        family = family_of(model.get_submodule(root))
        if not family.units:
            return None
    stream = ModelStream(model, device, family, root)
    _streams[id(model)] = stream
    return stream
