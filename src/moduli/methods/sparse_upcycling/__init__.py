"""Sparse upcycling: a mixture of experts from a dense checkpoint (ICLR 2023)."""

from moduli.methods.sparse_upcycling.config import SparseUpcycling

__all__ = ["SparseUpcycling"]
