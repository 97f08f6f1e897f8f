"""Who leaves the card when: the modes of the Offload Policy node as a table, and what a person may set beside them.

In: what a person set. Out: for each component and each stage, whether it stays, leaves, or leaves if room is short.
Nothing here knows a model or moves one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Part(Enum):
    """What of a workflow is on the card for one kind of stage, and idle in the others."""

    TEXT = "text encoder"
    DIFFUSION = "diffusion model"
    VAE = "VAE"


class Stage(Enum):
    """What a workflow does at a time."""

    TEXT_ENCODE = "text encode"
    IMAGE_ENCODE = "image encode"
    SAMPLING = "sampling"
    DECODE = "decode"


class Leave(Enum):
    """When an idle component leaves the card."""

    NEVER = "never"
    IF_SHORT = "if room is short"
    NEXT_STAGE = "when a stage of another component begins"
    AT_END = "when its own stage ends"


class PolicyMode(str, Enum):
    """The modes of the node; `auto` moves what the next stage has no room beside."""

    AUTO = "auto"
    NONE = "none"
    COND_ONLY = "cond_only"
    COND_DIFFUSION = "cond_diffusion"
    AGGRESSIVE = "aggressive"
    LAYER_STREAMING = "layer_streaming"


class Switch(str, Enum):
    """An override: as the mode has it, or not."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Estimation(str, Enum):
    """How what a stage needs besides weights is known beforehand."""

    FORMULA = "formula"
    DRYRUN = "dryrun"


class Departures(NamedTuple):
    """When each part leaves."""

    text: Leave
    diffusion: Leave
    vae: Leave

    def of(self, part: Part) -> Leave:
        return {Part.TEXT: self.text, Part.DIFFUSION: self.diffusion, Part.VAE: self.vae}[part]


# The text encoder never leaves at the end of its own stage: positive and negative prompts are two stages of one kind.
DEPARTURES = {
    PolicyMode.NONE: Departures(Leave.NEVER, Leave.NEVER, Leave.NEVER),
    PolicyMode.COND_ONLY: Departures(Leave.NEXT_STAGE, Leave.NEVER, Leave.NEVER),
    PolicyMode.COND_DIFFUSION: Departures(Leave.NEXT_STAGE, Leave.NEXT_STAGE, Leave.NEVER),
    PolicyMode.AGGRESSIVE: Departures(Leave.NEXT_STAGE, Leave.AT_END, Leave.AT_END),
    PolicyMode.LAYER_STREAMING: Departures(Leave.NEXT_STAGE, Leave.NEXT_STAGE, Leave.NEVER),
    PolicyMode.AUTO: Departures(Leave.IF_SHORT, Leave.IF_SHORT, Leave.IF_SHORT),
}


@dataclass(frozen=True)
class PolicySettings:
    """What a person sets on the Offload Policy node.

    `reload_*` says how a component that left comes back: `on` at once when the image is done, `off` never whole, so
    that it streams from the host, `auto` when its stage begins.
    Raises ValueError where overrides contradict each other or the mode.
    """

    mode: PolicyMode = PolicyMode.AUTO
    offload_cond_stage: Switch = Switch.AUTO
    offload_diffusion: Switch = Switch.AUTO
    reload_cond_stage: Switch = Switch.AUTO
    reload_diffusion: Switch = Switch.AUTO
    estimation: Estimation = Estimation.FORMULA
    is_logged: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", PolicyMode(self.mode))
        object.__setattr__(self, "estimation", Estimation(self.estimation))
        for name in OVERRIDES:
            object.__setattr__(self, name, Switch(getattr(self, name)))
        changed = [name for name in OVERRIDES if getattr(self, name) is not Switch.AUTO]
        if self.mode is PolicyMode.NONE and changed:
            raise ValueError(
                f"mode is none, which leaves everything to ComfyUI, but {changed[0]} is "
                f"{getattr(self, changed[0]).value}: set it to auto, or choose another mode"
            )
        for part, name in ((Part.TEXT, "cond_stage"), (Part.DIFFUSION, "diffusion")):
            if self.departure(part) is Leave.NEVER and self.reload(part) is Switch.ON:
                raise ValueError(
                    f"reload_{name} is on, but the {part.value} never leaves the card: set offload_{name} to on, or "
                    f"reload_{name} to auto"
                )
        if self.mode is PolicyMode.LAYER_STREAMING and self.reload_diffusion is Switch.ON:
            raise ValueError(
                "layer_streaming streams the diffusion model, so it is never brought back whole: set reload_diffusion "
                "to auto, or choose cond_diffusion"
            )

    def departure(self, part: Part) -> Leave:
        """When an idle `part` leaves."""
        by_mode = DEPARTURES[self.mode].of(part)
        override = {Part.TEXT: self.offload_cond_stage, Part.DIFFUSION: self.offload_diffusion}.get(part, Switch.AUTO)
        if override is Switch.OFF:
            return Leave.NEVER
        if override is Switch.ON and by_mode in (Leave.NEVER, Leave.IF_SHORT):
            return Leave.NEXT_STAGE
        return by_mode

    def reload(self, part: Part) -> Switch:
        """How `part` comes back."""
        return {Part.TEXT: self.reload_cond_stage, Part.DIFFUSION: self.reload_diffusion}.get(part, Switch.AUTO)

    def moves(self, part: Part) -> bool:
        """Whether the policy moves `part` itself; otherwise it is ComfyUI's, and only its stages are noted."""
        return self.departure(part) is not Leave.NEVER or self.streams(part)

    def streams(self, part: Part) -> bool:
        """Whether `part` streams even where there is room for all of it."""
        if part is Part.DIFFUSION and self.mode is PolicyMode.LAYER_STREAMING:
            return True
        return self.reload(part) is Switch.OFF


OVERRIDES = ("offload_cond_stage", "offload_diffusion", "reload_cond_stage", "reload_diffusion")
