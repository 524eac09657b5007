"""The two settings everything is measured under: tuned for all, and what a user gets untouched.

"tuned" gives our allocator setting and the fast float32 to dense layers and to transformers'
backends as well, so that kernels are compared and not settings. "defaults" touches nothing. The
allocator's setting is for a process and for good, so each has a process of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from moduli.allocator import tune_malloc
from moduli.experts.kernels.precision import fast_fp32

Settings = Literal["tuned", "defaults"]
SETTINGS: tuple[Settings, ...] = get_args(Settings)


def prepare(settings: Settings) -> None:
    """The part that is for the whole process, before anything large is allocated."""
    if settings == "tuned":
        tune_malloc()


def scope(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    """The part that is around everything that is timed; on a GPU it would cost accuracy."""
    fast = settings == "tuned" and device.type == "cpu"
    return fast_fp32() if fast else nullcontext()
