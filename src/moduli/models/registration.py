"""Our architectures in transformers' Auto classes, without remote code.

`import moduli` is enough; nothing of transformers is imported for it.
"""

from __future__ import annotations

from types import ModuleType

from moduli.on_import import on_import

AUTO = "transformers.models.auto"


def install() -> None:
    """Register now, or as transformers' Auto classes are imported."""
    on_import(f"{AUTO}.configuration_auto", _configurations)
    on_import(f"{AUTO}.modeling_auto", _models)
    on_import(f"{AUTO}.tokenization_auto", _tokenizers)


def _configurations(auto: ModuleType) -> None:
    from moduli.models.moduleformer import ModuleFormerConfig

    auto.AutoConfig.register("moduleformer", ModuleFormerConfig, exist_ok=True)


def _models(auto: ModuleType) -> None:
    from moduli.models.moduleformer import (
        ModuleFormerConfig,
        ModuleFormerForCausalLM,
        ModuleFormerForSequenceClassification,
        ModuleFormerModel,
    )

    for kind, model in (
        (auto.AutoModel, ModuleFormerModel),
        (auto.AutoModelForCausalLM, ModuleFormerForCausalLM),
        (auto.AutoModelForSequenceClassification, ModuleFormerForSequenceClassification),
    ):
        kind.register(ModuleFormerConfig, model, exist_ok=True)


def _tokenizers(auto: ModuleType) -> None:
    from transformers import GPT2Tokenizer

    from moduli.models.moduleformer import ModuleFormerConfig

    # What the published checkpoints were trained with: byte-level BPE of GPT-2 with more spaces.
    auto.AutoTokenizer.register(ModuleFormerConfig, GPT2Tokenizer, exist_ok=True)
