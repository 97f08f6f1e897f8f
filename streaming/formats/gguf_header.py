"""Reads the header of a GGUF file without trusting it.

In: the file's bytes, mapped. Out: its metadata and where its tensors lie, or a `GgufError` that says what is wrong.
Every count, length and offset is compared with what is left of the file before anything is made of it, so that whatever
a file says, reading it takes no longer and no more memory than a sound file of its size would.

The `gguf` package has a reader too. It makes several objects of every item of every list, which takes 15 s and 0.7 GB
for a tokenizer of 262,144 tokens, and believes counts; here a list is skipped and made when someone asks for it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum
from typing import Any, NamedTuple

import numpy

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20
MOST_DIMENSIONS = 8
LONGEST_NAME = 1024
# No model comes near; files of zeros of many gigabytes would.
MOST_ENTRIES = 1 << 18
MOST_STRINGS = 1 << 22
DEEPEST_LIST = 4


class GgufError(ValueError):
    """A file is no GGUF file, is damaged, or holds what nothing here reads."""


class ValueType(IntEnum):
    """What a metadata value is; numbers of the format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_NUMBERS = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "<u1",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}


class Field(NamedTuple):
    """One metadata value, not yet made: its type and the byte where it begins; for a list also its items'."""

    type: ValueType
    offset: int
    item_type: ValueType | None = None
    length: int = 1


class TensorInfo(NamedTuple):
    """One tensor as the header has it: dimensions slowest first, and its offset from where data begins."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class Header(NamedTuple):
    """What a file says of itself; `data_start` is the byte where tensors' data begins."""

    fields: dict[str, Field]
    tensors: list[TensorInfo]
    data_start: int
    alignment: int


