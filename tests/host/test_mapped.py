"""Weights that ComfyUI maps from their file are read past the mapping, by what it writes on their storages."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch
from layerstream.streaming.host import streams
from layerstream.streaming.host.streams import file_of, is_mapped

from streamed import assert_same_weights, on_simulated_card, stream, weights_of

memory_management = pytest.importorskip("comfy.memory_management", reason="this ComfyUI maps no weights")


@pytest.fixture
def mapped(load, tmp_path):
    """A model whose large weights are mapped, marked with ComfyUI's own record; its own mapping needs a card."""
    model = load("zimage", size="tiny")
    path, lock = tmp_path / "weights", threading.Lock()
    weights = [weight for weight in model.model.diffusion_model.parameters() if weight.nbytes > 0]
    path.write_bytes(b"".join(bytes(weight.data.contiguous().view(torch.uint8).numpy()) for weight in weights))
    with path.open("rb") as file:
        offset = 0
        for weight in weights:
            page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            memory = mmap.mmap(file.fileno(), offset - page + weight.nbytes, access=mmap.ACCESS_COPY, offset=page)
            tensor = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=offset - page)
            where = memory_management.TensorFileSlice(file.fileno(), lock, offset, weight.nbytes)
            tensor.untyped_storage()._comfy_tensor_file_slice = where
            offset += weight.nbytes
            weight.data = tensor.view(weight.shape)
        yield model


@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_mapped_model_is_read_from_its_file(monkeypatch, mapped, sample, kept):
    on_simulated_card(monkeypatch, seed=11)
    read = []
    monkeypatch.setattr(streams, "file_of", lambda tensor: read.append(file_of(tensor)) or read[-1])
    before, expected = weights_of(mapped), sample(mapped)
    streamed = stream(mapped, kept)
    assert torch.equal(sample(streamed), expected)
    assert read and None not in read
    streamed.detach()
    assert_same_weights(mapped, before)
    assert all(is_mapped(weight.data) for weight in mapped.model.diffusion_model.parameters())


def test_only_what_lies_in_one_piece_has_a_place_in_the_file(mapped):
    weight = next(
        weight for weight in mapped.model.diffusion_model.parameters() if weight.dim() == 2 and min(weight.shape) > 2
    )
    rows, whole = weight.data[1:3], file_of(weight.data)
    place = file_of(rows)
    assert place.offset == whole.offset + weight.shape[1] * weight.itemsize and place.size_bytes == rows.nbytes
    found = torch.empty(rows.nbytes, dtype=torch.uint8)
    assert place.read_into(found) and torch.equal(found, rows.view(torch.uint8).reshape(-1))
    assert file_of(weight.data.t()) is None
    assert file_of(weight.data.clone()) is None and file_of(weight.data.to("meta")) is None
