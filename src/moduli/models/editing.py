"""The verbs that change the experts of a whole model: `moduli.extend` and `moduli.prune`.

    report = moduli.extend(model, attention=2, feed_forward=4)     # then train it: only these learn
    report = moduli.prune(model, moduli.expert_use(model, batches), keep=0.5)

They find out what kind of model it is; how it is done is described with that kind:
`moduli.models.moduleformer.growing`, `.pruning` and `.usage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moduli.errors import ModelError

if TYPE_CHECKING:
    import torch

    from moduli.models.moduleformer.growing import ExtendReport, Start
    from moduli.models.moduleformer.pruning import By, ModuleFormerPruneReport
    from moduli.models.moduleformer.usage import Batch, ExpertUse

_KINDS = {"moduleformer": "moduli.models.moduleformer"}
"""By `model_type` of the configuration, where the functions are."""


def extend(
    model: Any,
    *,
    attention: int = 0,
    feed_forward: int = 0,
    start: Start = "fresh",
    use: ExpertUse | None = None,
    noise: float = 0.0,
    leak: float = 1e-3,
    batches: Sequence[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> ExtendReport:
    """Add experts to every layer, in place, and freeze everything else: only they are trained
    from then on.

    Args:
        model: a ModuleFormer.
        attention: new attention experts of every layer.
        feed_forward: new feed-forward experts of every layer.
        start: "fresh": drawn as those of a new model; "copy": copies of experts; "closed": fresh,
            with rows by which routers hardly ever choose them.
        use: with start="copy", what `expert_use` found: the least probable experts are copied.
            None: the first ones.
        noise: with start="copy", standard deviation of what is added to copies, in units of theirs.
        leak: with start="closed", the share of probability that new experts may take at a router.
        batches: keyword arguments of the model's forward, to measure on what new experts take of
            the probability, and to close them by; None: random vectors.
        generator: of new parameters and random vectors, on the CPU; None is torch's own.

    Returns:
        A report to print.

    Raises:
        ModelError: there is no way to add experts to such a model.
        ConfigError: settings that cannot work.
        UnknownNameError: there is no such start.
    """
    where = where_of(model, "extend")
    report: ExtendReport = import_module(f"{where}.growing").extend(
        model,
        attention=attention,
        feed_forward=feed_forward,
        start=start,
        use=use,
        noise=noise,
        leak=leak,
        batches=batches,
        generator=generator,
    )
    return report


def prune(
    model: Any,
    use: ExpertUse,
    *,
    keep: int | float | None = None,
    by: By = "frequency",
    per_layer: bool = False,
    threshold: float | None = None,
) -> ModuleFormerPruneReport:
    """Cut out experts that given data hardly uses, in place.

    Args:
        model: a ModuleFormer.
        use: what `expert_use` found on the data.
        keep: how much stays of each kind of experts: a float up to 1 is a share, rounded up, a
            whole number above 1 (or an int) their number in a layer.
        by: rank experts by "frequency", with which they are chosen, or by "mass", the probability
            with which they are.
        per_layer: rank the experts of all layers together; otherwise every layer keeps as many.
        threshold: instead of `keep`: those stay whose statistic is not below it.

    Returns:
        A report to print.

    Raises:
        ModelError: there is no way to take experts out of such a model.
        ConfigError: settings that cannot work.
        UnknownNameError: there is no such statistic.
    """
    where = where_of(model, "prune")
    report: ModuleFormerPruneReport = import_module(f"{where}.pruning").prune(
        model, use, keep=keep, by=by, per_layer=per_layer, threshold=threshold
    )
    return report


def expert_use(
    model: Any, batches: Iterable[Batch], *, on_batch: Callable[[int], None] | None = None
) -> ExpertUse:
    """How much a model uses each of its experts.

    Args:
        model: a ModuleFormer; it is run in evaluation mode.
        batches: keyword arguments of its forward, one after the other; labels are not looked at.
        on_batch: called with the tokens seen so far.

    Raises:
        ModelError: this cannot be measured for such a model.
        DataError: there are no tokens.
    """
    where = where_of(model, "expert_use")
    use: ExpertUse = import_module(f"{where}.usage").expert_use(model, batches, on_batch=on_batch)
    return use


_INSTEAD = {
    "extend": "`moduli convert` makes experts of the FFNs of others",
    "prune": "`moduli compare --pruned` prunes models that moduli has split, and compares",
    "expert_use": "`moduli inspect` shows the load of others",
}


def where_of(model: Any, verb: str, name: str = "") -> str:
    """The package with the functions for a kind of model.

    Args:
        model: anything with a `config`, or a configuration.
        verb: that is asked for.
        name: what the user calls the model.

    Raises:
        ModelError: there are none.
    """
    kind = getattr(getattr(model, "config", model), "model_type", None)
    if kind not in _KINDS:
        given = f"{name or type(model).__name__} is {f'a {kind} model' if kind else 'none'}"
        raise ModelError(f"{verb} is for ModuleFormer models, and {given}; {_INSTEAD[verb]}")
    return _KINDS[kind]
