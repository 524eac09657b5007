"""Tiny models with experts of ours, and inputs with padding; MoE models: `tests.families`."""

from __future__ import annotations

from typing import Any

import moduli
from tests import tiny


def split(family: str, **changes: Any) -> Any:
    """A tiny model whose FFNs are split in 4 experts, 2 per token."""
    model = tiny.build(family)
    options = {"num_experts": 4, "top_k": 2, "layers": "all", "split": "contiguous", **changes}
    moduli.convert(model, moduli.EMoE(**options))
    return model


def owned(family: str = "bert") -> Any:
    """A tiny model with experts of their own, all copies of the FFN."""
    model = tiny.build(family)
    moduli.convert(model, moduli.GMoE(num_experts=4, top_k=2, layers="all"))
    return model


def inputs(family: str, count: int = 5) -> dict[str, Any]:
    """A batch without labels."""
    found = tiny.batch(tiny.rows(family, count))
    del found["labels"]
    return found
