"""Our architectures in transformers' Auto classes, without remote code.

`import moduli` is enough, and imports nothing of transformers: it is told of configurations as soon
as its Auto classes are there, and the first configuration brings its models along.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from moduli.on_import import on_import


def install() -> None:
    """Register configurations now, or when transformers' Auto classes are imported."""
    on_import("transformers.models.auto.configuration_auto", _configurations)


def _configurations(auto: ModuleType) -> None:
    from moduli.models.moduleformer import ModuleFormerConfig

    auto.AutoConfig.register(ModuleFormerConfig.model_type, ModuleFormerConfig, exist_ok=True)


@cache
def register_moduleformer() -> None:
    """The models of ModuleFormer, and how their tensors are called."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GPT2Tokenizer,
    )

    from moduli.models.moduleformer import (
        ModuleFormerConfig,
        ModuleFormerForCausalLM,
        ModuleFormerForSequenceClassification,
        ModuleFormerModel,
    )
    from moduli.models.moduleformer.naming import register_names

    register_names()
    for auto, ours in (
        (AutoModel, ModuleFormerModel),
        (AutoModelForCausalLM, ModuleFormerForCausalLM),
        (AutoModelForSequenceClassification, ModuleFormerForSequenceClassification),
        # Byte-level BPE of GPT-2 with more spaces, which the published checkpoints have.
        (AutoTokenizer, GPT2Tokenizer),
    ):
        auto.register(ModuleFormerConfig, ours, exist_ok=True)
