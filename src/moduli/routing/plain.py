"""Whether a tensor is plain memory of this machine that nobody watches.

Reading memory past torch (numpy), or keeping a result for the next call, is right only where
operations are really executed: not while a graph is recorded (`torch.compile`, export, tracing),
and not where another layer stands between the operation and the numbers (fake tensors, subclasses,
dispatch modes). Tensors inside transforms of `torch.func` cannot be told from outside; what reads
their memory raises `RuntimeError`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is in main memory, and operations on it are executed and nothing else."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not is_in_torch_dispatch_mode()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )
