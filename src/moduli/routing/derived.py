"""What a gate derives from weights, kept in evaluation for as long as the weights do not change.

A mean key reads all keys of a layer, which for one token costs more than the experts it chooses.
What was derived is used again only if the weight is the same memory (same storage object, address,
shape, strides and type), its version counter has not moved, and a sample of its numbers is the
same: `.data` and fused optimisers change a weight behind the counter's back, though never in a few
places only. What edits single numbers in such a way must call `forget`.

Nothing is kept in training, where gradients are recorded, for weights without a version counter
(inference tensors), while a graph is recorded, or on other devices than the CPU, where looking at
a sample would wait for the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from moduli.routing.plain import is_plain
from moduli.routing.router import Router
from moduli.routing.rule import Rule

SAMPLES = 64


class Kept(NamedTuple):
    """A derived tensor and what its source was like."""

    value: Tensor
    storage: weakref.ref[torch.UntypedStorage]  # an address may be given out again, this not
    stamp: tuple[Hashable, ...]
    sample: Tensor
    layout: tuple[tuple[int], tuple[int], int]  # of the sample: size, stride, offset


class Derived:
    """The tensor that was derived last. It is not copied or pickled with its owner."""

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def forget(self) -> None:
        """Derive anew at the next call."""
        self._kept = None

    def __call__(
        self, derive: Callable[[Tensor], Tensor], source: Tensor, reuse: bool, *settings: Hashable
    ) -> Tensor:
        """`derive(source)`, or what it was.

        Args:
            derive: a pure function.
            source: a weight or a view of one.
            reuse: whether an earlier result may be taken, and this one kept.
            settings: whatever else the result depends on.
        """
        if not (reuse and is_plain(source)):
            self._kept = None
            return derive(source)
        try:
            storage, version = source.untyped_storage(), source._version
        except RuntimeError:  # an inference tensor, or one inside a transform of `torch.func`
            self._kept = None
            return derive(source)
        stamp = (
            version, source.data_ptr(), source.shape, source.stride(), source.dtype, *settings
        )  # fmt: skip
        kept = self._kept
        if (
            kept is not None
            and kept.stamp == stamp
            and kept.storage() is storage
            and torch.equal(kept.sample, source.as_strided(*kept.layout))
        ):
            return kept.value
        value, layout = derive(source), _diagonal(source)
        sample = source.as_strided(*layout).clone()
        self._kept = Kept(value, weakref.ref(storage), stamp, sample, layout)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


class DerivedRouter(Router):
    """A router whose gate is a function of weights of the model.

    Args:
        num_experts: E.
        rule: see `Rule`.
        keys: returns the current keys [F, D], one expert after the other.
    """

    learned = False

    def __init__(self, num_experts: int, rule: Rule, keys: Callable[[], Tensor]) -> None:
        super().__init__(num_experts, rule)
        self.keys = keys
        self._derived = Derived()

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Derive the gate anew, after numbers of the keys were changed past torch's notice."""
        self._derived.forget()

    def _reusable(self, x: Tensor | None = None) -> bool:
        """Whether a gate of earlier may score `x`: in evaluation, outside any gradient."""
        return not (self.training or torch.is_grad_enabled() or (x is not None and x.requires_grad))


def _diagonal(source: Tensor) -> tuple[tuple[int], tuple[int], int]:
    """Where a few numbers along the diagonal of a matrix lie, from its first to its last rows."""
    rows, columns = source.shape
    count = min(rows, columns, SAMPLES)
    down, across = source.stride()
    step = rows // max(count, 1) * down + columns // max(count, 1) * across
    return (count,), (step,), int(source.storage_offset())
