"""GGUF files are read as the reference reader reads them, and bad ones are refused with a sentence, at once."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import gguf
import numpy
import psutil
import pytest
import torch
from layerstream.streaming.formats.gguf_file import GgufError, GgufFile
from layerstream.streaming.formats.gguf_tensor import GgufTensor
from layerstream.streaming.formats.kinds import QUANTISED

MUTATIONS = 10_000
RANDOM = numpy.random.default_rng(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file as the reference writer writes it, with values of every type and tensors of many kinds."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("general.type", "model")
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -3)
    writer.add_uint16("test.u16", 60000)
    writer.add_int16("test.i16", -300)
    writer.add_uint32("test.u32", 1 << 31)
    writer.add_int32("test.i32", -(1 << 30))
    writer.add_uint64("test.u64", 1 << 63)
    writer.add_int64("test.i64", -(1 << 62))
    writer.add_float32("test.f32", 0.5)
    writer.add_float64("test.f64", 1e300)
    writer.add_bool("test.bool", True)
    writer.add_array("test.strings", ["", "ä", "third"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.floats", [0.25, 2.0])
    writer.add_array("comfy.gguf.orig_shape.reshaped", (4, 2, 4, 32))
    writer.add_tensor("plain.f32", RANDOM.standard_normal((3, 5)).astype(numpy.float32))
    writer.add_tensor("plain.f16", RANDOM.standard_normal((7,)).astype(numpy.float16))
    for name in ("Q8_0", "Q4_0", "Q5_1", "BF16"):
        values = RANDOM.standard_normal((6, 64)).astype(numpy.float32)
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"quantised.{name}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        stored = RANDOM.integers(0, 256, (4, QUANTISED[name].size_bytes), dtype=numpy.uint8)
        writer.add_tensor(f"k.{name}", stored, raw_dtype=gguf.GGMLQuantizationType[name])
    stored = RANDOM.integers(0, 256, (4, 144), dtype=numpy.uint8)
    writer.add_tensor("reshaped", stored, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_are_those_of_the_reference_reader(good):
    file, reader = GgufFile(good), gguf.GGUFReader(good)
    assert list(file.entries) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensor(tensor.name)
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        assert file.entries[tensor.name].kind.name == kind.name
        values = torch.from_numpy(gguf.quants.dequantize(numpy.array(tensor.data), kind))
        plain = ours.values(torch.float32) if isinstance(ours, GgufTensor) else ours.float()
        numpy.testing.assert_array_equal(plain.reshape(-1), values.reshape(-1))
        if tensor.name != "reshaped":
            assert tuple(ours.shape) == tuple(int(size) for size in reversed(tensor.shape))
    assert file.tensor("reshaped").shape == (4, 2, 4, 32)
    assert file.summary().startswith("1 BF16, 1 F16, 1 F32, 1 IQ4_XS, 1 Q2_K, 1 Q3_K, 1 Q4_0, 2 Q4_K, ")


def test_metadata_is_that_of_the_reference_reader(good):
    file, reader = GgufFile(good), gguf.GGUFReader(good)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(file.keys()) == fields.keys()
    for key, field in fields.items():
        content = field.contents()
        if isinstance(content, list):
            assert file.values(key, type(content[0])) == content
        else:
            assert file.value(key, type(content)) == content
    assert file.architecture == "flux"
    assert file.value("nothing", int) is None and file.values("nothing", str) is None


def test_metadata_of_another_type_is_refused(good):
    file = GgufFile(good)
    with pytest.raises(GgufError, match=r"good\.gguf: the metadata `test\.u8` is no str"):
        file.value("test.u8", str)
    with pytest.raises(GgufError, match=r"`test\.u8` is no list of int"):
        file.values("test.u8", int)
    with pytest.raises(GgufError, match=r"`test\.strings` is no list of int"):
        file.values("test.strings", int)


def test_tensors_outlive_their_file_and_are_its_pages(good, tmp_path):
    path = tmp_path / "moved.gguf"
    path.write_bytes(good.read_bytes())
    tensor = GgufFile(path).tensor("k.Q4_K")
    begin = GgufFile(path).entries["k.Q4_K"].begin
    assert bytes(tensor.stored.numpy()) == good.read_bytes()[begin : begin + tensor.nbytes]


def test_a_tokenizer_of_a_quarter_million_tokens_opens_at_once(tmp_path):
    """The reference reader takes 15 s and 0.7 GB for it."""
    path = tmp_path / "tokens.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    tokens = [f"token {index}" for index in range(262_144)]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [float(index) for index in range(len(tokens))])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    begin = time.process_time()
    file = GgufFile(path)
    assert time.process_time() - begin < 3
    assert file.values("tokenizer.ggml.tokens", str) == tokens
    assert file.values("tokenizer.ggml.scores", float)[-1] == 262_143.0


def test_a_file_larger_than_ram_opens_and_gives_what_is_asked_for(tmp_path):
    """Its pages are the system's: they come when they are read and go when RAM is short."""
    memory_bytes = psutil.virtual_memory().total
    rows = 2 * memory_bytes // (4096 // 32 * 34)
    name = b"double_blocks.0.img_attn.qkv.weight"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    header += struct.pack("<IQQIQ", 2, 4096, rows, 8, 0)
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 64 + rows * 4352)  # sparse: it takes no space on disk
    before = psutil.Process().memory_info().rss
    weight = GgufFile(path).tensor(name.decode())
    assert weight.nbytes > memory_bytes and weight.shape == (rows, 4096)
    last = torch.tensor([0, rows // 2, rows - 1])
    assert torch.equal(weight.rows(last, torch.float32), torch.zeros(3, 4096))
    assert psutil.Process().memory_info().rss - before < 64 * 1024**2


# -- files that are wrong ----------------------------------------------------------------------------------------------


def header(*, version=3, tensors=0, fields=0, rest=b"", magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def a_tensor(name=b"x", shape=(32,), kind=8, offset=0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def a_list(key: bytes, item_type: int, count: int) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, item_type, count)


WRONG = {
    "is empty": b"",
    "is no GGUF file": b"PK\x03\x04" + bytes(100),
    "ends in the middle of its version": b"GGUF\x03",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "of GGUF version 1": header(version=1),
    "says that it has 1152921504606846976 tensors": header(tensors=1 << 60),
    "says that it has 1152921504606846976 metadata entries": header(fields=1 << 60),
    "ends in the middle of the name of metadata entry 0": header(fields=1),
    "the name of metadata entry 0 of 1099511627776 bytes": header(fields=1, rest=struct.pack("<Q", 1 << 40)),
    "that is no text": header(fields=1, rest=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
    "of the unknown type 77": header(fields=1, rest=text(b"a") + struct.pack("<I", 77)),
    "has the metadata `a` twice": header(fields=2, rest=2 * (text(b"a") + struct.pack("<IB", 0, 1))),
    "in the middle of the metadata `a`: 1152921504606846976 items": header(fields=1, rest=a_list(b"a", 8, 1 << 60)),
    "in the middle of the metadata `a`: it needs": header(fields=1, rest=a_list(b"a", 4, 1 << 61)),
    "lists in lists": header(fields=1, rest=a_list(b"a", 9, 1) + 8 * struct.pack("<IQ", 9, 1) + bytes(99)),
    "`x` 4000000000 dimensions": header(tensors=1, rest=text(b"x") + struct.pack("<I", 4_000_000_000)),
    "which no file can hold": header(tensors=1, rest=a_tensor(shape=(1 << 40, 1 << 40))),
    "`x` as Q8_1, which nothing here reads": header(tensors=1, rest=a_tensor(kind=9)),
    "in the unknown way 99": header(tensors=1, rest=a_tensor(kind=99)),
    "no whole blocks of Q8_0": header(tensors=1, rest=a_tensor(shape=(33,))),
    "is cut short: `x` ends at byte 164 and the file at 100": header(tensors=1, rest=a_tensor(shape=(32, 2))).ljust(
        100, b"\0"
    ),
    "not aligned to 32": header(tensors=1, rest=a_tensor(offset=8) + bytes(200)),
    "two tensors of one name": header(tensors=2, rest=a_tensor() * 2 + bytes(200)),
    "has the alignment 48": header(fields=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 48)),
    "has the alignment 0": header(fields=1, rest=text(b"general.alignment") + text(b"")),
    "one of 3 parts": header(fields=1, rest=text(b"split.count") + struct.pack("<IH", 2, 3)),
    r"`x` the shape \(2, 2\), but it has 32 values": header(
        tensors=1,
        fields=1,
        rest=a_list(b"comfy.gguf.orig_shape.x", 5, 2) + struct.pack("<ii", 2, 2) + a_tensor() + bytes(200),
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_file_is_refused_by_name_with_what_is_wrong(sentence, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(WRONG[sentence])
    with pytest.raises(GgufError, match=f"^wrong.gguf .*{sentence}"):
        GgufFile(path)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "cut.gguf"
    last = max(entry.begin + entry.size_bytes for entry in GgufFile(good).entries.values())
    for length in range(0, last, 7):
        path.write_bytes(content[:length])
        with pytest.raises(GgufError, match=r"^cut.gguf "):
            GgufFile(path)


def mutated(content: bytearray, chance: random.Random) -> bytearray:
    """`content` with one to four accidents in it."""
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content))
        what = chance.randrange(6)
        if what == 0:
            content[place] = chance.randrange(256)
        elif what == 1:
            content[place] ^= 1 << chance.randrange(8)
        elif what == 2:
            number = chance.choice([0, 1, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
            content[place : place + 8] = struct.pack("<Q", number)
        elif what == 3:
            del content[place : place + chance.randint(1, 16)]
        elif what == 4:
            content[place:place] = chance.randbytes(chance.randint(1, 16))
        else:
            del content[max(24, place) :]
    return content


def read_all(path) -> None:
    file = GgufFile(path)
    for key in file.keys():  # noqa: SIM118, a file is no dictionary
        for read in (file.value, file.values):
            for kind in (str, int, float, bool):
                try:
                    read(key, kind)
                except GgufError as error:
                    assert str(error).startswith(path.name)
    for tensor in file.tensors().values():
        (tensor.values(torch.float32) if isinstance(tensor, GgufTensor) else tensor).sum()


def test_no_mutation_crashes_hangs_or_takes_memory(good, tmp_path):
    content, chance, refused = good.read_bytes(), random.Random(1), 0
    # Most of a model is data, which may be anything: accidents are to meet the header.
    data_start = min(entry.begin for entry in GgufFile(good).entries.values())
    tracemalloc.start()
    longest = 0.0
    try:
        for number in range(MUTATIONS):
            path = tmp_path / f"{number % 8}.gguf"
            path.unlink(missing_ok=True)  # another file: the pages of the last may be in use
            path.write_bytes(mutated(bytearray(content[:data_start]), chance) + content[data_start:])
            begin = time.process_time()
            try:
                read_all(path)
            except GgufError as error:
                refused += 1
                assert str(error).startswith(path.name)
            longest = max(longest, time.process_time() - begin)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert longest < 2, f"one file took {longest:.1f} s"
    assert peak_bytes < 32 * 1024**2
    assert refused > MUTATIONS // 2, "most accidents must be of consequence"
