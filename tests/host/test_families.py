"""Units of every family: they are called, small enough, and leave little of the model out.

What is checked at full size is built without values; what runs are narrow models of the same classes with the same
parts, so that a module of the one is the module of the same name in the other.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from layerstream.streaming.host import dividing, families
from layerstream.streaming.host.dividing import MIB, UnitLimits, weight_bytes

from scripts.model_configurations import MODELS
from scripts.tiny_models import build_model, build_tiny_model, is_in_host, sample_tiny

# What a narrow model is divided by: about in the proportion of its widths to the real ones.
NARROW_LIMITS = UnitLimits(largest_bytes=768 * 1024, smallest_bytes=64 * 1024)

NAMES = [name for name in MODELS if is_in_host(name)]
DISCOVERED = ("mochi", "hunyuan-dit", "omnigen2")
LISTED = [name for name in NAMES if name not in DISCOVERED]

# Large weights that no forward but the whole model's reads, or that a pass reads a few rows of.
BARE_WEIGHTS = ("pos_embed", "positional_encoding", "language_model.embed_tokens.weight")


class Trace(NamedTuple):
    """A narrow model that was sampled, and the names of the modules that were called."""

    model: torch.nn.Module
    called: frozenset[str]


@functools.cache
def trace(name: str) -> Trace:
    with torch.inference_mode():
        patcher = build_tiny_model(name)
    model = patcher.model.diffusion_model
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    assert sample_tiny(patcher, name, steps=1).isfinite().all()
    for handle in handles:
        handle.remove()
    return Trace(model, frozenset(called))


def full_size(name: str) -> torch.nn.Module:
    return build_model(name, dtype=torch.bfloat16, device="meta", narrow=False).diffusion_model


def assert_bracketed(model: torch.nn.Module, units: list[dividing.Unit], called: frozenset[str]) -> None:
    """Every unit is the module of its name and was called, and none lies inside another."""
    assert units
    owned: set[torch.nn.Module] = set()
    for path, unit in units:
        assert model.get_submodule(path) is unit
        assert path in called, f"{path} ({type(unit).__name__}) was never called"
        modules = set(unit.modules())
        assert owned.isdisjoint(modules), path
        owned |= modules


def outside_bytes(model: torch.nn.Module, units: list[dividing.Unit]) -> int:
    """Bytes of weights that are in no unit, without those that cannot be."""
    bare = sum(weight.nbytes for path, weight in model.state_dict().items() if path in BARE_WEIGHTS)
    return weight_bytes(model) - sum(weight_bytes(unit) for _, unit in units) - bare


@pytest.mark.parametrize("name", LISTED)
def test_units_of_a_listed_family_are_called(name):
    model, called = trace(name)
    family = families.family_of(model, NARROW_LIMITS)
    assert family.is_listed
    assert_bracketed(model, family.units, called)


@pytest.mark.parametrize("name", NAMES)
def test_units_of_the_real_size_are_called(name):
    model = full_size(name)
    family = families.family_of(model)
    narrow = trace(name)
    of_narrow = dict(narrow.model.named_modules())
    traced = [path for path, _ in family.units if path in of_narrow]
    assert len(traced) > len(of_narrow) / 100
    assert [path for path in traced if path not in narrow.called] == []


@pytest.mark.parametrize("name", NAMES)
def test_units_of_the_real_size_are_neither_large_nor_few(name):
    model = full_size(name)
    units = families.family_of(model).units
    limits = families.LIMITS
    total = weight_bytes(model)
    assert outside_bytes(model, units) < 0.03 * total
    for path, unit in units:
        size = weight_bytes(unit)
        assert size >= limits.smallest_bytes
        assert size <= limits.largest_bytes or not any(True for _ in unit.children()), path


@pytest.mark.parametrize("name", LISTED)
def test_whatever_the_limits_a_unit_is_called(name):
    """Everything that could become a unit, of another model size or another weight type, is called as well."""
    model, called = trace(name)
    for smaller in (1, 4, 16, 64):
        limits = UnitLimits(largest_bytes=smaller * MIB // 8, smallest_bytes=16 * 1024)
        assert_bracketed(model, families.family_of(model, limits).units, called)


@pytest.mark.parametrize(
    "name", ["flux", "zimage", "sd35-medium", "sdxl", "cascade-b", "ltxv", "wan21-vace", *DISCOVERED]
)
def test_units_of_an_unlisted_family_are_called(monkeypatch, name):
    model, called = trace(name)
    monkeypatch.setattr(families, "FAMILIES", {})
    family = families.family_of(model, NARROW_LIMITS)
    assert not family.is_listed
    assert_bracketed(model, family.units, called)
    assert outside_bytes(full_size(name), families.family_of(full_size(name)).units) < 0.05 * weight_bytes(
        full_size(name)
    )


def test_every_path_of_the_table_is_in_some_model():
    """A path of some variants only is not found out by its absence in the others."""
    if set(NAMES) != set(MODELS):
        pytest.skip("this host lacks some variants")
    models = [trace(name).model for name in LISTED]
    for kind, paths in families.FAMILIES.items():
        of_kind = [model for model in models if families.family_of(model, NARROW_LIMITS).name == kind]
        for path in paths if of_kind else ():
            assert any(_has(model, path.rstrip("?")) for model in of_kind), f"no {kind} has {path}"


def _has(model: torch.nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), torch.nn.Module)
    except AttributeError:
        return False


def test_a_mistyped_path_is_an_error(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "UNetModel", ("input_blocks", "midle_block", "output_blocks"))
    with pytest.raises(AttributeError, match="midle_block"):
        families.family_of(full_size("sdxl"))


def test_a_mistyped_path_that_may_be_missing_leaves_too_much_out(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "UNetModel", ("input_blocks", "midle_block?", "output_blocks"))
    with pytest.raises(AssertionError):
        test_units_of_the_real_size_are_neither_large_nor_few("sdxl")


def test_a_class_that_is_never_called_is_found_out(monkeypatch):
    monkeypatch.setattr(families, "NEVER_CALLED", frozenset())
    with pytest.raises(AssertionError, match="was never called"):
        test_whatever_the_limits_a_unit_is_called("sd35-medium")


def test_an_int8_layer_that_is_not_called_is_in_the_unit_around_it():
    import comfy.ops

    if not hasattr(comfy.ops, "linear_input_act"):
        pytest.skip("this host calls every layer")
    from comfy.ldm.wan.model import WanFeedForward
    from comfy.quant_ops import QuantizedTensor

    layers = [torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    for layer in layers:
        codes = QuantizedTensor.from_float(layer.weight.data, "TensorWiseINT8Layout")
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    block = torch.nn.Module()
    block.ffn = WanFeedForward(layers[0], torch.nn.GELU(approximate="tanh"), layers[1])
    rules = families.rules_for(UnitLimits(largest_bytes=300 * 1024, smallest_bytes=1024))
    assert [path for path, _ in dividing.divide("block", block, rules)] == ["block.ffn"]
    assert weight_bytes(block) == 2 * 512 * 512
