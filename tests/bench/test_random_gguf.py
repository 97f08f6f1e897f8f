"""Random GGUF files hold what was asked for, in blocks that the reference reads."""

from __future__ import annotations

import gguf
import numpy
import pytest

from bench.gguf_pack import PACK_VARIABLE, missing_pack
from bench.model_file import last_axis
from scripts.layouts.tensors import TensorLayout
from scripts.random_gguf import SCALES, write_random_gguf

LAYOUT = [
    TensorLayout("img_in.weight", (64, 64), 0.0, 0.1),
    TensorLayout("blocks.0.weight", (96, 768), 0.0, 0.02),
    TensorLayout("blocks.0.bias", (96,), 0.0, 0.05),
]


@pytest.mark.parametrize("kind", SCALES)
def test_blocks_have_the_spread_of_the_layout(kind, tmp_path):
    path = write_random_gguf(tmp_path / "model.gguf", LAYOUT, kind, architecture="flux", exact=("img_in",))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds == {"img_in.weight": "BF16", "blocks.0.weight": kind, "blocks.0.bias": "F32"}
    for layout in LAYOUT:
        tensor = tensors[layout.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == layout.shape and numpy.isfinite(values).all()
        assert values.std() == pytest.approx(layout.spread, rel=0.2)
        assert abs(values.mean()) < 0.25 * layout.spread
    assert last_axis(str(path), "0.weight") == 768
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="no random blocks of Q9_9"):
        write_random_gguf(path, LAYOUT, "Q9_9", architecture="flux")
    with pytest.raises(ValueError, match=r"img_in\.weight` has rows of 64"):
        write_random_gguf(path, LAYOUT, "Q4_K", architecture="flux")
    assert not list(tmp_path.iterdir())


def test_a_pack_that_is_not_there_is_said_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.delenv(PACK_VARIABLE, raising=False)
    assert f"set {PACK_VARIABLE}" in missing_pack()
    monkeypatch.setenv(PACK_VARIABLE, str(tmp_path))
    assert "has no nodes.py" in missing_pack()
    (tmp_path / "nodes.py").touch()
    assert missing_pack() is None
