"""The hooks by which a model makes its passes: several in training, one per expert in an ensemble.

In training with labels the batch stands K times in one pass, every block of rows with experts of
its own. What comes back has the rows of the first pass and the whole loss, so that an ordinary loop
(`model(**batch).loss.backward()`) trains it. Without labels a training forward is a single pass
with experts of its own, for losses made outside.

In evaluation the inference mode says what happens; see `moduli.methods.thor.chooser`. Letters: B
rows, K passes, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.methods.thor.batches import (
    carry_copies,
    first_rows,
    named_arguments,
    repeated,
    require_padding_token,
    row_count,
    takes,
)
from moduli.methods.thor.chooser import ThorChooser
from moduli.methods.thor.objective import Objective, found_shift, has_shift, without_labels
from moduli.methods.thor.outputs import logits_of, loss_of, mean_prediction, with_loss
from moduli.methods.thor.plan import RoutingPlan
from moduli.methods.thor.sentences import cache_in, note, noted, sentences_in
from moduli.surgery.modular import HostHook, ModelHook
from moduli.surgery.recall import recall_in_backward
from moduli.training.auxiliary import LossHook


@dataclass(frozen=True)
class StepRecord:
    """What the last training forward with labels was.

    Attributes:
        plan: its experts.
        errors: [K] cross-entropy of each pass in nats, or squared error; sum over the labels.
        disagreement: how far the passes were apart (nats); sum over the labels.
        count: labels, counted once.
    """

    plan: RoutingPlan
    errors: Float[Tensor, " K"]
    disagreement: Float[Tensor, ""]
    count: int


@dataclass(frozen=True)
class _Pending:
    """A pass that runs: how often the batch of `rows` stands in it, and what its loss needs."""

    times: int
    rows: int
    labels: Tensor | None
    items: Any


class Passes:
    """State of a model's passes.

    Args:
        chooser: names the experts of the layers.
        objective: the loss in training.
        draw: makes the plan of (step, micro-step, number of passes).
        passes: K.
        smooths: whether the method's settings say how labels are smoothed.
    """

    def __init__(
        self,
        chooser: ThorChooser,
        objective: Objective,
        draw: Callable[[int, int, int], RoutingPlan],
        passes: int,
        smooths: bool,
    ) -> None:
        self.chooser, self.objective, self.draw, self.passes = chooser, objective, draw, passes
        self.smooths = smooths
        self.step = self.micro = 0  # of the next training forward
        self.last: StepRecord | None = None
        self.predicts_next: bool | None = None  # not known before the model made a loss itself
        self.inside = False  # the host's forward runs
        self._pending: _Pending | None = None

    def start_step(self, step: int) -> None:
        """The next training forward is the first of this optimiser step."""
        self.step, self.micro = step, 0

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the host: draw experts, repeat the batch."""
        if getattr(model, "_is_replica", False):
            raise ModelError(
                "nn.DataParallel runs copies of a model in threads, which experts do not support; "
                "start one process per device instead (torchrun)"
            )
        self.inside, self._pending = True, None
        self.chooser.start_pass()
        arguments = named_arguments(model, args, kwargs)
        labels, items = arguments.get("labels"), arguments.pop("num_items_in_batch", None)
        if model.training:
            learns = labels is not None and torch.is_grad_enabled()
            times = self.passes if learns else 1
            self.chooser.plan = self.draw(self.step, self.micro, times)
            self.micro += 1
        else:
            self.chooser.plan = None
            times = self.chooser.copies
            learns = self.chooser.ensemble = times > 1
            self._read(model, arguments)
            carry_copies(arguments.get("past_key_values"), times)
        if not learns:
            if items is None or takes(model, "num_items_in_batch"):
                return None
            return (), arguments
        rows = row_count(model, arguments)
        if rows == 1 and times > 1:
            require_padding_token(model)
        if labels is not None and not (has_shift(labels) and self.predicts_next is None):
            arguments = without_labels(model, arguments)
        self._pending = _Pending(times, rows, labels, items)
        return (), repeated(arguments, rows, times)

    def after(self, model: nn.Module, output: Any) -> Any:
        """Forward hook of the host: the loss, and the rows that were asked for."""
        pending, plan = self._pending, self.chooser.plan
        self.inside, self._pending = False, None
        then = self.chooser.snapshot()
        self.chooser.ensemble, self.chooser.plan = False, None
        if plan is None and self.chooser.mode == "random_sentence":
            self._note(model, output)
        if output is None:  # the forward has raised
            return None
        if pending is None:
            if plan is not None:
                self._single(model, output, then)
            return None
        if plan is not None:
            recall_in_backward(output, self.chooser, then)
        logits = logits_of(model, output)
        passes = list(logits.chunk(pending.times))
        rest = first_rows(output, pending.rows, pending.times)
        if plan is None:
            passes = [mean_prediction(model, passes)]
        loss = None
        if pending.labels is not None:
            self.learn_shift(model, output, pending.labels)
            objective = Objective() if plan is None else self.objective
            made = objective.loss(model, passes, pending.labels, self.predicts_next)
            items = max(made.count, 1) if pending.items is None else pending.items
            loss = made.total / torch.as_tensor(items, device=made.total.device)
            if plan is not None:
                self.last = StepRecord(plan, made.errors, made.disagreement, made.count)
        return with_loss(rest, passes[0], loss, keep_cache=plan is None)

    def learn_shift(self, model: nn.Module, output: Any, labels: Tensor) -> None:
        """See from a loss that the model made itself at which position it wants its labels."""
        if has_shift(labels) and self.predicts_next is None:
            self.predicts_next = found_shift(logits_of(model, output), labels, loss_of(output))

    def before_encoder(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Forward pre-hook of an encoder: it may be called alone, as `generate` does."""
        if encoder.training:
            return None
        arguments = named_arguments(encoder, args, kwargs)
        if self.chooser.mode == "random_sentence":
            self.chooser.sentences = sentences_in(encoder, arguments)
        times = self.chooser.copies
        if not self.inside:
            self.chooser.start_pass()
        if self.inside or times == 1:
            return None
        self.chooser.ensemble = True
        return (), repeated(arguments, row_count(encoder, arguments), times)

    def after_encoder(self, encoder: nn.Module, output: Any) -> None:
        """Forward hook of an encoder."""
        self.chooser.ensemble = self.inside and self.chooser.ensemble
        if output is not None and not encoder.training and self.chooser.sentences is not None:
            note(output[0], self.chooser.sentences)
            self.chooser.encoded = output[0]

    def _read(self, model: Any, arguments: dict[str, Any]) -> None:
        """Find the sentences that a pass of evaluation goes on with, or begins to read."""
        if self.chooser.mode != "random_sentence":
            return
        cache, encoded = arguments.get("past_key_values"), arguments.get("encoder_outputs")
        if cache is not None and cache.get_seq_length() > 0:
            self.chooser.sentences = noted(cache)
        elif not getattr(model.config, "is_encoder_decoder", False):
            self.chooser.sentences = sentences_in(model, arguments)
        elif encoded is not None and noted(encoded[0]) is not None:
            self.chooser.sentences = noted(encoded[0])
        elif encoded is not None and not _repeats(encoded[0], self.chooser.encoded):
            self.chooser.sentences = None  # of an encoder that has read something else since
        # Else its encoder reads them now; or has just done so, and beams repeat what it made.
        self.chooser.encoded = None

    def _note(self, model: Any, output: Any) -> None:
        """Leave the sentences of this pass to those that go on with its cache."""
        cache = cache_in(output)
        if cache is not None:
            note(cache, self.chooser.sentences)
        if not getattr(model.config, "is_encoder_decoder", False):
            self.chooser.sentences = None

    def _single(self, model: nn.Module, output: Any, then: dict[str, Any]) -> None:
        """A training forward without labels: its backward recalls the plan."""
        made_loss = isinstance(output, dict) and output.get("loss") is not None
        if made_loss and torch.is_grad_enabled():
            raise ModelError(
                f"this {type(model).__name__} made a loss without `labels`, which THOR cannot "
                "take over; give labels, or compute the loss from the outputs of your own passes "
                "with moduli.losses.consistency"
            )
        recall_in_backward(output, self.chooser, then)


def _repeats(encoded: Tensor, last: Tensor | None) -> bool:
    """Whether every row of it stands in `last`, once or, next to each other, several times."""
    if last is None or not len(last) or len(encoded) % len(last):
        return False
    return torch.equal(encoded, last.repeat_interleave(len(encoded) // len(last), dim=0))


class BeforeModel(LossHook):
    """Forward pre-hook of the host."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    @contextmanager
    def smooth_labels(self, share: float) -> Iterator[None]:
        """See `LossHook`."""
        own = self.passes.objective
        if not self.passes.smooths:
            self.passes.objective = replace(own, label_smoothing=share)
        try:
            yield
        finally:
            self.passes.objective = own

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.passes.before(model, args, kwargs)


class AfterModel(HostHook):
    """Forward hook of the host, called after an exception as well."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, model: nn.Module, args: object, kwargs: object, output: Any) -> Any:
        return self.passes.after(model, output)


class BeforeEncoder(ModelHook):
    """Forward pre-hook of an encoder that has a decoder beside it."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.passes.before_encoder(encoder, args, kwargs)


class AfterEncoder(ModelHook):
    """Forward hook of that encoder, called after an exception as well."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, encoder: nn.Module, args: object, kwargs: object, output: Any) -> None:
        self.passes.after_encoder(encoder, output)


def hang_in(model: Any, passes: Passes) -> None:
    """Register the hooks on a model, and on its encoder if it has a decoder besides."""
    model.register_forward_pre_hook(BeforeModel(passes), with_kwargs=True, prepend=True)
    model.register_forward_hook(AfterModel(passes), with_kwargs=True, always_call=True)
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        encoder.register_forward_pre_hook(BeforeEncoder(passes), with_kwargs=True, prepend=True)
        encoder.register_forward_hook(AfterEncoder(passes), with_kwargs=True, always_call=True)


def start_step(model: nn.Module, step: int) -> None:
    """Say at which optimiser step a loop is, so that it draws the experts of that step from the
    first micro-step on. A `Trainer` does so by itself.

    Args:
        model: a THOR model, or what PEFT or DDP has made of it.
        step: from 0.

    Raises:
        ModelError: the model has no stochastic experts.
    """
    passes_of(model).start_step(step)


def last_step(model: nn.Module) -> StepRecord | None:
    """What the last training forward with labels was; None before the first.

    Raises:
        ModelError: the model has no stochastic experts.
    """
    return passes_of(model).last


def passes_of(model: nn.Module) -> Passes:
    """The state of the passes of a THOR model, or of the one that PEFT or DDP wraps.

    Raises:
        ModelError: it is none.
    """
    for module in model.modules():
        for hook in list[object](module._forward_pre_hooks.values()):
            if isinstance(hook, BeforeModel):
                return hook.passes
    raise ModelError(
        f"this {type(model).__name__} has no stochastic experts; "
        "moduli.convert(model, moduli.THOR()) makes them"
    )
