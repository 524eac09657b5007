"""Hash routing: a fixed table says which expert a token of the vocabulary has.

    y = FFN_e(x),  e = table[id of the token]

There is nothing to learn and nothing to balance; the weight is 1, so that copies of a dense FFN
start at the dense function. The table is random, or balanced: tokens in the order of how often they
occur, each to the expert that has the least so far. It is a buffer and travels in checkpoints.

Letters: T tokens, V vocabulary, E experts.
Source: Hash Layers (arXiv 2106.04426).
"""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moduli.errors import ConfigError, ModelError
from moduli.routing.record import RouteContext, Routing
from moduli.routing.router import Router
from moduli.routing.rule import Rule


class HashRouter(Router):
    """Looks the expert of every token up.

    Args:
        table: expert of every token of the vocabulary.
        num_experts: E.
    """

    learned = False
    by_ids = True

    def __init__(self, table: Int[Tensor, " V"], num_experts: int) -> None:
        # The table's expert has all the probability, so that its weight is 1.
        super().__init__(num_experts, Rule(top_k=1, combine="probability"))
        self.table: Tensor
        self.register_buffer("table", table.clone())

    def require_top_k(self, k: int) -> None:
        """Raise unless k is 1."""
        if k != 1:
            raise ConfigError(
                f"top_k is {k}, but a table has one expert per token (Hash Layers); leave it at 1, "
                "or convert the dense model by moduli.SparseUpcycling(top_k=...)"
            )

    def scores(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Nothing: a token's vector does not matter."""
        return x.new_zeros(()).expand(len(x), self.num_experts)

    def select(self, scores: Float[Tensor, "T E"], context: RouteContext) -> Routing:
        """One expert per token, with weight 1 and without scores.

        Raises:
            ModelError: the ids of the tokens are not known, or not in the table (on a CPU, since
                looking would wait for another device).
            ConfigError: several experts per token are asked for.
        """
        if context.ids is None:
            raise ModelError(
                "hash routing looks tokens up by their ids, and this pass has none that fit the "
                "layer's input; give the model input_ids (decoder_input_ids or labels for the "
                "layers of a decoder) and not inputs_embeds"
            )
        self.require_top_k(self.rule.top_k)
        try:
            experts = self.table[context.ids][:, None]
        except IndexError as error:
            raise ModelError(
                f"the table of this layer has {len(self.table)} tokens, and token "
                f"{int(context.ids.max())} is none of them; if tokens were added to the model, "
                "merge it (moduli.merge) and convert it again, with its new vocabulary"
            ) from error
        return Routing(experts, torch.ones_like(experts, dtype=scores.dtype))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, vocabulary={len(self.table)}"


def random_table(
    vocabulary: int, num_experts: int, generator: torch.Generator
) -> Int[Tensor, "{vocabulary}"]:
    """Every expert for as many tokens of the vocabulary as any other, up to one, by chance."""
    order = torch.randperm(vocabulary, generator=generator)
    return order % num_experts


def balanced_table(
    counts: Int[Tensor, " V"], num_experts: int, generator: torch.Generator
) -> Int[Tensor, " V"]:
    """From the most to the least frequent token, each to the expert with the least load so far.

    Args:
        counts: how often every token occurs. Tokens that do not count as once, so that they are
            spread over experts, too; of equal ones chance decides which comes first.
        num_experts: E.
        generator: of that chance.
    """
    order = torch.randperm(len(counts), generator=generator)
    order = order[counts[order].argsort(descending=True, stable=True)]
    table = torch.empty(len(counts), dtype=torch.long)
    loads = [(0, i) for i in range(num_experts)]  # in order, as a heap has to be
    for token, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        load, expert = loads[0]
        table[token] = expert
        heapq.heapreplace(loads, (load + max(count, 1), expert))
    return table
