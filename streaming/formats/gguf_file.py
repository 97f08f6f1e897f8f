"""A GGUF file: its metadata, and its tensors as they lie in it.

In: a path. Out: an open file whose tensors are views of its mapped pages: nothing is read before it is used, and what
the system drops from RAM is read again, so that a file may be larger than RAM.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import gguf
import torch

from .dequantise import dequantise
from .gguf_header import GgufError, Header, TensorInfo, ValueType, read_header, read_value
from .gguf_tensor import GgufTensor
from .kinds import PLAIN, Kind

__all__ = ["GgufError", "GgufFile"]

# Where the storage of all tensors of a file has the open file itself, which lives as long.
MAPPED_FILE = "_layerstream_mapped_file"

# Where ComfyUI's converter keeps the shape of a tensor whose rows it made longer to fit blocks.
SHAPE_KEY = "comfy.gguf.orig_shape."

Value = TypeVar("Value", str, int, float, bool)


class Entry(NamedTuple):
    """A tensor of the file: what it holds and where."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


class GgufFile:
    """An open file. Its pages stay mapped for as long as a tensor of it lives."""

    def __init__(self, path: Path | str) -> None:
        """Raises GgufError with a sentence for the person who chose the file, and OSError."""
        self.path = Path(path)
        with _naming(self.path):
            file = self.path.open("rb")
            pages = _map(file)
            self._view = memoryview(pages)
            self._bytes = _as_tensor(pages)
            setattr(self._bytes.untyped_storage(), MAPPED_FILE, file)
            header = read_header(self._view)
            self._fields = header.fields
            self.entries = {info.name: self._entry(info, header) for info in header.tensors}
            self._check_parts()

    # -- metadata ------------------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> str | None:
        return self.value("general.architecture", str)

    def value(self, key: str, kind: type[Value]) -> Value | None:
        """A metadata value, None if there is none. Raises GgufError when it is of another type."""
        found = self._read(key)
        if found is not None and (type(found) is not kind):
            raise GgufError(f"{self.path.name}: the metadata `{key}` is no {kind.__name__}")
        return found

    def values(self, key: str, kind: type[Value]) -> list[Value] | None:
        """A metadata list, None if there is none. Raises GgufError when it is something else."""
        found = self._read(key)
        if found is not None and not (isinstance(found, list) and all(type(item) is kind for item in found[:1])):
            raise GgufError(f"{self.path.name}: the metadata `{key}` is no list of {kind.__name__}")
        return found

    def keys(self) -> Iterator[str]:
        yield from self._fields

    def _read(self, key: str) -> Any:
        field = self._fields.get(key)
        if field is None:
            return None
        with _naming(self.path):
            return read_value(self._view, field)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as its file has it: of torch's own dtype, or a `GgufTensor`. Its memory is the file's: only read it.

        Raises KeyError.
        """
        entry = self.entries[name]
        stored = self._bytes[entry.begin : entry.begin + entry.size_bytes]
        dtype = PLAIN.get(entry.kind.name)
        if dtype is None:
            return GgufTensor(stored, entry.kind, entry.shape)
        if entry.begin % dtype.itemsize:
            stored = stored.clone()
        return stored.view(dtype).view(entry.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, in the order in which they lie in the file."""
        return {entry.name: self.tensor(entry.name) for entry in sorted(self.entries.values(), key=_begin)}

    def summary(self) -> str:
        """How many tensors of each kind there are."""
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            counts[entry.kind.name] = counts.get(entry.kind.name, 0) + 1
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))

    # -- checks --------------------------------------------------------------------------------------------------------

    def _entry(self, info: TensorInfo, header: Header) -> Entry:
        try:
            name = gguf.GGMLQuantizationType(info.type_number)
            kind = Kind(name.name, *gguf.GGML_QUANT_SIZES[name])
        except (ValueError, KeyError) as error:
            raise GgufError(
                f"holds `{info.name}` in the unknown way {info.type_number}: update the gguf package, or take a file "
                "of another quantisation"
            ) from error
        if not _is_readable(kind):
            raise GgufError(f"holds `{info.name}` as {kind.name}, which nothing here reads: take another quantisation")
        elements = torch.Size(info.shape).numel()
        if elements % kind.elements or (info.shape and info.shape[-1] % kind.elements):
            raise GgufError(f"has rows of {info.shape[-1:]} in `{info.name}`, which are no whole blocks of {kind.name}")
        if info.offset % header.alignment:
            raise GgufError(f"has `{info.name}` at byte {info.offset}, which is not aligned to {header.alignment}")
        begin, size_bytes = header.data_start + info.offset, kind.stored_bytes(elements)
        if begin + size_bytes > len(self._view):
            raise GgufError(
                f"is cut short: `{info.name}` ends at byte {begin + size_bytes} and the file at {len(self._view)}: "
                "download it again"
            )
        return Entry(info.name, kind, self._shape(info, elements), begin, size_bytes)

    def _shape(self, info: TensorInfo, elements: int) -> tuple[int, ...]:
        field = self._fields.get(f"{SHAPE_KEY}{info.name}")
        if field is None:
            return info.shape
        if field.type is not ValueType.ARRAY or field.item_type not in (ValueType.INT32, ValueType.UINT32):
            raise GgufError(f"gives `{info.name}` a shape that is no list of numbers")
        shape = tuple(read_value(self._view, field)) if field.length <= len(info.shape) + 8 else ()
        if min(shape, default=0) < 0 or torch.Size(shape).numel() != elements:
            raise GgufError(f"gives `{info.name}` the shape {shape}, but it has {elements} values")
        return shape

    def _check_parts(self) -> None:
        field = self._fields.get("split.count")
        parts = 1 if field is None or field.type is ValueType.ARRAY else read_value(self._view, field)
        if parts not in (0, 1):
            raise GgufError(f"is one of {parts} parts: put them together with llama.cpp's gguf-split --merge")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what a `GgufError` says."""
    try:
        yield
    except GgufError as error:
        raise GgufError(f"{path.name} {error}") from error


@cache
def _is_readable(kind: Kind) -> bool:
    try:
        dequantise(torch.zeros(kind.size_bytes, dtype=torch.uint8), kind, torch.float32)
    except ValueError:
        return False
    return True


def _begin(entry: Entry) -> int:
    return entry.begin


def _map(file: BinaryIO) -> mmap.mmap:
    """The file's bytes, mapped and not read."""
    file.seek(0, 2)
    if file.tell() == 0:
        raise GgufError("is empty: download it again")
    # Read only: a private writable mapping counts against RAM, which a file may be larger than.
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _as_tensor(pages: mmap.mmap) -> torch.Tensor:
    """uint8 [bytes] on the same pages, which stay mapped for as long as it lives."""
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(pages, dtype=torch.uint8)
