"""Stick-breaking attention, usable outside ModuleFormer.

attention   the function, chosen by device
reference   the formula, all weights at once
blocked     tiles, forward and backward; `tiles`, `native` and `scan.cpp` compute one of them
single      one query per sequence, as in decoding: one pass, in `scan.cpp`
triton      tiles on CUDA
ops         both as one operator for autograd and compile
sight       which keys a query sees
"""

from moduli.models.stick_breaking.attention import stick_breaking_attention
from moduli.models.stick_breaking.reference import stick_breaking_weights

__all__ = ["stick_breaking_attention", "stick_breaking_weights"]