class _Cursor:
    """A place in the file that never passes its end."""

    def __init__(self, data: memoryview, offset: int) -> None:
        self.data = data
        self.offset = offset
        self.strings_left = MOST_STRINGS

    @property
    def left(self) -> int:
        return len(self.data) - self.offset

    def skip(self, size_bytes: int, what: str) -> int:
        """Pass `size_bytes`; give where they begin."""
        if size_bytes > self.left:
            raise GgufError(f"ends in the middle of {what}: it needs {size_bytes} bytes more and {self.left} are left")
        begin, self.offset = self.offset, self.offset + size_bytes
        return begin

    def number(self, form: str, what: str) -> int:
        begin = self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, begin)[0]

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        if length > LONGEST_NAME:
            raise GgufError(f"has {what} of {length} bytes")
        begin = self.skip(length, what)
        try:
            return str(self.data[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"has {what} that is no text ({error.reason})") from error

    def skip_string(self, what: str) -> None:
        self.strings_left -= 1
        if self.strings_left < 0:
            raise GgufError(f"has more than {MOST_STRINGS} strings in its metadata")
        self.skip(self.number("<Q", what), what)

    def value_type(self, what: str) -> ValueType:
        number = self.number("<I", what)
        try:
            return ValueType(number)
        except ValueError as error:
            raise GgufError(f"has {what} of the unknown type {number}") from error

    def skip_value(self, value_type: ValueType, what: str) -> None:
        if value_type is ValueType.STRING:
            self.skip_string(what)
        else:
            self.skip(numpy.dtype(_NUMBERS[value_type]).itemsize, what)

    def skip_list(self, what: str, depth: int = 1) -> Field:
        item_type = self.value_type(f"the items of {what}")
        count = self.number("<Q", what)
        begin = self.offset
        if item_type in _NUMBERS:
            self.skip(count * numpy.dtype(_NUMBERS[item_type]).itemsize, what)
            return Field(ValueType.ARRAY, begin, item_type, count)
        if depth == DEEPEST_LIST:
            raise GgufError(f"has lists in lists, {depth} deep, in {what}")
        if 8 * count > self.left:
            raise GgufError(f"ends in the middle of {what}: {count} items cannot be in {self.left} bytes")
        for _ in range(count):
            if item_type is ValueType.STRING:
                self.skip_string(what)
            else:
                self.strings_left -= 1
                self.skip_list(what, depth + 1)
        return Field(ValueType.ARRAY, begin, item_type, count)


def read_header(data: memoryview) -> Header:
    """Read the header of a whole file. Raises GgufError, whose text goes after the file's name."""
    if bytes(data[:4]) != MAGIC:
        raise GgufError("is no GGUF file: it does not begin with GGUF")
    cursor = _Cursor(data, 4)
    version = cursor.number("<I", "its version")
    if version & 0xFFFF == 0:
        raise GgufError("was written for big-endian machines: take the file for others")
    if version not in VERSIONS:
        raise GgufError(f"is of GGUF version {version}, and only {VERSIONS[0]} and {VERSIONS[1]} are read")
    tensor_count = _entries(cursor, "tensors")
    field_count = _entries(cursor, "metadata entries")
    fields: dict[str, Field] = {}
    for index in range(field_count):
        key = cursor.string(f"the name of metadata entry {index}")
        if key in fields:
            raise GgufError(f"has the metadata `{key}` twice")
        fields[key] = _field(cursor, key)
    tensors = [_tensor(cursor, index) for index in range(tensor_count)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GgufError("has two tensors of one name")
    alignment = _alignment(data, fields)
    data_start = -(-cursor.offset // alignment) * alignment
    return Header(fields, tensors, data_start, alignment)


def _entries(cursor: _Cursor, what: str) -> int:
    count = cursor.number("<Q", f"its number of {what}")
    if count > MOST_ENTRIES:
        raise GgufError(f"says that it has {count} {what}")
    return count


def _field(cursor: _Cursor, key: str) -> Field:
    what = f"the metadata `{key}`"
    value_type = cursor.value_type(what)
    if value_type is ValueType.ARRAY:
        return cursor.skip_list(what)
    begin = cursor.offset
    cursor.skip_value(value_type, what)
    return Field(value_type, begin)


def _tensor(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.string(f"the name of tensor {index}")
    what = f"what describes tensor `{name}`"
    dimensions = cursor.number("<I", what)
    if dimensions > MOST_DIMENSIONS:
        raise GgufError(f"gives tensor `{name}` {dimensions} dimensions")
    sizes = [cursor.number("<Q", what) for _ in range(dimensions)]
    if math.prod(sizes) >= 1 << 48:
        raise GgufError(f"gives tensor `{name}` the shape {tuple(reversed(sizes))}, which no file can hold")
    type_number = cursor.number("<I", what)
    return TensorInfo(name, tuple(reversed(sizes)), type_number, cursor.number("<Q", what))


def _alignment(data: memoryview, fields: dict[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    alignment = read_value(data, field) if field.type is ValueType.UINT32 else 0
    if not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise GgufError(f"has the alignment {alignment}, which is no power of two up to {LARGEST_ALIGNMENT}")
    return alignment


def read_value(data: memoryview, field: Field) -> Any:
    """Make a metadata value: a number, a bool, a string, or a list of them. Raises GgufError."""
    if field.type is not ValueType.ARRAY:
        return _items(data, field.type, field.offset, 1)[0]
    assert field.item_type is not None
    if field.item_type is ValueType.ARRAY:
        raise GgufError("has a list of lists where a list is wanted")
    return _items(data, field.item_type, field.offset, field.length)


def _items(data: memoryview, item_type: ValueType, offset: int, count: int) -> list[Any]:
    if item_type in _NUMBERS:
        values = numpy.frombuffer(data, _NUMBERS[item_type], count, offset).tolist()
        return [bool(value) for value in values] if item_type is ValueType.BOOL else values
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, offset)
        # Some tokens of some published tokenizers are no whole characters.
        strings.append(str(data[offset + 8 : offset + 8 + length], "utf-8", "replace"))
        offset += 8 + length
    return strings
