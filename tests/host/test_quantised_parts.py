"""Parts of ComfyUI's models that use quantised layers without calling them are units that bracket that use."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.session import Session
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.host.families import FOLDING, family_of

from opened import HOST
from quantised import KINDS
from scripts.division import narrow_units
from scripts.model_configurations import OLDER

calls_every_layer = pytest.mark.skipif(HOST.version == OLDER, reason="this host calls every layer")


def folding_classes() -> set[str]:
    """The classes of the host that may use a layer of theirs without calling it."""
    found = set()
    for path in (HOST.path / "comfy").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "linear_input_act(" in text and path.name != "ops.py":
            found |= {
                f"{path.stem}.{kind.name}"
                for kind in ast.walk(ast.parse(text))
                if isinstance(kind, ast.ClassDef) and "linear_input_act(" in (ast.get_source_segment(text, kind) or "")
            }
    return found


def test_every_class_that_uses_a_layer_without_calling_it_is_known():
    known = {".".join(name.split(".")[-2:]) for name in FOLDING}
    assert folding_classes() == (set() if HOST.version == OLDER else known)


class OneFeedForward(torch.nn.Module):
    """A model of no family whose only layers are those of a llama's feed-forward part, quantised as `kind` says."""

    def __init__(self, kind: str, is_merged: bool) -> None:
        from comfy.ops import mixed_precision_ops
        from comfy.text_encoders.llama import MLP

        super().__init__()
        config = SimpleNamespace(hidden_size=512, intermediate_size=512, mlp_activation="silu", merged_mlp=is_merged)
        operations = mixed_precision_ops({"mixed_ops": True}, torch.float32)
        self.layers = torch.nn.ModuleList([MLP(config, ops=operations)])
        heights = {"gate_up": 1024, "down": 512} if is_merged else {"gate": 512, "up": 512, "down": 512}
        names = [f"layers.0.{name}_proj" for name in heights]
        weights = {
            f"{name}.weight": torch.randn(height, 512) for name, height in zip(names, heights.values(), strict=True)
        }
        self.load_state_dict(KINDS[kind].write(weights, names).tensors, strict=False)


@calls_every_layer
@pytest.mark.parametrize(
    ("kind", "is_merged", "parts"),
    [
        ("int8", True, [""]),
        ("int8", False, [".gate_proj", ".up_proj", ".down_proj"]),
        ("mxfp8", True, [".gate_up_proj", ".down_proj"]),
    ],
)
def test_a_feed_forward_part_is_one_unit_only_where_the_host_needs_it(kind, is_merged, parts):
    with narrow_units():
        units = family_of(OneFeedForward(kind, is_merged)).units
    assert [name for name, _ in units] == [f"layers.0{part}" for part in parts]


EXPERTS, WIDTH = 4, 512  # larger together than a unit may be that has parts


class OneBankOfExperts(torch.nn.Module):
    """A model of no family with the experts of a GPT-OSS layer, in nvfp4, which the layer uses without calling them."""

    def __init__(self) -> None:
        from comfy.ops import mixed_precision_ops
        from comfy.text_encoders.gpt_oss import GptOssExperts

        super().__init__()
        config = SimpleNamespace(
            num_local_experts=EXPERTS, hidden_size=WIDTH, intermediate_size=WIDTH, moe_alpha=1.702, moe_limit=7.0
        )
        operations = mixed_precision_ops({"mixed_ops": True}, torch.float32)
        self.layers = torch.nn.ModuleList([GptOssExperts(config, ops=operations)])
        weights = {}
        for name, height in (("gate_up_proj", 2 * WIDTH), ("down_proj", WIDTH)):
            layer = f"layers.0.{name}"
            each = [
                KINDS["nvfp4"].write({f"{layer}.weight": torch.randn(height, WIDTH) / 22}, [layer]).tensors
                for _ in range(EXPERTS)
            ]
            stacked = (f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.weight_scale_2")
            weights |= each[0] | {key: torch.stack([expert[key] for expert in each]) for key in stacked}
            weights[f"{layer}.bias"] = torch.randn(EXPERTS, height)
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.arange(len(x))[:, None] + torch.arange(2)
        return self.layers[0](x, chosen % EXPERTS, torch.full(chosen.shape, 0.5))


@calls_every_layer
def test_a_bank_of_experts_streams_with_the_part_that_uses_it():
    with torch.inference_mode(), narrow_units():
        model = OneBankOfExperts()
        x = torch.randn(8, WIDTH)
        expected = model(x)
        units = family_of(model).units
        assert [name for name, _ in units] == ["layers.0"]
        session = Session(take_apart(model, units), SimulatedDevice(1 << 30, seed=2), lambda _: False)
        session.load(session.propose(None, stream_all=True))
        for _ in range(3):
            with session.one_pass():
                assert torch.equal(model(x), expected)
            session.check()
        codes_bytes = EXPERTS * 3 * WIDTH * WIDTH // 2
        assert codes_bytes < session.link_bytes < 1.2 * codes_bytes
        session.close()
        assert torch.equal(model(x), expected)
