"""From routings to numbers: what is counted over tokens, and what follows from the counts.

Only real tokens count; padding is only measured as a share. A slot counts where it computes
something: not where a capacity dropped it or the router left it out.

    load[e]     = selections of e / all selections
    mass[e]     = combine weight of e / all combine weight
    entropy     = mean over tokens of H(softmax(scores)) / log E
    pairs[e, f] = share of tokens that chose both e and f
    overlap     = 2 I(X; Y) / (H(X) + H(Y)) of the first choices X, Y of two layers
    by chance   = its mean over tables of choices that have the same loads and no other tie

Letters: B batch, S sequence, T tokens, E experts, K experts per token, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moduli.inspect.duplicates import duplicate_experts
from moduli.inspect.record import LayerInspection, Matrix, Vector
from moduli.inspect.watching import ExpertLayer, Seen, strongest_first
from moduli.surgery.probe import layer_report
from moduli.surgery.routed import RoutedLayer

DEAD = 0.01
"""Of an equal share of the load: experts below it are called dead."""
CHANCES = 20
"""Tables that are drawn to know what chance makes of an overlap. Of E = 4 experts their mean has
a standard error of a tenth, of more experts a smaller one."""


class Tally:
    """Counts of one layer with E experts, over the batches that were added."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.num_experts = num_experts
        self.top_k = 0
        self.tokens = 0
        self.positions = 0
        self.counts = torch.zeros(num_experts, dtype=torch.float64)
        self.mass = torch.zeros(num_experts, dtype=torch.float64)
        self.pairs = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.entropy = 0.0
        self.scored = 0
        self.by_domain: dict[str, Tensor] = {}
        self.by_class = torch.zeros(num_classes, num_experts, dtype=torch.float64)

    def add(self, seen: Seen, domain: str, labels: Int[Tensor, " T"] | None) -> None:
        """Count one routing; `labels` are -100 where a token has none."""
        routing, keep = seen.routing, real_tokens(seen)
        experts, weights = routing.experts[keep], routing.weights[keep].float()
        active = (
            torch.ones_like(weights) if routing.active is None else routing.active[keep].float()
        )
        chosen = torch.zeros(len(experts), self.num_experts, device=experts.device)
        chosen.scatter_add_(1, experts, active)
        counts = _wide(chosen.sum(0))
        gates = torch.zeros_like(chosen).scatter_add_(1, experts, weights * active)
        once = chosen.clamp(max=1)
        self.top_k = max(self.top_k, experts.shape[1])
        self.tokens += len(experts)
        self.positions += len(keep)
        self.counts += counts
        self.mass += _wide(gates.sum(0))
        self.pairs += _wide(once.T @ once)
        self.by_domain[domain] = self.by_domain.get(domain, torch.zeros_like(counts)) + counts
        if routing.scores is not None:
            p = routing.scores[keep].float().softmax(-1)
            self.entropy += float(torch.special.entr(p).sum())
            self.scored += len(experts)
        if labels is not None:
            labels = labels.to(keep.device)[keep]
            known = labels >= 0
            self.by_class.index_add_(0, labels[known].cpu(), _wide(chosen[known]))


class Measure:
    """Counts of all layers of a model, and which experts of two layers go together.

    Args:
        layers: of the model.
        classes: names of the labels, in the order of their integers.
    """

    def __init__(self, layers: Sequence[ExpertLayer], classes: Sequence[str] = ()) -> None:
        self.layers = list(layers)
        self.classes = tuple(classes)
        self.tallies = {one.name: Tally(one.num_experts, len(classes)) for one in layers}
        self.joint: dict[tuple[int, int], Tensor] = {}

    def add(
        self, seen: Sequence[Seen], domain: str, labels: Int[Tensor, "B *S"] | None = None
    ) -> None:
        """Count what was seen in one batch.

        Args:
            seen: as `watch` gives it.
            domain: of all examples of the batch.
            labels: a class per example or per position, -100 where there is none.
        """
        first: dict[str, Tensor] = {}
        for one in seen:
            tokens = len(one.routing.experts)
            self.tallies[one.layer].add(one, domain, labels_of_tokens(labels, tokens))
            choice = strongest_first(one.routing)[0][:, 0]
            first[one.layer] = choice.masked_fill(~real_tokens(one), -1)
        for i, a in enumerate(self.layers):
            for j, b in enumerate(self.layers[: i + 1]):
                if a.stack == b.stack and a.name in first and b.name in first:
                    self._add_pair(i, j, first[a.name], first[b.name])

    def _add_pair(self, i: int, j: int, x: Int[Tensor, " T"], y: Int[Tensor, " U"]) -> None:
        rows, columns = self.layers[i].num_experts, self.layers[j].num_experts
        if len(x) != len(y):
            return
        both = (x >= 0) & (y >= 0)
        cells = torch.bincount(x[both] * columns + y[both], minlength=rows * columns)
        found = cells.cpu().reshape(rows, columns)
        self.joint[i, j] = self.joint.get((i, j), torch.zeros_like(found)) + found

    def inspections(self, *, coselection: bool = True) -> tuple[LayerInspection, ...]:
        """One record per layer that routed at least one real token."""
        return tuple(
            inspected(layer, self.tallies[layer.name], self.classes, coselection=coselection)
            for layer in self._used()
        )

    def overlap(self) -> tuple[tuple[float | None, ...], ...]:
        """[L, L] normalised mutual information of first choices; see `Inspection.overlap`."""
        return self._of_pairs(mutual_information)

    def overlap_by_chance(self) -> tuple[tuple[float | None, ...], ...]:
        """[L, L] what would be there if layers chose independently of each other."""
        return self._of_pairs(information_by_chance)

    def _of_pairs(
        self, measured: Callable[[Int[Tensor, "E G"]], float]
    ) -> tuple[tuple[float | None, ...], ...]:
        place = {layer.name: i for i, layer in enumerate(self.layers)}
        used = [place[layer.name] for layer in self._used()]

        found = {pair: measured(counts) for pair, counts in self.joint.items() if counts.any()}
        return tuple(tuple(found.get((max(i, j), min(i, j))) for j in used) for i in used)

    def _used(self) -> list[ExpertLayer]:
        return [layer for layer in self.layers if self.tallies[layer.name].tokens]


