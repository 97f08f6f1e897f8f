"""Random fp8 files hold what ComfyUI reads of a scaled fp8 model, with values as spread as the layout asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scripts import random_fp8
from scripts.layouts.tensors import TensorLayout
from scripts.random_fp8 import write_random_fp8

BLOCK, BIAS, END = "double_blocks.0.img_mlp.0.weight", "double_blocks.0.img_mlp.0.bias", "img_in.weight"
LAYOUT = [
    TensorLayout(BLOCK, (257, 512), 0.0, 0.03),
    TensorLayout(BIAS, (257,), 0.0, 0.05),
    TensorLayout(END, (64, 512), 0.0, 0.1),
    TensorLayout("double_blocks.0.img_attn.norm.query_norm.scale", (512,), 1.0, 0.1),
]


@pytest.mark.parametrize("chunk", [1 << 25, 1 << 10])
def test_matrices_of_blocks_are_scaled_fp8_and_the_rest_is_bf16(tmp_path: Path, monkeypatch, chunk) -> None:
    """Also where a tensor is drawn in several pieces, the last of them shorter."""
    monkeypatch.setattr(random_fp8, "CHUNK_ELEMENTS", chunk)
    with safe_open(write_random_fp8(tmp_path / "file.safetensors", LAYOUT), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        said = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert said == {BLOCK.removesuffix(".weight"): {"format": "float8_e4m3fn"}}
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn} == {BLOCK}
    assert tensors.pop(f"{BLOCK}_scale").dtype == torch.float32 and len(tensors) == len(LAYOUT)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if name != BLOCK)


def test_values_have_the_layouts_spread(tmp_path: Path) -> None:
    with safe_open(write_random_fp8(tmp_path / "file.safetensors", LAYOUT), framework="pt") as file:
        for tensor in LAYOUT:
            values = file.get_tensor(tensor.name).float()
            if tensor.name == BLOCK:
                values *= file.get_tensor(f"{BLOCK}_scale")
            assert values.shape == tensor.shape and values.isfinite().all()
            assert values.std().item() == pytest.approx(tensor.spread, rel=0.1)
            assert values.mean().item() == pytest.approx(tensor.center, abs=0.02)


def test_values_depend_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.safetensors" for name in ("first", "again", "other"))
    write_random_fp8(first, LAYOUT, seed=1)
    write_random_fp8(again, LAYOUT[::-1], seed=1)
    write_random_fp8(other, LAYOUT, seed=2)
    with safe_open(first, "pt") as one, safe_open(again, "pt") as same, safe_open(other, "pt") as changed:
        for tensor in LAYOUT:
            values = one.get_tensor(tensor.name).float()
            assert torch.equal(values, same.get_tensor(tensor.name).float())
            assert not torch.equal(values, changed.get_tensor(tensor.name).float())
