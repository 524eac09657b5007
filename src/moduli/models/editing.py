"""The verbs that change the experts of a whole model: `moduli.extend` and `moduli.prune`.

    report = moduli.extend(model, attention=2, feed_forward=4)     # then train it: only these learn
    report = moduli.prune(model, moduli.expert_use(model, batches), keep=0.5)

They find out what kind of model it is; what they take and do is described with that kind:
`moduli.models.moduleformer.growing.extend`, `.pruning.prune` and `.usage.expert_use`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moduli.errors import ModelError

_KINDS = {"moduleformer": "moduli.models.moduleformer"}
"""By `model_type` of the configuration, where the functions are."""


def extend(model: Any, **settings: Any) -> Any:
    """Add experts to every layer, in place; only they are trained from then on.

    Args:
        model: a ModuleFormer.
        **settings: of `moduli.models.moduleformer.growing.extend`.

    Returns:
        A report to print.

    Raises:
        ModelError: there is no way to add experts to such a model.
        ConfigError: settings that cannot work.
    """
    where = where_of(model, "extend")
    return import_module(f"{where}.growing").extend(model, **settings)


def prune(model: Any, use: Any, **settings: Any) -> Any:
    """Cut out experts that given data hardly uses, in place.

    Args:
        model: a ModuleFormer.
        use: what `expert_use` found on the data.
        **settings: of `moduli.models.moduleformer.pruning.prune`.

    Returns:
        A report to print.

    Raises:
        ModelError: there is no way to take experts out of such a model.
        ConfigError: settings that cannot work.
    """
    where = where_of(model, "prune")
    return import_module(f"{where}.pruning").prune(model, use, **settings)


def expert_use(model: Any, batches: Any, **settings: Any) -> Any:
    """How much a model uses each of its experts.

    Args:
        model: a ModuleFormer.
        batches: keyword arguments of its forward, one after the other.
        **settings: of `moduli.models.moduleformer.usage.expert_use`.

    Raises:
        ModelError: this cannot be measured for such a model.
    """
    where = where_of(model, "expert_use")
    return import_module(f"{where}.usage").expert_use(model, batches, **settings)


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
