"""Which neurons fire together: the co-activation matrix of MoEfication.

Over batches of a few tokens, R [tokens, F] what the neurons of each token give,

    A += min(R^T R, cap),

so that within a batch a pair of neurons counts at most `cap`, however strongly it fires. The rule
needs neurons that are often silent: MoEfication takes R = relu(pre-activations) of ReLU models.
LLaMA-MoE's variants (|.|, square, the raw values of saved gate or up projections) are there as
well; its authors advise against them, since in such models every neuron always fires a little.

Letters: T tokens, F neurons.
Source: MoEfication (Findings of ACL 2022), section 3.2; thunlp/MoEfication `examples/adj.py`;
pjlab-sys4nlp/llama-moe `GraphSplit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.errors import ConfigError, DataError

Rectify = Literal["relu", "abs", "square", "raw"]
Progress = Callable[[int], None]
"""Called with the number of tokens counted so far."""

RECTIFY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "square": torch.square,
    "raw": lambda z: z,
}


class Coactivation:
    """Accumulates the co-activation matrix of one FFN from a stream of pre-activations.

    It takes F * F * 4 bytes twice (38 MB each for 3072 neurons, 485 MB for 11008), on the device
    of the first pre-activations.

    Args:
        width: F.
        rectify: what R is made of the pre-activations by.
        tokens: per batch of the sum, 8 in MoEfication. Those at the end of the stream that do not
            fill one are not counted.
        cap: most that a pair of neurons gains from one batch.
        max_tokens: further ones are ignored.
        progress: see `Progress`.

    Raises:
        ConfigError: an option that cannot work.
    """

    def __init__(
        self,
        width: int,
        *,
        rectify: Rectify = "relu",
        tokens: int = 8,
        cap: float = 1.0,
        max_tokens: int = 200_000,
        progress: Progress | None = None,
    ) -> None:
        if rectify not in RECTIFY:
            raise ConfigError(f"rectify is {rectify!r}, but must be one of {', '.join(RECTIFY)}")
        if cap <= 0 or not 1 <= tokens <= max_tokens:
            raise ConfigError(
                f"cap {cap} must be positive, and tokens {tokens} from 1 to max_tokens {max_tokens}"
            )
        self.width = width
        self.rectify = RECTIFY[rectify]
        self.tokens = tokens
        self.cap = cap
        self.max_tokens = max_tokens
        self.progress = progress
        self.counted = 0
        self._rest: Tensor | None = None  # tokens that wait for their batch to fill
        self._sum: Tensor | None = None
        self._one: Tensor | None = None  # room for the product of one batch

    @property
    def full(self) -> bool:
        """Whether further tokens would be ignored."""
        return self.counted + self.tokens > self.max_tokens

    @torch.no_grad()
    def add(self, z: Float[Tensor, "T F"]) -> None:
        """Count the pre-activations of any number of tokens.

        Raises:
            ConfigError: they are not those of `width` neurons.
        """
        if z.shape[1] != self.width:
            raise ConfigError(f"pre-activations of {z.shape[1]} neurons, not of {self.width}")
        if self._sum is None:
            self._sum = z.new_zeros(self.width, self.width, dtype=torch.float32)
            self._one = torch.empty_like(self._sum)
        z = z.detach().float()
        z = z if self._rest is None else torch.cat([self._rest, z])
        batches = min(len(z), self.max_tokens - self.counted) // self.tokens
        for r in self.rectify(z[: batches * self.tokens]).split(self.tokens):
            together = torch.mm(r.T, r, out=self._one)
            self._sum += together.clamp_(max=self.cap)
        self.counted += batches * self.tokens
        self._rest = None if self.full else z[batches * self.tokens :].clone()
        if self.progress is not None:
            self.progress(self.counted)

    def matrix(self) -> Float[Tensor, "F F"]:
        """A as it is now (not a copy).

        Raises:
            DataError: not even one batch of tokens was counted.
        """
        if self._sum is None or self.counted == 0:
            raise DataError(f"co-activation needs at least {self.tokens} tokens")
        return self._sum
