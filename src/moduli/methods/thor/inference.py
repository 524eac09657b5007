"""Choosing the inference mode of a THOR model, and measuring how far its modes are apart.

    spread         loss of the worst single expert minus that of the best
    ensemble gain  mean loss of the single experts minus that of ensemble_prob
    collapse gap   loss of the averaged experts minus that of ensemble_prob

Letters: N experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import DataError
from moduli.methods.thor.objective import Objective, has_shift, without_labels
from moduli.methods.thor.outputs import logits_of
from moduli.methods.thor.passes import Passes, passes_of
from moduli.surgery.convert import base_model, recorded_layout, set_layout
from moduli.surgery.evaluating import evaluating
from moduli.surgery.inputs import Batches, as_list
from moduli.surgery.projection import base_of, weight_of
from moduli.surgery.stochastic import stochastic_projections


def set_inference(model: nn.Module, mode: str, *, seed: int | None = None) -> None:
    """Evaluate a THOR model in another way from now on; recorded in its config.

    Args:
        model: a THOR model, or what PEFT or DDP has made of it.
        mode: "average", "fixed:0", "ensemble_layer", "ensemble_prob", "random_sentence",
            "random_token", "random_position" or "random_batch".
        seed: of what random modes draw, which start anew; saved, too. None: the one before.

    Raises:
        ConfigError: there is no such mode, or no such expert.
        ModelError: the model has no stochastic experts.
    """
    passes = passes_of(model)
    host, layout = recorded_layout(model)
    seed = passes.chooser.seed if seed is None else seed
    passes.chooser.set_mode(mode, seed)
    config = {**layout.config, "inference": mode, "inference_seed": seed}
    set_layout(host, replace(layout, config=config))


@dataclass(frozen=True)
class ThorReport:
    """Losses of one model in all its deterministic inference modes, on the same data.

    Attributes:
        losses: by mode; cross-entropy in nats or squared error, mean over labels.
        labels: how many there were.
        disagreement: mean over pairs of experts, each used everywhere, of half the symmetric KL
            divergence of their predictions (nats per label), or of the squared difference.
        similarity: by layer, the mean cosine between the weights of two experts; none if N = 1.
    """

    losses: Mapping[str, float]
    labels: int
    disagreement: float
    similarity: Mapping[str, float]

    @property
    def fixed(self) -> list[float]:
        """Losses of the single experts."""
        return [loss for mode, loss in self.losses.items() if mode.startswith("fixed:")]

    @property
    def spread(self) -> float:
        """How much it matters which expert is used."""
        return max(self.fixed) - min(self.fixed)

    @property
    def ensemble_gain(self) -> float:
        """What a pass for every expert improves on a single one; above 0 if it does."""
        return sum(self.fixed) / len(self.fixed) - self.losses["ensemble_prob"]

    @property
    def collapse_gap(self) -> float:
        """What averaging the experts into a dense model costs against the ensemble."""
        return self.losses["average"] - self.losses["ensemble_prob"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        derived = ("spread", "ensemble_gain", "collapse_gap")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        width = max(map(len, self.losses))
        lines = [f"loss over {self.labels} labels"]
        lines += [f"  {mode.ljust(width)}  {loss:.4f}" for mode, loss in self.losses.items()]
        lines.append(
            f"spread of single experts {self.spread:.4f}, ensemble gain {self.ensemble_gain:.4f}, "
            f"collapse gap {self.collapse_gap:.4f}"
        )
        lines.append(f"disagreement of experts {self.disagreement:.4g} per label")
        lines += [
            f"  {name}: mean cosine between weights of experts {cosine:.4f}"
            for name, cosine in self.similarity.items()
        ]
        return "\n".join(lines)


@torch.no_grad()
def thor_report(model: nn.Module, batches: Batches) -> ThorReport:
    """Measure all deterministic inference modes of a THOR model, in evaluation.

    Args:
        model: a THOR model; its mode stays what it was.
        batches: one batch or several with "labels", as the model's forward takes them.

    Raises:
        DataError: no batch, or one without labels.
        ModelError: the model has no stochastic experts, or its labels are of a kind that THOR has
            no loss for.
    """
    given = as_list(batches)
    if not given or any(batch.get("labels") is None for batch in given):
        raise DataError("thor_report compares losses; give batches with labels")
    passes, host = passes_of(model), base_model(model)
    single = [f"fixed:{k}" for k in range(passes.chooser.num_experts)]
    others = ["ensemble_layer", "ensemble_prob", "average"]
    totals: dict[str, float] = dict.fromkeys([*single, *others], 0.0)
    apart, count = 0.0, 0
    for batch in given:
        inputs, labels = without_labels(host, dict(batch)), batch["labels"]
        with _in_mode(host, passes, "fixed:0"):
            if has_shift(labels) and passes.predicts_next is None:
                passes.learn_shift(host, host(**batch), labels)
        found = {mode: _logits(host, passes, mode, inputs) for mode in totals}
        shift = passes.predicts_next
        together = Objective().loss(host, [found[mode] for mode in single], labels, shift)
        apart, count = apart + float(together.disagreement), count + together.count
        for mode, error in zip(single, together.errors.tolist(), strict=True):
            totals[mode] += error
        for mode in others:
            totals[mode] += float(Objective().loss(host, [found[mode]], labels, shift).total)
    if not count:
        raise DataError("no position of the batches has a label")
    losses = {mode: total / count for mode, total in totals.items()}
    return ThorReport(losses, count, apart / count, _similarity(host))


def _logits(host: nn.Module, passes: Passes, mode: str, inputs: Mapping[str, Any]) -> Tensor:
    with _in_mode(host, passes, mode):
        return logits_of(host, host(**inputs)).float()


@contextmanager
def _in_mode(host: nn.Module, passes: Passes, mode: str) -> Iterator[None]:
    chooser = passes.chooser
    before = chooser.mode, chooser.seed
    chooser.set_mode(mode, chooser.seed)
    try:
        with evaluating(host):
            yield
    finally:
        chooser.set_mode(*before)


def _similarity(model: nn.Module) -> dict[str, float]:
    """Mean cosine between the weights of two experts, by the layer's first projection."""
    layers: dict[int, list[tuple[str, list[Tensor]]]] = {}
    for name, projection in stochastic_projections(model).items():
        weights = [weight_of(base_of(e)).flatten().float() for e in projection.experts]
        layers.setdefault(projection.layer, []).append((name, weights))
    found = {}
    for parts in layers.values():
        experts = [torch.cat(pieces) for pieces in zip(*(w for _, w in parts), strict=True)]
        pairs = list(itertools.combinations(experts, 2))
        if pairs:
            cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
            found[parts[0][0]] = float(torch.stack(cosines).mean())
    return found
