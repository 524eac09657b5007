"""Fitting the routers of a MoEfied model to what its experts really carry.

The target is the positive activation of every expert on the inputs that the dense model gives the
layer, divided by the length of the token: for an FFN without biases that is the score of the
unit-length token, which is what the router sees and what MoEfication's code takes; with biases,
the neurons that really fire still count. One layer is fitted at a time, so that only its inputs
are in memory.

Letters: T tokens, D width, E experts.
Source: MoEfication (Findings of ACL 2022), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.methods.base import Progress
from moduli.routing import GroundTruthRouter, MLPRouter
from moduli.surgery.inputs import Batches, as_list
from moduli.surgery.locate import FFN
from moduli.surgery.modular import dense, require_modular
from moduli.surgery.partition import observe
from moduli.surgery.seam import RoutedActivation
from moduli.training.router_fit import EXPERT_SHARE, RouterFit, captured_share, train_mlp_router


def fit_routers(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int = 30,
    batch_size: int | None = None,
    lr: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, RouterFit]:
    """Fit the routers of a model converted by MoEfication with select="mlp", in place.

    Conversion does it; call it again after the model was tuned, since its keys have moved.

    Args:
        model: modular.
        batches: keyword arguments of its forward, one batch or several.
        epochs: passes over nine tenths of the tokens; the others are held out.
        batch_size: tokens per step; None: see `MoEfication.router_batch_size`.
        lr: of Adam.
        seed: of the order of tokens.
        progress: called with a line of text per layer.

    Returns:
        How the fit went, by the name of the layer's FFN.

    Raises:
        ModelError: the model has no such router.
        DataError: fewer than 10 tokens, or nothing fires for them.
    """
    fitted = {}
    for name, layer in require_modular(model).items():
        if not (isinstance(layer, RoutedActivation) and isinstance(layer.router, MLPRouter)):
            continue
        x, scores = carried(model, layer, batches)
        layer.router.requires_grad_(True)
        try:
            with torch.enable_grad():  # whoever converts may have no use for gradients
                fit = train_mlp_router(
                    layer.router,
                    x,
                    scores,
                    generator=torch.Generator().manual_seed(seed + layer.ffn.index),
                    epochs=epochs,
                    batch_size=batch_size or max(32, min(512, len(x) // 64)),
                    lr=lr,
                )
        finally:
            layer.router.requires_grad_(False)
        fitted[name] = fit
        if progress is not None:
            k = max(1, int(layer.num_experts * EXPERT_SHARE))
            progress(
                f"{name}: {k} of {layer.num_experts} experts capture {fit.best:.1%} of the "
                f"positive activation, {fit.start:.1%} before the fit, "
                f"{captured_share(scores, scores, k):.1%} at most"
            )
    if not fitted:
        raise ModelError(
            f"this {type(model).__name__} has no router to fit; convert it by "
            'MoEfication(select="mlp")'
        )
    return fitted


def carried(model: nn.Module, layer: RoutedActivation, batches: Batches) -> tuple[Tensor, Tensor]:
    """Inputs [T, D] of a layer in the dense model, and what its experts carry for them [T, E].

    Args:
        model: modular.
        layer: one of its layers.
        batches: keyword arguments of its forward.
    """
    ffn = layer.ffn
    truth = GroundTruthRouter(ffn.keys, layer.sizes, layer.router.rule, activation=layer.activation)
    inputs: list[Tensor] = []
    scores: list[Tensor] = []

    def see(_: FFN, x: Tensor, z: Tensor) -> None:
        z = z if layer.order is None else z[:, layer.order]
        length = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        inputs.append(x)
        scores.append(truth.from_preactivations(z) / length)

    with dense(model):
        observe(model, [ffn], as_list(batches), see)
    return torch.cat(inputs), torch.cat(scores)
