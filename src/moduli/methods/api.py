"""The verbs that need to know methods: `moduli.convert` and `moduli.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from moduli.errors import ConfigError
from moduli.methods.base import Method, Progress
from moduli.methods.registry import get_method
from moduli.surgery.convert import base_model, set_top_k
from moduli.surgery.inputs import Batches
from moduli.surgery.modular import is_modular
from moduli.surgery.reading import load_own, read
from moduli.surgery.report import ConversionReport
from moduli.training.auxiliary import wire_auxiliary_loss
from moduli.training.resume import guard_trainer_resume


def convert(
    model: nn.Module,
    method: Method | type[Method] | str,
    *,
    batch: Batches | None = None,
    progress: Progress | None = None,
) -> ConversionReport | None:
    """Apply a method to a model, in place.

    Args:
        model: a dense transformers model; it keeps its class, its modules and their names. It may
            carry LoRA, DoRA or IA3 adapters of PEFT, which are converted with it.
        method: a config such as `moduli.EMoE(num_experts=16, top_k=4)`, its class, or its name
            (defaults).
        batch: keyword arguments of the model's forward; output errors in the report are measured
            on them, otherwise on random inputs. Methods that look at data take several batches
            as well, as a list.
        progress: called with a line of text per step.

    Returns:
        A report to print; None for methods that change nothing in the model.

    Raises:
        ModelError: no FFN that fits, or the model is modular already.
        ConfigError: settings that cannot work for this model.
        UnknownNameError: no method of that name.
    """
    host = base_model(model)
    report = as_method(method).apply(host, batch=batch, progress=progress)
    _wire(host)
    return report


def _wire(model: nn.Module) -> None:
    """What training has to know of a freshly converted model."""
    wire_auxiliary_loss(model)
    if is_modular(model):
        guard_trainer_resume()


def as_method(method: Method | type[Method] | str) -> Method:
    """A config from a config, a class or a name.

    Raises:
        ConfigError: it is none of the three.
        UnknownNameError: no method of that name.
    """
    if isinstance(method, str):
        return get_method(method)()
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    if isinstance(method, Method):
        return method
    raise ConfigError(
        f"method is {method!r}; expected a config such as moduli.EMoE(), its class or its name"
    )


def load(directory: str | Path) -> Any:
    """Bring a saved model back, modular as it was.

    Args:
        directory: written by `moduli.save`, or by bare `save_pretrained` of a modular model
            (Trainer checkpoints are).

    Returns:
        The model, in evaluation mode; its outputs are those of the saved one bit for bit.

    Raises:
        CheckpointError: missing, truncated, pickle only, changed since it was written, or made
            by a method that is not there.
    """
    stored = read(directory)
    if stored.layout is not None:
        method = get_method(stored.layout.method).from_dict(stored.layout.config)
        method.restore(stored.model, stored.layout, stored.permuted)
        _wire(stored.model)
        load_own(stored.model, stored.own)
        if stored.layout.top_k is not None:
            set_top_k(stored.model, stored.layout.top_k)
    return stored.model.eval()
