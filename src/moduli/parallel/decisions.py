"""Gating Dropout: now and then a step of training in which no token leaves its rank.

Experts are spread over R ranks, and a mixture layer exchanges tokens twice. With probability p all
ranks skip that: tokens go to experts of their own rank ("gate_drop"), or to none at all
("gate_expert_drop", the sublayer adds nothing and the residual remains). Evaluation never drops.

All ranks must decide alike, or those that exchange wait for ever for those that do not. A decision
is therefore a function of (seed, step[, layer]) by a counter-based generator: it costs no message,
leaves every other random state alone, does not depend on how many ranks there are, and a resumed
run goes on in the same sequence.
Source: Gating Dropout (arXiv 2205.14336, ICML 2022).
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np

from moduli.errors import ConfigError, ModelError, UnknownNameError, nearest

Mode = Literal["gate_drop", "gate_expert_drop"]
Scope = Literal["step", "layer"]
LocalPolicy = Literal["paper", "masked_gate", "modulo"]
Sync = Literal["seed", "broadcast"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "scope": get_args(Scope),
    "local_policy": get_args(LocalPolicy),
    "sync": get_args(Sync),
}


@dataclass(frozen=True)
class GatingDropout:
    """How often a step drops the exchange, and what happens then.

    Attributes:
        p: probability that a step (or a layer of it) drops.
        mode: "gate_drop" computes with experts of the token's own rank; "gate_expert_drop" computes
            nothing, so that the layer's experts and its gate get no gradient in that step.
        scope: "step" decides once for all layers and micro-batches of an optimiser step; "layer"
            for each layer by itself.
        local_policy: which of its rank's experts a token goes to in "gate_drop". "paper": the one
            with the best score, by weight 1; the gate gets no gradient. "masked_gate": usual
            routing, over these experts alone. "modulo": usual routing, and the slots of expert e
            are computed by local expert e mod L (L experts on a rank); weights and capacity stay,
            and so does the auxiliary loss, which the other two leave out.
        sync: "seed" decides on every rank by itself; "broadcast" takes what rank 0 decided, which
            costs a message per step.
        seed: of the decisions.
        debug: compare seed, settings and step of all ranks at every step, which costs a message;
            without it settings are compared once, at the start.

    Raises:
        ConfigError: p is no probability, or the seed no whole number from 0 to 2**128 - 1.
        UnknownNameError: a mode, scope, policy or sync that does not exist.
    """

    p: float
    mode: Mode = "gate_drop"
    scope: Scope = "step"
    local_policy: LocalPolicy = "paper"
    sync: Sync = "seed"
    seed: int = 0
    debug: bool = False

    def __post_init__(self) -> None:
        p: Any = self.p
        if not (isinstance(p, Real) and 0 <= float(p) <= 1):
            raise ConfigError(
                f"p is {p!r}, which is no probability; choose one from 0 (never) to 1 (always)"
            )
        if not _whole(self.seed, 128):
            raise ConfigError(
                f"seed is {self.seed!r}; expected a whole number from 0 to 2**128 - 1, such as 0"
            )
        for name, known in _CHOICES.items():
            given: Any = getattr(self, name)
            if given not in known:
                raise UnknownNameError(f"{name} is {given!r}. {nearest(str(given), known)}")

    def decisions(self, step: int, layers: int) -> tuple[bool, ...]:
        """Whether each of `layers` layers drops in an optimiser step, counted from 0.

        Raises:
            ConfigError: the step is no whole number from 0.
        """
        if not _whole(step, 64):
            raise ConfigError(
                f"step is {step!r}; expected how many optimiser steps are done: 0, 1, 2, ..."
            )
        if self.scope == "step":
            return (self._draw(step, 0),) * layers
        return tuple(self._draw(step, layer + 1) for layer in range(layers))

    def _draw(self, step: int, stream: int) -> bool:
        counter = np.array([0, step, stream, 0], dtype=np.uint64)
        bits = np.random.Philox(key=self.seed, counter=counter).random_raw()
        return float(bits >> 11) * 2.0**-53 < self.p

    @property
    def keeps_gate(self) -> bool:
        """Whether the gate works as usual in a step that drops, auxiliary loss included."""
        return self.mode == "gate_drop" and self.local_policy == "modulo"

    def fingerprint(self, *more: object) -> int:
        """A number that is the same on two ranks if their settings are, and `more` of them."""
        text = repr((astuple(self), more)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _whole(number: Any, bits: int) -> bool:
    """Whether it is a whole number of so many bits, from 0."""
    return isinstance(number, Integral) and 0 <= int(number) < 2**bits


def decided(name: str, dropped: bool | None) -> bool:
    """Whether a layer in training drops.

    Args:
        name: of the layer.
        dropped: what was said of the current step; None before the first.

    Raises:
        ModelError: nobody has said which step it is.
    """
    if dropped is None:
        raise ModelError(
            f"{name}: gating dropout does not know the step; call set_step(step) before "
            "every optimiser step, or give the Trainer callbacks=[attached.callback()]. A copy of "
            "a model has no steps yet: apply gating_dropout to it first"
        )
    return dropped
