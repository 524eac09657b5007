"""moduli: modular transformers, end to end.

    model = AutoModelForSequenceClassification.from_pretrained(path)
    report = moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4, layers="last:2"))
    ...                                  # train it with the stock Trainer
    moduli.merge(model)                  # dense again
    model.save_pretrained(directory)     # an ordinary checkpoint

Everything is imported when it is first used; methods are found by name in `moduli.methods`. The one
thing that importing does is to offer "moduli" in transformers' experts interface (`registration`)
and our own architectures in its Auto classes (`models.registration`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moduli.errors import ModuliError
from moduli.models.registration import install as _install_models
from moduli.registration import install as _install_experts
from moduli.version import __version__

if TYPE_CHECKING:
    from moduli.inspect.inspecting import inspect_model
    from moduli.inspect.watching import watch
    from moduli.methods.api import convert, load
    from moduli.methods.emoe import EMoE
    from moduli.methods.registry import register
    from moduli.methods.thor.inference import set_inference, thor_report
    from moduli.models.editing import expert_use, extend, prune
    from moduli.parallel import GatingDropout, gating_dropout
    from moduli.registration import register_experts
    from moduli.surgery.checkpoint import save
    from moduli.surgery.compose import compose
    from moduli.surgery.convert import set_top_k
    from moduli.surgery.export import export
    from moduli.surgery.merge import merge
    from moduli.surgery.modular import dense, is_modular
    from moduli.training.auxiliary import auxiliary_loss

_VERBS = {
    "GatingDropout": "moduli.parallel",
    "auxiliary_loss": "moduli.training.auxiliary",
    "compose": "moduli.surgery.compose",
    "convert": "moduli.methods.api",
    "dense": "moduli.surgery.modular",
    "expert_use": "moduli.models.editing",
    "export": "moduli.surgery.export",
    "extend": "moduli.models.editing",
    "gating_dropout": "moduli.parallel",
    "inspect_model": "moduli.inspect.inspecting",
    "is_modular": "moduli.surgery.modular",
    "load": "moduli.methods.api",
    "merge": "moduli.surgery.merge",
    "prune": "moduli.models.editing",
    "register": "moduli.methods.registry",
    "register_experts": "moduli.registration",
    "save": "moduli.surgery.checkpoint",
    "set_inference": "moduli.methods.thor.inference",
    "set_top_k": "moduli.surgery.convert",
    "thor_report": "moduli.methods.thor.inference",
    "watch": "moduli.inspect.watching",
}

__all__ = [
    "EMoE",
    "GatingDropout",
    "ModuliError",
    "__version__",
    "auxiliary_loss",
    "compose",
    "convert",
    "dense",
    "expert_use",
    "export",
    "extend",
    "gating_dropout",
    "inspect_model",
    "is_modular",
    "load",
    "merge",
    "prune",
    "register",
    "register_experts",
    "save",
    "set_inference",
    "set_top_k",
    "thor_report",
    "watch",
]

_install_experts()
_install_models()


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    if name[:1].isupper():
        from moduli.methods.registry import class_named

        found = class_named(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'moduli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
