"""Makes the pack importable as `layerstream` for every test."""

from scripts.pack import load_pack

load_pack()
