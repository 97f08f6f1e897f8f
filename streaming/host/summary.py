"""One line for the log: what a model's streaming achieved, and why its weights do not travel packed.

In: a streaming patcher with a loaded plan. Out: a sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import GIB

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher


def summary(patcher: StreamingModelPatcher) -> str:
    """What streams, what stays, and how weights travel; for people."""
    stream, session, plan = patcher.stream, patcher.stream.session, patcher.stream.session.plan
    assert plan is not None
    name = f"{type(stream.model).__name__} ({stream.device.name})"
    from_file = f", {session.in_file_bytes / GIB:.2f} GiB of it from its file" if session.in_file_bytes else ""
    if plan.is_resident:
        return f"{name}: fits, {session.resident_bytes / GIB:.2f} GiB resident, nothing streams"
    return (
        f"{name}: {len(session.parts.blocks)} blocks, {session.resident_bytes / GIB:.2f} GiB resident, "
        f"{plan.streamed_bytes / GIB:.2f} GiB streamed a step {_form(patcher)}{from_file}, "
        f"ring {plan.ring_bytes / GIB:.2f} GiB, host {session.host_bytes / GIB:.2f} GiB{_patches(patcher)}"
    )


def _patches(patcher: StreamingModelPatcher) -> str:
    """How patches are applied, where there are any."""
    if not patcher.patches:
        return ""
    return f", LoRAs {'applied as layers run' if patcher.run_time_patches else 'in the weights'}"


def _form(patcher: StreamingModelPatcher) -> str:
    """How the weights travel, and why not packed."""
    stream, session = patcher.stream, patcher.stream.session
    assert session.plan is not None
    if session.is_packed:
        kept = session.packed_resident_bytes
        also = f", {kept / GIB:.2f} GiB of residents packed" if kept else ""
        return f"as {session.link_bytes / GIB:.2f} GiB, packed{also}"
    expected = session.expect(session.plan)
    if expected is None or expected.limit == "compute":
        return "raw"
    if not session.can_pack:
        return "raw (packing needs Triton)"
    if patcher.hook_patches:
        return "raw (scheduled hooks change weights)"
    if not stream.has_room_for_packed():
        return "raw (packing needs more free RAM)"
    return "raw (these weights do not pack)"
