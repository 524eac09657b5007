"""The table of stock MoE classes: with equal experts each computes exactly what the dense does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from moduli.errors import ConfigError, ModelError, UnknownNameError
from moduli.surgery.stock import STOCK, StockMoE, stock_for

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama with everything": LlamaConfig(
        **SIZES, head_dim=12, tie_word_embeddings=True, rope_parameters=SCALED_ROPE
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "olmo2": Olmo2Config(**SIZES, attention_bias=True),
}
PAIRS = [
    pytest.param(config, stock, id=f"{name} in {stock.moe}")
    for name, config in CONFIGS.items()
    for stock in STOCK
    if stock.dense == config.model_type and stock.refusal(config) is None
]


def dense_model(config: Any) -> Any:
    """A dense model whose norms, biases and FFNs all matter."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def as_moe(model: Any, stock: StockMoE, num_experts: int) -> dict[str, torch.Tensor]:
    """Tensors of the MoE in which every expert is the dense model's FFN; random routers."""
    config, dense = model.config, model.state_dict()
    if config.tie_word_embeddings:
        del dense["lm_head.weight"]
    state = {stock.copied(n): t.clone() for n, t in dense.items() if stock.copied(n) is not None}
    width = config.hidden_size
    for layer in range(config.num_hidden_layers):
        ffn = [dense[name] for name in stock.dense_tensors(layer)]
        for expert in range(num_experts):
            names = stock.expert_tensors(layer, expert)
            state |= {name: t.clone() for name, t in zip(names, ffn, strict=True)}
        state[stock.router_tensor(layer)] = torch.randn(num_experts, width)
        if stock.has_shared:
            names = stock.shared_tensors(layer)
            state |= {name: torch.zeros_like(t) for name, t in zip(names, ffn, strict=True)}
            state[stock.shared_gate(layer)] = torch.zeros(1, width)
    return state


@pytest.mark.parametrize(("config", "stock"), PAIRS)
def test_equal_experts_give_the_dense_model(config: Any, stock: StockMoE, tmp_path: Path) -> None:
    model = dense_model(config)
    state = as_moe(model, stock, num_experts=3)
    moe_config = stock.config(config, 3, 2, shared_width=config.intermediate_size)
    moe_config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    moe, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(moe).__name__ == stock.architecture
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(1, 61, (2, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(moe.eval()(tokens).logits, expected, rtol=0, atol=1e-5)
    moe.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state), "transformers writes other names than the table"


@pytest.mark.parametrize(
    ("config", "target", "reason"),
    [
        (LlamaConfig(**SIZES, attention_bias=True), "mixtral", "attention_bias is True"),
        (LlamaConfig(**SIZES, mlp_bias=True), "qwen2_moe", "mlp_bias is True"),
        (MistralConfig(**SIZES, sliding_window=4), "qwen2_moe", "sliding_window is 4"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            "qwen2_moe",
            "window",
        ),
        (
            Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            "qwen3_moe",
            "window",
        ),
    ],
)
def test_what_the_class_cannot_compute_is_refused(config: Any, target: str, reason: str) -> None:
    stock = stock_for(config.model_type, target)
    assert reason in (stock.refusal(config) or "")
    with pytest.raises(ModelError, match=reason):
        stock.config(config, 4, 2)


def test_names_and_settings_that_do_not_exist() -> None:
    with pytest.raises(ModelError, match="'llama'"):
        stock_for("lama")
    with pytest.raises(UnknownNameError, match="mixtral"):
        stock_for("llama", "mixtrall")
    stock = stock_for("llama")
    with pytest.raises(ConfigError, match="top_k is 5"):
        stock.config(CONFIGS["llama"], 4, 5)
    with pytest.raises(ConfigError, match="renormalised"):
        stock.config(CONFIGS["llama"], 4, 2, rule="probabilities")
    with pytest.raises(ModelError, match="no shared expert"):
        stock.shared_gate(0)


def test_the_rule_reaches_the_class() -> None:
    stock = stock_for("qwen3")
    assert stock.config(CONFIGS["qwen3"], 4, 2).norm_topk_prob
    assert not stock.config(CONFIGS["qwen3"], 4, 2, rule="probabilities").norm_topk_prob
