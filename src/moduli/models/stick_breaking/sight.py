"""Which keys a query sees: those before it (and its own), real ones, of its own segment.

Query t of T stands at position S - T + t among S keys. A key that is not seen has logit -inf:
weight 0, and it takes nothing from the stick.

Letters: R rows, each with keys of its own; T queries; S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from moduli.errors import ConfigError


@dataclass(frozen=True)
class Sight:
    """The rule for R rows.

    Attributes:
        queries: T.
        keys: S.
        attend_current: whether a query sees the key at its own position.
        key_mask: keys that exist; None: all.
        segments: what each key belongs to, and the last T the queries; None: one segment.
    """

    queries: int
    keys: int
    attend_current: bool
    key_mask: Bool[Tensor, "R S"] | None
    segments: Integer[Tensor, "R S"] | None

    def end(self, time: int) -> int:
        """One more than the last position that a query may see."""
        return self.keys - self.queries + time + int(self.attend_current)

    def per_head(self, heads: int) -> Sight:
        """The rule for rows of every batch row's heads."""
        mask, segments = (
            None if t is None else t.repeat_interleave(heads, dim=0)
            for t in (self.key_mask, self.segments)
        )
        return Sight(self.queries, self.keys, self.attend_current, mask, segments)

    def hidden(self, rows: slice, keys: slice, times: slice, like: Tensor) -> Tensor | None:
        """What is not seen, [rows or 1, keys, times]; None where all of it is.

        Args:
            rows: of the R.
            keys: positions of keys, with both ends.
            times: of queries, with both ends.
            like: a tensor on the device.
        """
        found: Tensor | None = None
        if keys.stop > self.end(times.start):
            ends = torch.arange(self.end(times.start), self.end(times.stop), device=like.device)
            found = torch.arange(keys.start, keys.stop, device=like.device)[:, None] >= ends
            found = found[None]
        if self.key_mask is not None:
            absent = ~self.key_mask[rows, keys, None]
            found = absent if found is None else found | absent
        if self.segments is not None:
            offset = self.keys - self.queries
            own = self.segments[rows, None, offset + times.start : offset + times.stop]
            foreign = self.segments[rows, keys, None] != own
            found = foreign if found is None else found | foreign
        return found


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    early_exit: float | None,
) -> None:
    """Refuse shapes and types that do not fit together.

    Raises:
        ConfigError: says which.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise ConfigError(
                f"{name} is {_said(tensor)}; expected a floating-point tensor [batch, heads, "
                "length, width]"
            )
    batch, heads, keys, width = key.shape
    queries = query.shape[2]
    if query.shape[0] != batch or query.shape[3] != width:
        raise ConfigError(
            f"query is {_said(query)} and key {_said(key)}; batch and width must be the same"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ConfigError(
            f"value is {_said(value)} and key {_said(key)}; they may differ in width only"
        )
    if heads == 0 or query.shape[1] % heads:
        raise ConfigError(
            f"{query.shape[1]} heads of queries cannot be shared out over {heads} heads of keys; "
            "their number must be a multiple"
        )
    if queries > keys:
        raise ConfigError(
            f"there are {queries} queries but {keys} keys; queries stand at the last positions, so "
            "keys must hold those before (the cache) and those of the queries themselves"
        )
    if queries == 0 or width == 0:
        raise ConfigError(f"query is {_said(query)}; expected at least one query and one dimension")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, keys)):
        raise ConfigError(
            f"key_mask is {_said(key_mask)}; expected a bool tensor {[batch, keys]}, True where a "
            "key exists (an attention_mask of 0 and 1: pass attention_mask.bool())"
        )
    if segments is not None and (
        segments.is_floating_point()
        or segments.dtype == torch.bool
        or segments.shape != (batch, keys)
    ):
        raise ConfigError(
            f"segments is {_said(segments)}; expected an integer tensor {[batch, keys]} with the "
            "number of each key's segment"
        )
    if early_exit is not None and not 0 <= early_exit < 1:
        raise ConfigError(
            f"early_exit is {early_exit}; expected a share of the stick from 0 to below 1, such as "
            "1e-7, or None to be exact"
        )


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
