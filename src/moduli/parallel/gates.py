"""Stock gates: whether tokens can be routed within a rank by what one returns.

A gate of transformers returns logits of all experts, and weights and indices of those it takes.
Another choice can be made in its stead where it takes the best by their logits, and other weights
where its own are softmax probabilities. Both are found out from what it returns.
Letters: T tokens, E experts, K experts per token, L experts of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moduli.errors import ModelError

TOLERANCE = 1e-3
"""Of probabilities that a gate computed in float32."""


def require_no_correction(name: str, owner: nn.Module, experts: nn.Module, count: int) -> None:
    """Raise if a bias that is no part of the logits decides which experts a gate takes.

    It is 0 at first and moves in training, so that no look at a first batch would find it.

    Args:
        name: of the experts in the model.
        owner: the module with the gate and the experts.
        experts: where such a name means something else.
        count: E.

    Raises:
        ModelError: there is one.
    """
    inside = {id(tensor) for tensor in (*experts.parameters(), *experts.buffers())}
    for key, tensor in (*owner.named_parameters(), *owner.named_buffers()):
        # A bias of the logits themselves is a linear layer's, whose whole name it is.
        if key.endswith("_bias") and tensor.numel() == count and id(tensor) not in inside:
            raise ModelError(
                f"{name}: {type(owner).__name__} chooses experts by scores that {key} corrects, "
                "not by their logits, so that the best of a rank cannot be told; use "
                'local_policy="modulo", which leaves the choice to the gate'
            )


def require_logits(name: str, gate: nn.Module, output: Any, count: int) -> None:
    """Raise unless a gate returns logits of all E experts, weights and indices.

    Raises:
        ModelError: it returns something else.
    """
    known = isinstance(output, tuple) and len(output) == 3
    known = known and all(isinstance(part, Tensor) and part.dim() == 2 for part in output)
    if not known or output[0].shape[1] != count or output[2].is_floating_point():
        raise _not_understood(name, gate, "returns something else than")


def require_choice_by_logits(
    name: str, gate: nn.Module, logits: Float[Tensor, "T E"], index: Int[Tensor, "T K"]
) -> None:
    """Raise unless a gate took the experts with the greatest logits.

    Raises:
        ModelError: it took others.
    """
    # Of probabilities, among which logits that are far below the best are all alike.
    probs = logits.softmax(-1, dtype=torch.float32)
    taken = probs.gather(1, index).sort(-1, descending=True).values
    best = probs.topk(index.shape[1], dim=-1).values
    if not torch.allclose(taken, best, rtol=_tolerance(logits), atol=1e-6):
        raise _not_understood(name, gate, "does not choose by")


def renormalises(
    name: str, gate: nn.Module, logits: Float[Tensor, "T E"], weights: Float[Tensor, "T K"]
) -> tuple[bool, bool]:
    """Whether a gate scales the probabilities of the experts it takes to sum to 1.

    Returns:
        That, and whether these tokens leave no doubt: where those taken have all probability
        anyway, scaling changes nothing.

    Raises:
        ModelError: its weights are no softmax probabilities.
    """
    best = logits.softmax(-1, dtype=torch.float32).topk(weights.shape[1], dim=-1).values
    ours = weights.float().sort(-1, descending=True).values
    near = _tolerance(logits, weights)
    away = {}
    for scaled in (True, False):
        want = best / best.sum(-1, keepdim=True) if scaled else best
        if torch.allclose(ours, want, rtol=near, atol=near):
            away[scaled] = float((ours - want).abs().max())
    if not away:
        raise _not_understood(name, gate, "weighs experts in another way than by")
    return min(away, key=lambda scaled: away[scaled]), len(away) == 1


def _tolerance(*rounded: Tensor) -> float:
    """Gates round to the dtype of the model."""
    return max(TOLERANCE, *(torch.finfo(tensor.dtype).eps for tensor in rounded))


def _not_understood(name: str, gate: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"{name}: its gate is a {type(gate).__name__}, which {what} logits of all experts, and "
        "softmax probabilities and indices of the best; tokens cannot be routed within a rank by "
        'it. Use local_policy="modulo", which needs no gate'
    )
