"""Plain fine-tuning of the dense model: the baseline that every method is compared with."""

from moduli.methods.dense.config import Dense

__all__ = ["Dense"]
