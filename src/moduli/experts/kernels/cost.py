"""What a kernel is expected to cost on this machine.

    time = c . (1, experts used, their weights, rows, rows x D, multiplications)

with coefficients c >= 0 per kernel, dtype and number of threads, fitted to the forward times of a
few small layers, measured once per machine and kept in the cache; `moduli doctor` shows what
follows. Where the processor works on whole vectors, so does the model: experts count as a multiple
of 16 neurons wide.

Letters: T tokens, D width, E experts, e neurons of one expert, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from moduli.experts.kernels.calibration import measured_once

LANES = 16
# Rows of a padded batch over rows used, at the load of a router that is not trained to balance.
PADDING = 1.4
REPEATS = 7
PATIENCE = 0.2  # seconds for one shape, should a kernel be slow


@dataclass(frozen=True)
class Shape:
    """A layer's size, as far as its cost goes."""

    tokens: int
    width: int
    experts: int
    top_k: int
    neurons: int | float  # of one expert, on average
    gated: bool = False


# Small enough for milliseconds each, and different enough to tell the terms apart.
PROBES = (
    Shape(1, 384, 16, 4, 96),
    Shape(16, 256, 8, 2, 128),
    Shape(64, 512, 64, 8, 32),
    Shape(256, 256, 64, 8, 16),
    Shape(256, 768, 16, 4, 192),
    Shape(512, 384, 64, 16, 24),
    Shape(1024, 128, 16, 8, 32),
    Shape(1024, 384, 16, 4, 96),
    Shape(1024, 256, 4, 2, 512),
)


def terms(kernel: str, shape: Shape) -> tuple[int | float, ...]:
    """What the coefficients of a kernel are multiplied with."""
    T, D, E, K, e = shape.tokens, shape.width, shape.experts, shape.top_k, shape.neurons
    rows, used = T * K, E * (1 - (1 - min(K / E, 1)) ** T)
    if kernel == "masked":
        rows, used, e = T, 1, E * e
    elif kernel == "padded":
        rows, used = E * LANES * math.ceil(PADDING * rows / E / LANES), E
    matrices = 3 if shape.gated else 2
    wide = LANES * math.ceil(e / LANES)
    return (1, used, used * e * D * matrices, rows, rows * D, rows * D * wide * matrices)


class Costs:
    """Coefficients of kernels under one dtype and number of threads."""

    def __init__(self, coefficients: dict[str, list[float]]) -> None:
        self.coefficients = coefficients

    def estimate(self, kernel: str, shape: Shape) -> float:
        """Seconds."""
        pairs = zip(self.coefficients[kernel], terms(kernel, shape), strict=True)
        return sum(c * t for c, t in pairs)

    def fastest(self, kernels: Iterable[str], shape: Shape) -> str:
        """The kernel with the lowest estimate."""
        return min(kernels, key=lambda name: self.estimate(name, shape))


Timer = Callable[[str, Shape, torch.dtype], float]


def costs(dtype: torch.dtype, kernels: Iterable[str], timer: Timer) -> Costs:
    """The model for a dtype under the present number of threads; measured if it is not known.

    Args:
        dtype: of tokens and experts.
        kernels: what to measure.
        timer: (kernel, shape, dtype) -> seconds, called only for what is not known.
    """
    return measured_costs(dtype, tuple(sorted(kernels)), torch.get_num_threads(), timer)


@lru_cache(maxsize=64)
def measured_costs(dtype: torch.dtype, names: tuple[str, ...], threads: int, timer: Timer) -> Costs:
    """`costs`; `threads` must be the present number."""
    section = f"{str(dtype).removeprefix('torch.')}, {threads} threads"
    return Costs(measured_once(section, names, lambda name: _fit(name, dtype, timer)))


def _fit(kernel: str, dtype: torch.dtype, timer: Timer) -> list[float]:
    """Coefficients that fit the probes best in relative terms."""
    from scipy.optimize import nnls

    rows = np.array([terms(kernel, shape) for shape in PROBES])
    times = np.array([timer(kernel, shape, dtype) for shape in PROBES])
    weighted = rows / times[:, None]
    scale = weighted.max(axis=0)
    found, _ = nnls(weighted / scale, np.ones(len(PROBES)))
    return [float(c) for c in found / scale]
