"""Units of every family: they are called, small enough, leave little of the model out, and stream with equal bits.

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
from torch.nn import Linear

from scripts import division
from scripts.division import MOST_LEFT_OUT, NARROW_UNITS, complaints_of_full_size, divide, trace_calls
from scripts.family_matrix import FEW_CASES, ONE_CASE, run_model
from scripts.model_configurations import MODELS
from scripts.tiny_models import build_tiny_model, is_in_host, sample_tiny

NARROW_LIMITS = UnitLimits(**NARROW_UNITS)

NAMES = [name for name in MODELS if is_in_host(name)]
LISTED = [name for name in NAMES if MODELS[name].is_listed]
# One of each kind of list: flat, nested, in a wrapper, of unequal blocks; and those that have no row.
SEARCHED = ["flux", "sd35-medium", "sdxl", "cascade-b", "ltxv", "wan21-vace", "hunyuan-dit", "mochi", "omnigen2"]


# Without values, so that keeping them costs little.
full_size_model = functools.cache(division.full_size_model)


class Trace(NamedTuple):
    """A narrow model that was sampled, and the names of the modules that were called."""

    model: torch.nn.Module
    called: frozenset[str]


@functools.cache
def trace(name: str) -> Trace:
    with torch.inference_mode():
        patcher = build_tiny_model(name)
    model = patcher.model.diffusion_model
    with trace_calls(model) as called:
        assert sample_tiny(patcher, name, steps=1).isfinite().all()
    return Trace(model, frozenset(called))


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


@pytest.mark.parametrize("name", NAMES)
def test_streamed_sampling_gives_the_resident_bits(tmp_path, name):
    """The matrix in a reduced form; `python -m bench.families` runs the whole of it."""
    cases = ONE_CASE if MODELS[name].is_slow else FEW_CASES
    outcome = run_model(name, tmp_path, cases)
    assert outcome.wrong == []
    assert outcome.equal == outcome.cases == len(cases)


@pytest.mark.parametrize("name", LISTED)
def test_units_of_a_listed_family_are_called(name):
    model, called = trace(name)
    family = families.family_of(model, NARROW_LIMITS)
    assert family.is_listed
    assert_bracketed(model, family.units, called)


@pytest.mark.parametrize("name", LISTED)
def test_whatever_the_limits_a_unit_is_called(name):
    """Everything that could become a unit, of another model size or another weight type, is called as well."""
    model, called = trace(name)
    for eighths in (1, 4, 16, 64):
        limits = UnitLimits(largest_bytes=eighths * MIB // 8, smallest_bytes=16 * 1024)
        assert_bracketed(model, families.family_of(model, limits).units, called)


@pytest.mark.parametrize("name", NAMES)
def test_units_of_the_real_size_are_called(name):
    narrow = trace(name)
    modules = dict(narrow.model.named_modules())
    traced = [path for path, _ in families.family_of(full_size_model(name)).units if path in modules]
    assert traced
    assert [path for path in traced if path not in narrow.called] == []


@pytest.mark.parametrize("name", NAMES)
def test_units_of_the_real_size_are_neither_large_nor_few(name):
    model = full_size_model(name)
    assert complaints_of_full_size(divide(model)) == []
    limits = families.LIMITS
    for path, unit in families.family_of(model).units:
        size = weight_bytes(unit)
        assert size >= limits.smallest_bytes
        assert size <= limits.largest_bytes or not any(True for _ in unit.children()), path


@pytest.mark.parametrize("name", [name for name in SEARCHED if name in NAMES])
def test_units_of_an_unlisted_family_are_called(monkeypatch, name):
    model, called = trace(name)
    monkeypatch.setattr(families, "FAMILIES", {})
    family = families.family_of(model, NARROW_LIMITS)
    assert not family.is_listed
    assert_bracketed(model, family.units, called)
    assert divide(full_size_model(name)).left_out_share < MOST_LEFT_OUT


def test_every_path_of_the_table_is_in_some_model():
    """A path of some variants only is not found out by its absence in the others."""
    if set(NAMES) != set(MODELS):
        pytest.skip("this host lacks some variants")
    models = [trace(name).model for name in LISTED]
    for kind, paths in families.FAMILIES.items():
        of_kind = [model for model in models if families.family_of(model, NARROW_LIMITS).name == kind]
        assert of_kind, f"no model has the row of {kind}"
        for path in paths:
            assert any(_has(model, path.rstrip("?")) for model in of_kind), f"no {kind} has {path}"


def _has(model: torch.nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), torch.nn.Module)
    except AttributeError:
        return False


# -- the tests above can fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typo", ["midle_block", "midle_block?"])
def test_the_matrix_fails_on_a_mistyped_path(monkeypatch, tmp_path, typo):
    monkeypatch.setitem(families.FAMILIES, "UNetModel", ("input_blocks", typo, "output_blocks"))
    outcome = run_model("sdxl", tmp_path, ONE_CASE)
    assert any("midle_block" in wrong or "in no unit" in wrong for wrong in outcome.wrong)


def test_the_matrix_fails_on_a_unit_that_is_never_called(monkeypatch, tmp_path):
    monkeypatch.setattr(families, "NEVER_CALLED", frozenset())
    outcome = run_model("sd35-medium", tmp_path, ONE_CASE)
    assert any("SelfAttention" in wrong and "never called" in wrong for wrong in outcome.wrong)


def test_the_matrix_fails_on_other_bits(monkeypatch, tmp_path):
    from scripts import family_matrix

    def sample(patcher, *arguments, **options):
        result = sample_tiny(patcher, *arguments, **options)
        if not hasattr(patcher, "stream"):
            result.view(-1)[-1] = torch.nextafter(result.view(-1)[-1], torch.tensor(torch.inf))
        return result

    monkeypatch.setattr(family_matrix, "sample_tiny", sample)
    outcome = run_model("lumina2", tmp_path, ONE_CASE)
    assert outcome.equal == 0
    assert any("other bits" in wrong for wrong in outcome.wrong)


# -- dividing ----------------------------------------------------------------------------------------------------------


def test_an_int8_layer_that_is_not_called_is_in_the_unit_around_it():
    import comfy.ops

    if not hasattr(comfy.ops, "linear_input_act"):
        pytest.skip("this host calls every layer")
    from comfy.ldm.wan.model import WanFeedForward
    from comfy.quant_ops import QuantizedTensor

    layers = [Linear(512, 512, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    for layer in layers:
        codes = QuantizedTensor.from_float(layer.weight.data, "TensorWiseINT8Layout")
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    block = torch.nn.Module()
    block.ffn = WanFeedForward(layers[0], torch.nn.GELU(approximate="tanh"), layers[1])
    rules = families.rules_for(UnitLimits(largest_bytes=300 * 1024, smallest_bytes=1024))
    assert [path for path, _ in dividing.divide("block", block, rules)] == ["block.ffn"]
    assert weight_bytes(block) == 2 * 512 * 512


class Experts(torch.nn.Module):
    """Uses a large weight of its own beside that of its part."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(8, 256, 256))
        self.gate = Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x) @ self.weights.sum(0)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.scale = torch.nn.Parameter(torch.zeros(256))
        self.attention = torch.nn.MultiheadAttention(256, 4)
        self.output = Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(x, x, x)[0] + self.experts(x)) * self.scale


def test_a_module_with_a_large_weight_of_its_own_is_one_unit():
    """Its own forward alone brackets that weight, however large the whole; torch's attention is such a module too."""
    rules = families.rules_for(UnitLimits(largest_bytes=64 * 1024, smallest_bytes=32 * 1024))
    for way in (dividing.divide, dividing.divide_to_leaves):
        names = [path for path, _ in way("blocks.0", Block(), rules)]
        assert names == ["blocks.0.experts", "blocks.0.attention", "blocks.0.output"]


def test_a_block_in_two_places_is_one_unit():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Linear(256, 256) for _ in range(3))
    model.late = torch.nn.ModuleList([model.blocks[2]])
    units = families.discover(model, UnitLimits(largest_bytes=MIB, smallest_bytes=1024))
    assert [path for path, _ in units] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_model_without_lists_is_divided_to_its_leaves():
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()
    model.encoder.first, model.encoder.second = Linear(256, 256), Linear(256, 8)
    units = families.discover(model, UnitLimits(largest_bytes=MIB, smallest_bytes=64 * 1024))
    assert [path for path, _ in units] == ["encoder.first"]
