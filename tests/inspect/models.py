"""Tiny models with experts, of ours and of transformers, and inputs with padding."""

from __future__ import annotations

from typing import Any

import transformers as tr

import moduli
from tests import tiny
from tests.tiny import LAYERS, NEURONS, VOCAB, WIDTH

STOCK = {
    "mixtral": (tr.MixtralConfig, tr.MixtralForCausalLM, {"num_local_experts": 4}),
    "olmoe": (tr.OlmoeConfig, tr.OlmoeForCausalLM, {"num_experts": 4}),
    "qwen2_moe": (
        tr.Qwen2MoeConfig,
        tr.Qwen2MoeForCausalLM,
        {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "decoder_sparse_step": 1,
        },
    ),
}


def stock(name: str, vocab: int = VOCAB) -> Any:
    """A tiny MoE model of transformers with 4 experts, 2 per token."""
    config, model, changes = STOCK[name]

    def make() -> Any:
        return model(
            config(
                vocab_size=vocab,
                hidden_size=WIDTH,
                intermediate_size=NEURONS,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_experts_per_tok=2,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **changes,
            )
        )

    return tiny.initialise(make)


def split(family: str, **changes: Any) -> Any:
    """A tiny model whose FFNs are split in 4 experts, 2 per token."""
    model = tiny.build(family)
    options = {"num_experts": 4, "top_k": 2, "layers": "all", "split": "contiguous", **changes}
    moduli.convert(model, moduli.EMoE(**options))
    return model


def owned(family: str = "bert") -> Any:
    """A tiny model with experts of their own, all copies of the FFN."""
    model = tiny.build(family)
    moduli.convert(model, moduli.GMoE(num_experts=4, top_k=2, layers="all"))
    return model


def inputs(family: str, count: int = 5) -> dict[str, Any]:
    """A batch without labels."""
    found = tiny.batch(tiny.rows(family, count))
    del found["labels"]
    return found
