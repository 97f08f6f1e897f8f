"""Makes the pack importable as `layerstream` for every test."""

import gc
from collections.abc import Iterator

import pytest
import torch

from remembering import remembering
from scripts.pack import load_pack

load_pack()

# The models of these tests are small: several threads gain nothing, and on a busy machine wait for each other.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what every module made as it was imported out of each later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def remembered_packing() -> Iterator[None]:
    """The plain packer packs and restores the same bytes once; its own tests call the functions as they are."""
    from layerstream.streaming.engine import packing

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "pack", remembering(packing.pack))
        patched.setattr(packing, "unpack", remembering(packing.unpack))
        yield
