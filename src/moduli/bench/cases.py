"""What is measured: one case is one layer at one shape; sets of cases have names.

Letters: T tokens, D width, F neurons of the dense FFN, E experts, K experts per token, S = T K
routed rows.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from moduli.errors import ConfigError, UnknownNameError, nearest

Mode = Literal["forward", "train"]
Dtype = Literal["float32", "bfloat16"]
Spread = Literal["balanced", "skewed"]


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer at one shape.

    Attributes:
        tokens: T.
        hidden: D.
        experts: E.
        top_k: K.
        width: neurons of one expert; 0 divides a dense FFN of 4 D neurons among the experts.
        dtype: of weights and tokens.
        mode: "forward" without gradients, or "train": forward and backward.
        gated: SwiGLU with SiLU instead of two matrices with GELU.
        owned: experts are stacked parameters of their own, as in checkpoints of MoE models,
            instead of groups of neurons of a dense FFN.
        spread: "balanced" random scores, or "skewed": with a bias of standard deviation 1 for
            every expert.
        threads: of the process.
        title: what the shape stands for, where it stands for something.
    """

    tokens: int
    hidden: int
    experts: int
    top_k: int
    width: int = 0
    dtype: Dtype = "float32"
    mode: Mode = "forward"
    gated: bool = False
    owned: bool = False
    spread: Spread = "balanced"
    threads: int = 1
    title: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k is {self.top_k}, but there are {self.experts} experts")
        if min(self.tokens, self.hidden, self.threads) < 1:
            raise ConfigError("tokens, hidden and threads are at least 1")
        if self.width < 1:
            neurons = 4 * self.hidden
            if neurons % self.experts:
                raise ConfigError(
                    f"{self.experts} experts do not divide {neurons} neurons (4 x {self.hidden}); "
                    "give the width of an expert"
                )
            object.__setattr__(self, "width", neurons // self.experts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def decode(self) -> bool:
        """Whether this is one token: bound by reading weights, which are then the floor."""
        return self.tokens == 1

    @property
    def matrices(self) -> int:
        """Matrices per expert."""
        return 3 if self.gated else 2

    @property
    def rows(self) -> int:
        """S."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of the chosen experts; backward does twice what forward does."""
        forward = 2 * self.matrices * self.rows * self.width * self.hidden
        return forward if self.mode == "forward" else 3 * forward

    @property
    def weight_bytes(self) -> int:
        """Weights of the experts that one token uses."""
        return self.matrices * self.top_k * self.width * self.hidden * self.torch_dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Weights of all experts."""
        return self.weight_bytes // self.top_k * self.experts

    @property
    def label(self) -> str:
        """Short and unique among cases: "T4096 D768 E16 K4 (192) float32 forward"."""
        extra = [
            word
            for word, there in (
                ("gated", self.gated),
                ("owned", self.owned),
                ("skewed", self.spread == "skewed"),
                (f"{self.threads} threads", self.threads > 1),
            )
            if there
        ]
        shape = f"T{self.tokens} D{self.hidden} E{self.experts} K{self.top_k} ({self.width})"
        return " ".join([shape, self.dtype, self.mode, *extra])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def quick() -> list[LayerCase]:
    """Three shapes, under a minute on two cores."""
    return [
        LayerCase(tokens=4096, hidden=384, experts=16, top_k=4),
        LayerCase(tokens=4096, hidden=768, experts=64, top_k=8),
        LayerCase(tokens=1, hidden=768, experts=16, top_k=4),
    ]


def grid() -> list[LayerCase]:
    """All shapes on which the automatic choice is judged."""
    shares = ((16, 2), (16, 4), (16, 8), (64, 8), (64, 16), (64, 32))
    tokens = (1, 256, 1024, 4096, 16384)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    modes: tuple[Mode, ...] = ("forward", "train")
    cases = [
        LayerCase(tokens=t, hidden=d, experts=e, top_k=k, dtype=dtype, mode=mode)
        for d, (e, k), t, dtype, mode in itertools.product(
            (384, 768), shares, tokens, dtypes, modes
        )
        if not (t == 1 and mode == "train")
    ]
    extra = [LayerCase(tokens=4096, hidden=768, experts=e, top_k=k) for e, k in ((16, 4), (64, 8))]
    for mode in modes:
        cases += [replace(case, mode=mode, spread="skewed") for case in extra]
        cases += [replace(case, mode=mode, gated=True) for case in extra]
    return cases


def families() -> list[LayerCase]:
    """Layers with the experts of known checkpoints, in the layout of those."""
    shapes = {  # D, E, K, width; Mixtral at half its widths, for memory
        "Mixtral / 2": (2048, 8, 2, 7168),
        "OLMoE": (2048, 64, 8, 1024),
        "Qwen3-MoE": (2048, 128, 8, 768),
    }
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    return [
        LayerCase(
            tokens=t, hidden=d, experts=e, top_k=k, width=width, dtype=dtype,
            gated=True, owned=True, title=title,
        )
        for title, (d, e, k, width) in shapes.items()
        for dtype in dtypes
        for t in (1, 512)
    ]  # fmt: skip


def accelerator() -> list[LayerCase]:
    """Small models, where experts can hardly pay on a GPU, up to wide MoE layers, where they do."""
    shapes = (  # T, D, E, K, width, gated, owned
        (4096, 384, 16, 4, 96, False, False),
        (32768, 768, 16, 4, 192, False, False),
        (32768, 768, 64, 16, 48, False, False),
        (16384, 1600, 64, 16, 100, False, False),
        (16384, 1024, 32, 2, 2048, False, True),
        (8192, 4096, 16, 4, 688, True, False),
        (8192, 4096, 64, 16, 172, True, False),
        (32768, 2048, 64, 8, 1024, True, True),
        (32768, 2048, 128, 8, 768, True, True),
        (1, 2048, 64, 8, 1024, True, True),
    )
    forward = [
        LayerCase(
            tokens=t, hidden=d, experts=e, top_k=k, width=width, dtype="bfloat16",
            gated=gated, owned=owned,
        )
        for t, d, e, k, width, gated, owned in shapes
    ]  # fmt: skip
    small = [case for case in forward if case.tokens > 1 and case.layer_bytes < 2**28]
    return [*forward, *(replace(case, mode="train") for case in small)]


def acceptance() -> list[LayerCase]:
    """The shapes that have a target (`moduli.bench.targets`)."""
    from moduli.bench.targets import TARGETS

    return [case for target in TARGETS for case in target.cases]


SETS = {
    "quick": quick,
    "acceptance": acceptance,
    "grid": grid,
    "families": families,
    "accelerator": accelerator,
}


def named(name: str) -> list[LayerCase]:
    """The cases of a set.

    Raises:
        UnknownNameError: there is no set of that name.
    """
    if name not in SETS:
        raise UnknownNameError(f"there is no set {name!r}. {nearest(name, SETS)}")
    return SETS[name]()
