"""Splits by name, as methods offer them among their settings.

Letters: F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from moduli.errors import ConfigError
from moduli.surgery.locate import FFN
from moduli.surgery.partition.balanced import balanced_clusters
from moduli.surgery.partition.coactivation import Coactivation
from moduli.surgery.partition.graph import coactivation_labels
from moduli.surgery.partition.observe import Sample, observe, require_data
from moduli.surgery.partition.sizes import contiguous_labels, random_labels

NamedSplit = Literal["cluster", "contiguous", "random", "coactivation"]


def named_labels(
    split: NamedSplit,
    ffn: FFN,
    num_experts: int,
    *,
    seed: int,
    sample: Sample | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Int[Tensor, " F"]:
    """Expert of every neuron of an FFN.

    Args:
        split: "cluster" by keys, "contiguous" blocks, "random" with a shuffle of its own for
            every layer, or "coactivation" of the neurons on the sample.
        ffn: of a dense model.
        num_experts: E.
        seed: of whatever is drawn.
        sample: for "coactivation".
        time_limit: of the clustering, in seconds.
        progress: called with a line of text per step.

    Raises:
        ConfigError: more experts than neurons, no such split, or no data for one that needs it.
    """
    say = progress or (lambda line: None)
    if split == "contiguous":
        return contiguous_labels(ffn.width, num_experts)
    if split == "random":
        return random_labels(ffn.width, num_experts, seed + ffn.index)
    if split == "cluster":
        return balanced_clusters(
            ffn.keys(),
            num_experts,
            seed=seed,
            time_limit=time_limit,
            progress=lambda done, moved, share: say(
                f"{ffn.name}: pass {done}, {moved} neurons moved, {share:.1%} explained"
            ),
        )
    if split != "coactivation":
        raise ConfigError(
            f"split is {split!r}; it may be 'cluster', 'contiguous', 'random' or 'coactivation'"
        )
    sample = require_data(sample, "split='coactivation'")
    together = Coactivation(
        ffn.width, progress=lambda tokens: say(f"{ffn.name}: {tokens} tokens counted")
    )
    observe(sample.model, [ffn], sample.batches, lambda ffn, x, z: together.add(z))
    return coactivation_labels(together.matrix(), num_experts, seed=seed)
