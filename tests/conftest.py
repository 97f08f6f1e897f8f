"""Makes the pack importable as `layerstream` for every test."""

import torch

from scripts.pack import load_pack

load_pack()

# The models of these tests are small: several threads gain nothing, and on a busy machine wait for each other.
torch.set_num_threads(1)
