"""ModuleFormer: a language model of attention experts and feed-forward experts.

    model = AutoModelForCausalLM.from_pretrained("ibm/MoLM-350M-4B")    # after `import moduli`

Letters: T tokens, D width, E experts, K experts per token.
Source: ModuleFormer (arXiv 2306.04640), IBM/ModuleFormer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moduli.models.moduleformer.classification import ModuleFormerForSequenceClassification
    from moduli.models.moduleformer.configuration import ModuleFormerConfig
    from moduli.models.moduleformer.modeling import ModuleFormerForCausalLM, ModuleFormerModel

_WHERE = {
    "ModuleFormerConfig": "configuration",
    "ModuleFormerForCausalLM": "modeling",
    "ModuleFormerForSequenceClassification": "classification",
    "ModuleFormerModel": "modeling",
}

__all__ = [
    "ModuleFormerConfig",
    "ModuleFormerForCausalLM",
    "ModuleFormerForSequenceClassification",
    "ModuleFormerModel",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
