"""Weights that ComfyUI maps from their file are read past the mapping, by what it writes on their storages."""

from __future__ import annotations

import pytest
import torch
from layerstream.streaming.host import streams
from layerstream.streaming.host.files import file_of, is_mapped

from streamed import assert_same_weights, on_simulated_card, stream, weights_of

memory_management = pytest.importorskip("comfy.memory_management", reason="this ComfyUI maps no weights")


@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_mapped_model_is_read_from_its_file(monkeypatch, mapped_model, sample, kept):
    on_simulated_card(monkeypatch, seed=11)
    read = []
    monkeypatch.setattr(streams, "file_of", lambda tensor: read.append(file_of(tensor)) or read[-1])
    before, expected = weights_of(mapped_model), sample(mapped_model)
    streamed = stream(mapped_model, kept)
    assert torch.equal(sample(streamed), expected)
    assert read and None not in read
    streamed.detach()
    assert_same_weights(mapped_model, before)
    assert all(is_mapped(weight.data) for weight in mapped_model.model.diffusion_model.parameters())


def test_only_what_lies_in_one_piece_has_a_place_in_the_file(mapped_model):
    weight = next(
        weight
        for weight in mapped_model.model.diffusion_model.parameters()
        if weight.dim() == 2 and min(weight.shape) > 2
    )
    rows, whole = weight.data[1:3], file_of(weight.data)
    place = file_of(rows)
    assert place.offset == whole.offset + weight.shape[1] * weight.itemsize and place.size_bytes == rows.nbytes
    found = torch.empty(rows.nbytes, dtype=torch.uint8)
    assert place.read_into(found) and torch.equal(found, rows.view(torch.uint8).reshape(-1))
    assert file_of(weight.data.t()) is None
    assert file_of(weight.data.clone()) is None and file_of(weight.data.to("meta")) is None
