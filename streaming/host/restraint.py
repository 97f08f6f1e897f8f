"""What a model gives up while it runs, because it ran out of memory before: less than its settings would allow."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .settings import GIB, Mode, StreamingSettings


@dataclass(frozen=True)
class Restraint:
    """Bounds that come on top of the settings.

    `most_bytes` bounds weights and ring, `prefetch_blocks` what is fetched ahead, both None for no bound. `is_split`
    runs conditional and unconditional passes apart.
    """

    most_bytes: int | None = None
    prefetch_blocks: int | None = None
    is_split: bool = False
    is_all_streamed: bool = False

    def on(self, settings: StreamingSettings) -> StreamingSettings:
        """The settings under these bounds; `vram_gib` must not be relative any more where `most_bytes` is given."""
        if self.is_all_streamed:
            settings = replace(settings, mode=Mode.ALWAYS, vram_gib=0.0)
        if self.prefetch_blocks is not None:
            settings = replace(settings, prefetch_blocks=self.prefetch_blocks)
        if self.most_bytes is not None:
            most_gib = self.most_bytes / GIB
            own_gib = settings.vram_gib
            settings = replace(settings, vram_gib=min(most_gib, own_gib) if own_gib > 0 else most_gib)
        return settings


FREE = Restraint()
