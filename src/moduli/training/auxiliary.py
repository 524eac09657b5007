"""How the auxiliary losses of routed layers reach the loss that is minimised, exactly once.

Outside a `Trainer`, the loss that a model returns in training mode includes them, as it does for
the mixture-of-experts models of transformers. Inside one, the term is added to what the Trainer's
`compute_loss` returns, whoever computed it: the model, a label smoother, a `compute_loss_func` or
a subclass. There it is scaled so that a step of n micro-batches adds the mean of their terms, as
one large batch would: the Trainer divides a loss by n unless it was already normalised by
`num_items_in_batch`. Data-parallel averaging and loss scaling act on it like on the rest.

`Trainer.training_step` is wrapped for that, once, when the first model with an auxiliary loss is
converted, never at import; other models pass through unchanged. Evaluation does not see the term:
layers compute it in training mode only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.surgery.modular import HostHook, ModelHook, routed_layers
from moduli.surgery.routed import RoutedLayer

_MARK = "_moduli_adds_auxiliary_loss"


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Weighted sum of the auxiliary losses of the last training forward; None if there is none.

    For training loops of your own whose loss does not come from the model's output.

    Raises:
        ModelError: it was computed without gradients, as under reentrant checkpointing.
    """
    layers = list(routed_layers(model).values())
    if any(layer.lost_auxiliary for layer in layers):
        raise ModelError(
            "the auxiliary loss was computed without gradients and would be lost; gradient "
            "checkpointing must be non-reentrant "
            "(gradient_checkpointing_kwargs={'use_reentrant': False}, the default of transformers)"
        )
    terms = [
        layer.options.aux_weight * layer.auxiliary
        for layer in layers
        if layer.auxiliary is not None
    ]
    return torch.stack(terms).sum() if terms else None


class LossHook(HostHook):
    """Forward pre-hook of a model that makes its whole training loss itself, from `labels` and
    `num_items_in_batch`, so that nobody else may make one of its logits."""

    def smooth_labels(self, share: float) -> AbstractContextManager[None]:
        """Train so while it is entered, unless the model has a label smoothing of its own.

        Args:
            share: of the target's mass that the other classes get.
        """
        return nullcontext()


def loss_maker(model: nn.Module) -> LossHook | None:
    """The hook by which a model makes its own loss; None for most."""
    hooks: list[object] = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    return next((hook for hook in hooks if isinstance(hook, LossHook)), None)


def adds_own_losses(model: nn.Module) -> bool:
    """Whether a language model adds auxiliary losses to the one it returns, each by its share of
    the optimiser step: ModuleFormer with a weight for them."""
    config = getattr(model, "config", None)
    weights = ("aux_loss_weight", "concentration_weight")
    return any(bool(getattr(config, name, False)) for name in weights)


def with_stock_auxiliary(loss: Callable[..., Tensor] | None, model: nn.Module) -> Any:
    """A loss that is made of outputs and labels, and the auxiliary loss that mixtures of experts of
    transformers return if they are asked for what their routers say (`output_router_logits`).

    Args:
        loss: of (outputs, labels, number of labels in the whole step); None stays None.
        model: whose configuration has the weight.
    """
    config = getattr(model, "config", None)
    names = ("router_aux_loss_coef", "aux_loss_coef")
    weight = next((getattr(config, name) for name in names if hasattr(config, name)), 0.0)
    if loss is None or not weight or not getattr(config, "output_router_logits", False):
        return loss

    def both(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Any:
        made = loss(outputs, labels, num_items_in_batch)
        term = getattr(outputs, "aux_loss", None)
        if not isinstance(term, Tensor):
            return made
        # A step adds the mean over its labels, however many passes it takes.
        count = (labels[..., 1:] != -100).sum()
        share = 1.0 if num_items_in_batch is None else count / num_items_in_batch
        return made + weight * share * term.to(made.device)

    return both


def has_auxiliary(model: nn.Module) -> bool:
    """Whether any routed layer has an auxiliary loss."""
    return any(isinstance(m, RoutedLayer) and m.options.aux != "none" for m in model.modules())


class AddToOutput(ModelHook):
    """Forward hook of the whole model: adds the term to the loss of its output."""

    def __init__(self) -> None:
        self.paused = False  # a Trainer step is running, which adds the term itself

    def __call__(self, model: nn.Module, args: object, kwargs: object, output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        term = auxiliary_loss(model)
        if term is None:
            return None
        loss = _loss_in(output)
        if loss is None or self.paused:  # whoever makes the loss adds the term
            return _lead_to(term, output) if _distributed() else None
        loss = loss + term.to(loss.dtype)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output


def _loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output; in a tuple it is first, and the only scalar there."""
    if isinstance(output, tuple):
        first = output[0] if output else None
        return first if isinstance(first, Tensor) and first.dim() == 0 else None
    loss = output.get("loss") if isinstance(output, dict) else None
    return loss if isinstance(loss, Tensor) else None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _lead_to(term: Tensor, output: Any) -> Any:
    """The same output, from which the graph leads to the term as well.

    `DistributedDataParallel` takes parameters that it cannot reach from the model's output for
    unused, and fails when they get a gradient after all: those of a gate that only the auxiliary
    loss trains.
    """
    if isinstance(output, Tensor):
        return output + 0 * term.to(output.dtype) if output.requires_grad else output
    for key, value in output.items() if isinstance(output, dict) else enumerate(output):
        if isinstance(value, Tensor) and value.requires_grad:
            value = _lead_to(term, value)
            if isinstance(output, tuple):
                return (*output[:key], value, *output[key + 1 :])
            output[key] = value
            break
    return output


def wire_auxiliary_loss(model: nn.Module) -> None:
    """Make sure that the auxiliary losses of a freshly converted model are minimised."""
    if has_auxiliary(model):
        model.register_forward_hook(AddToOutput(), with_kwargs=True)
        _wrap_trainer()


def _hooks(model: nn.Module) -> list[AddToOutput]:
    hooks: list[object] = [h for m in model.modules() for h in m._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, AddToOutput)]


def _wrap_trainer() -> None:
    from transformers import Trainer

    original = Trainer.training_step
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def training_step(
        self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        hooks = _hooks(model)
        if not hooks:
            return original(self, model, inputs, num_items_in_batch)
        overridden = self.__dict__.get("compute_loss")
        compute = self.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
            term = auxiliary_loss(model)
            if term is not None:
                loss = loss + _share(self, num_items_in_batch) * term.to(loss.dtype)
            return loss if rest is None else (loss, *rest)

        for hook in hooks:
            hook.paused = True
        self.compute_loss = compute_loss
        try:
            return original(self, model, inputs, num_items_in_batch)
        finally:
            for hook in hooks:
                hook.paused = False
            if overridden is None:
                del self.compute_loss
            else:
                self.compute_loss = overridden

    setattr(training_step, _MARK, True)
    Trainer.training_step = training_step  # type: ignore[method-assign]


def _share(trainer: Any, num_items_in_batch: Any) -> float:
    """Weight of this micro-batch's term in what `compute_loss` returns."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_items or trainer.compute_loss_func is not None
    return 1.0 / trainer.current_gradient_accumulation_steps if scaled else 1.0