def inspected(
    layer: ExpertLayer, tally: Tally, classes: Sequence[str], *, coselection: bool
) -> LayerInspection:
    """The record of one layer from its counts."""
    load = shares(tally.counts)
    fair = 1 / tally.num_experts
    named = dict(zip(classes, tally.by_class, strict=True))
    return LayerInspection(
        name=layer.name,
        num_experts=tally.num_experts,
        top_k=tally.top_k,
        active=float(tally.counts.sum()) / tally.tokens,
        tokens=tally.tokens,
        padding=1 - tally.tokens / tally.positions,
        load=load,
        mass=shares(tally.mass),
        entropy=_relative(tally.entropy / tally.scored, tally.num_experts)
        if tally.scored
        else None,
        load_entropy=_relative(-sum(p * math.log(p) for p in load if p > 0), tally.num_experts),
        dead=tuple(e for e, share in enumerate(load) if share < DEAD * fair),
        duplicates=duplicate_experts(layer.module),
        coselection=_matrix(tally.pairs / tally.tokens) if coselection else None,
        by_domain=_shares_by_name(tally.by_domain),
        by_class=_shares_by_name(named),
        quality=split_quality_of(layer),
    )


def split_quality_of(layer: ExpertLayer) -> Mapping[str, float] | None:
    """How well the experts of a split FFN group its present keys; None for other experts."""
    if not isinstance(layer.module, RoutedLayer):
        return None
    quality = layer_report(layer.module, None).quality
    return None if quality is None else quality.to_dict()


def real_tokens(seen: Seen) -> Bool[Tensor, " T"]:
    """Mask of real tokens; all are where nothing is known of padding."""
    experts = seen.routing.experts
    if seen.real is not None:
        return seen.real.to(experts.device)
    return torch.ones(len(experts), dtype=torch.bool, device=experts.device)


def labels_of_tokens(labels: Int[Tensor, "B *S"] | None, tokens: int) -> Int[Tensor, " T"] | None:
    """A label for every token of a batch; None where they do not fit.

    Args:
        labels: one per example, which all its tokens get, or one per position.
        tokens: T.
    """
    if labels is None or tokens % len(labels):
        return None
    if labels.dim() == 1:
        return labels.repeat_interleave(tokens // len(labels))
    return labels.flatten() if labels.numel() == tokens else None


def shares(counts: Float[Tensor, " E"]) -> Vector:
    """Counts divided by their sum; zeros where there is nothing to divide."""
    total = float(counts.sum())
    return tuple((counts / total if total > 0 else torch.zeros_like(counts)).tolist())


def mutual_information(counts: Int[Tensor, "E G"]) -> float:
    """2 I(X; Y) / (H(X) + H(Y)) of the joint counts of two choices; 1 where both are constant."""
    joint = counts.double() / counts.sum()
    x, y = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    if x + y <= 0:
        return 1.0
    return min(1.0, max(0.0, 2 * (x + y - _entropy(joint)) / (x + y)))


def information_by_chance(counts: Int[Tensor, "E G"]) -> float:
    """What `mutual_information` would be on average, had two choices nothing to do with each other.

    It is above 0, the more so the more experts and the fewer tokens. Tables with the same sums of
    rows and columns are drawn as if one choice had been shuffled over the tokens, which is the
    model of chance of Vinh, Epps and Bailey (Information theoretic measures for clusterings
    comparison, JMLR 2010).
    """
    from scipy.stats import random_table

    drawn = random_table(counts.sum(1).numpy(), counts.sum(0).numpy()).rvs(CHANCES, random_state=0)
    return sum(mutual_information(torch.from_numpy(table)) for table in drawn) / CHANCES


def _entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())


def _relative(entropy: float, num_experts: int) -> float:
    """An entropy (nats) as a share of the largest possible one; 0 for a single expert."""
    return entropy / math.log(num_experts) if num_experts > 1 else 0.0


def _shares_by_name(counts: Mapping[str, Tensor]) -> dict[str, Vector]:
    return {name: shares(one) for name, one in counts.items() if one.any()}


def _matrix(values: Float[Tensor, "E E"]) -> Matrix:
    return tuple(map(tuple, values.tolist()))


def _wide(values: Tensor) -> Tensor:
    return values.cpu().double()
