"""Hash Layers: the expert of a token is read from a table (NeurIPS 2021)."""

from moduli.methods.hash_layers.config import HashLayers

__all__ = ["HashLayers"]
