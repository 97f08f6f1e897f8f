"""Benchmarks of LayerStream against its host's own ways to run a model that does not fit the card.

Each command is a module of this package: `python -m bench.step --help`. Nothing here is imported by the node pack.
"""
