"""What the kernels are like on this machine, for people who ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moduli.experts.kernels import native
from moduli.experts.kernels.build import library
from moduli.experts.kernels.calibration import calibration_file
from moduli.experts.kernels.choice import fastest_of_size
from moduli.experts.kernels.cost import measured_costs
from moduli.experts.kernels.precision import fp32_is_safe, measured_precision

TYPICAL = ((768, 16, 4), (768, 64, 8))
"""D, E, K of layers with 4 D neurons, of which the choices are shown."""


@dataclass(frozen=True)
class Choice:
    """What "auto" takes for one layer of 4 D neurons."""

    width: int
    experts: int
    top_k: int
    tokens: int
    dtype: str
    kernel: str


@dataclass(frozen=True)
class Status:
    """The kernels on this machine.

    Attributes:
        native: "compiled", or why the C++ kernel is missing.
        native_bf16: whether it computes bfloat16 here.
        fast_fp32: whether float32 products go to the faster library.
        fp32_error: of that library over 1024 terms, relative to float64.
        fp32_gain: its speed over the other's.
        calibration: the file of measurements.
        choices: what "auto" takes for typical layers.
    """

    native: str
    native_bf16: bool
    fast_fp32: bool
    fp32_error: float
    fp32_gain: float
    calibration: str
    choices: tuple[Choice, ...]


def status(*, measure_again: bool = False) -> Status:
    """Everything, measured now as far as it was not measured before on this machine.

    Args:
        measure_again: forget what was measured, for example while the machine was busy.
    """
    if measure_again:
        calibration_file().unlink(missing_ok=True)
        for kept in (measured_costs, fastest_of_size, fp32_is_safe):
            kept.cache_clear()
    threads = torch.get_num_threads()
    found = library()
    error, gain = measured_precision()
    choices = []
    for width, experts, top_k in TYPICAL:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 256, 4096):
                sizes = (4 * width // experts,) * experts
                kernel = fastest_of_size(
                    tokens, width, sizes, top_k, gated=False, dtype=dtype, threads=threads
                )
                name = str(dtype).removeprefix("torch.")
                choices.append(Choice(width, experts, top_k, tokens, name, kernel))
    return Status(
        native=found if isinstance(found, str) else "compiled",
        native_bf16=native.unable(torch.bfloat16, 2) is None,
        fast_fp32=fp32_is_safe(),
        fp32_error=error,
        fp32_gain=gain,
        calibration=str(calibration_file()),
        choices=tuple(choices),
    )
