"""THOR: experts chosen at random, and passes that are to agree.

1. Every second FFN of each stack becomes N copies of itself. There is no router.
2. A training step passes over its batch twice. In each pass every layer draws one expert, for the
   whole batch; what is not drawn is not computed and not trained.
3. The loss is the cross-entropy of both passes and alpha times how far their predictions are
   apart, so that the experts come to say the same and any of them can be used alone.

With one expert the passes differ by dropout alone: that is R-Drop (arXiv 2106.14448). Letters: K
passes, L layers with experts, N experts.
Source: THOR (arXiv 2110.04260), microsoft/Stochastic-Mixture-of-Experts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from moduli.errors import ConfigError
from moduli.losses.consistency import Smoothing
from moduli.methods.base import Method, Progress, settle
from moduli.methods.thor.chooser import ThorChooser, check_mode
from moduli.methods.thor.objective import Objective
from moduli.methods.thor.passes import Passes, hang_in
from moduli.methods.thor.plan import Pair, RoutingPlan, draw_plan
from moduli.methods.thor.trainer import follow_trainer
from moduli.surgery.alignment import align_parameters
from moduli.surgery.conversion import laid_out
from moduli.surgery.convert import require_dense, set_layout
from moduli.surgery.inputs import Batches
from moduli.surgery.layers import choose_layers
from moduli.surgery.layout import CopiesLayout, Layout
from moduli.surgery.locate import FFN, find_ffns, survey
from moduli.surgery.report import ConversionReport, LayerReport
from moduli.surgery.stochastic import copy_projections, perturb


@dataclass(frozen=True)
class THOR(Method):
    """Settings of THOR.

    Attributes:
        num_experts: N; 1 is R-Drop.
        layers: "even" (FFNs 0, 2, 4, ... of each stack), "all", "last:2", "first:2", "every:2", a
            list of indices, or name patterns.
        preset: "paper" is the run script of the reference: alpha 5, label smoothing 0.1, an expert
            per sentence in evaluation.
        alpha: weight of the consistency loss; None: 1, as the preset says, or 0 for one pass.
        passes: K over each batch in a training step.
        pair: "independent" passes may draw the same expert; "distinct" ones never do.
        label_smoothing: share of the target's mass that other classes get; None: 0 or as the
            preset says.
        smoothing_style: whether that mass goes to the other classes ("fairseq") or to all
            ("torch").
        noise: standard deviation of Gaussian noise on the copies' weights at conversion, in units
            of that of each weight.
        inference: how the model evaluates: "average", "fixed:0", "ensemble_layer",
            "ensemble_prob", "random_sentence", "random_token", "random_position" or
            "random_batch"; None: "average" or as the preset says. `set_inference` changes it.
        seed: of the routing plan, of the noise and of random modes.
        inference_seed: of random modes, where it is another one.
    """

    name: ClassVar[str] = "thor"
    summary: ClassVar[str] = "copies of FFNs drawn at random, passes that are to agree (THOR)"
    routes: ClassVar[bool] = False

    num_experts: int = 2
    layers: str | Sequence[int] | Sequence[str] = "even"
    preset: Literal["paper"] | None = None
    alpha: float | None = None
    passes: int = 2
    pair: Pair = "independent"
    label_smoothing: float | None = None
    smoothing_style: Smoothing = "fairseq"
    noise: float = 0.0
    inference: str | None = None
    seed: int = 0
    inference_seed: int | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.preset not in (None, "paper"):
            raise ConfigError(f"preset is {self.preset!r}; it may be 'paper' or None")
        if self.passes < 1:
            raise ConfigError(f"passes is {self.passes}; at least 1 is needed, THOR has 2")
        if self.alpha is not None and not self.alpha >= 0:
            raise ConfigError(
                f"alpha is {self.alpha}; it has to be 0 or more, since a negative one would "
                "reward passes that disagree"
            )
        if self.alpha and self.passes == 1:
            raise ConfigError(
                f"alpha is {self.alpha}, but one pass has none to agree with; set passes=2, or "
                "alpha=0"
            )
        if self.pair not in ("independent", "distinct"):
            raise ConfigError(f"pair is {self.pair!r}; it may be 'independent' or 'distinct'")
        if self.pair == "distinct" and self.num_experts < self.passes:
            raise ConfigError(
                f"pair='distinct' needs an expert for each of the {self.passes} passes, but "
                f"num_experts is {self.num_experts}; use pair='independent'"
            )
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; it is a share, in [0, 1)"
            )
        if self.smoothing_style not in ("fairseq", "torch"):
            raise ConfigError(
                f"smoothing_style is {self.smoothing_style!r}; it may be 'fairseq' or 'torch'"
            )
        if not self.noise >= 0:
            raise ConfigError(f"noise is {self.noise}; it has to be 0 or more")
        if self.inference is not None:
            check_mode(self.inference, self.num_experts)

    @property
    def objective(self) -> Objective:
        """The loss, with what the preset says."""
        paper = self.preset == "paper"
        alpha = (5.0 if paper else 1.0) if self.alpha is None else self.alpha
        smoothing = self.label_smoothing
        return Objective(
            alpha=alpha if self.passes > 1 else 0.0,
            label_smoothing=(0.1 if paper else 0.0) if smoothing is None else smoothing,
            smoothing_style=self.smoothing_style,
        )

    @property
    def mode(self) -> str:
        """The inference mode, with what the preset says."""
        usual = "random_sentence" if self.preset == "paper" else "average"
        return usual if self.inference is None else self.inference

    def apply(
        self,
        model: nn.Module,
        *,
        batch: Batches | None = None,
        progress: Progress | None = None,
    ) -> ConversionReport:
        """Copy FFNs and let the model make its passes; see `moduli.convert`."""
        started = time.monotonic()
        require_dense(model)
        found, skipped = find_ffns(model), survey(model)[1]
        chosen = choose_layers(found, self.layers)
        before = sum(p.numel() for p in model.parameters())
        for ffn in chosen if progress else ():
            assert progress is not None
            progress(f"{ffn.name}: {self.num_experts} copies")
        entries = [CopiesLayout(ffn.name, self.num_experts) for ffn in chosen]
        self._install(model, chosen, Layout(self.name, self.to_dict(), entries))
        if self.noise:
            perturb(model, self.noise, self.seed)
        return ConversionReport(
            method=self.name,
            num_experts=self.num_experts,
            top_k=1,
            layers=[
                LayerReport(ffn.name, ffn.width, (ffn.width,) * 2, None, None, 1.0, "copies")
                for ffn in chosen
            ],
            total_ffns=len(found),
            probe="",
            added_parameters=sum(p.numel() for p in model.parameters()) - before,
            seconds=time.monotonic() - started,
            skipped=[(r.name, r.reason) for r in skipped],
        )

    def restore(self, model: nn.Module, layout: Layout, permuted: bool) -> None:
        """Copy the FFNs of a model that was read from a checkpoint; weights are loaded later."""
        self._install(model, laid_out(model, layout), layout)

    def _install(self, model: nn.Module, ffns: list[FFN], layout: Layout) -> None:
        seed = self.seed if self.inference_seed is None else self.inference_seed
        chooser = ThorChooser(self.num_experts, self.mode, seed)
        copy_projections(ffns, self.num_experts, chooser)
        align_parameters(model)
        draw = functools.partial(_plan, self.seed, len(ffns), self.num_experts, self.pair)
        smooths = self.label_smoothing is not None or self.preset is not None
        hang_in(model, Passes(chooser, self.objective, draw, self.passes, smooths))
        set_layout(model, layout)
        follow_trainer()


def _plan(
    seed: int, layers: int, num_experts: int, pair: Pair, step: int, micro: int, passes: int
) -> RoutingPlan:
    return draw_plan(
        seed, step, micro, layers=layers, num_experts=num_experts, passes=passes, pair=pair
    )
