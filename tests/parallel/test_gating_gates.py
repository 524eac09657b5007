"""Gates of stock mixtures: which can choose within a rank, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tr

from moduli.errors import ModelError
from moduli.parallel import GatingDropout, expert_parallel_plan, gating_dropout
from tests import families, tiny
from tests.parallel.gating_ranks import build, tokens

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def corrected(kind: str) -> Any:
    """Models whose gates choose by scores and a bias, which is 0 at first."""
    if kind == "deepseek_v3":
        sizes: dict[str, Any] = {
            **SIZES, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1,
        }  # fmt: skip
        del sizes["num_local_experts"]
        return tr.DeepseekV3ForCausalLM(tr.DeepseekV3Config(**sizes))
    sizes = {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
    return tr.Ernie4_5_MoeForCausalLM(tr.Ernie4_5_MoeConfig(**sizes))


@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe"])
def test_gates_that_a_bias_corrects_are_refused(kind: str) -> None:
    model = corrected(kind).train()
    for policy in ("paper", "masked_gate"):
        config = GatingDropout(p=1.0, local_policy=policy)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=r'correction_bias corrects.*local_policy="modulo"'):
            gating_dropout(model, config, ranks=2)
    attached = gating_dropout(model, GatingDropout(p=1.0, local_policy="modulo"), ranks=2)
    attached.set_step(0)
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


@pytest.mark.parametrize("policy", ["paper", "masked_gate"])
def test_gates_that_choose_otherwise_than_by_logits_are_refused(policy: Any) -> None:
    model = families.moe("mixtral").train()
    gate = model.model.layers[1].mlp.gate

    def worst(module: Any, args: Any, output: Any) -> Any:
        logits, weights, _ = output
        return logits, weights, (-logits).topk(2).indices

    handle = gate.register_forward_hook(worst, prepend=True)
    attached = gating_dropout(model, GatingDropout(p=1.0, local_policy=policy), ranks=2)
    handle.remove()  # and hang it in before ours, which looks at what the gate returns
    gate.register_forward_hook(worst, prepend=True)
    attached.set_step(0)
    with pytest.raises(ModelError, match="does not choose by"):
        model(input_ids=tokens())


@pytest.mark.parametrize("policy", ["paper", "masked_gate"])
def test_gates_that_draw_experts_are_refused_whatever_they_draw(policy: Any) -> None:
    """Phimoe draws among those with nearly the same logit, which shows in few tokens only."""
    for seed in range(3):
        model = tiny.initialise(lambda: tr.PhimoeForCausalLM(tr.PhimoeConfig(**SIZES)), seed)
        config = GatingDropout(p=1.0, local_policy=policy)
        gating_dropout(model.train(), config, ranks=2).set_step(0)
        with pytest.raises(ModelError, match=r'a PhimoeTopKRouter.*local_policy="modulo"'):
            model(input_ids=tokens()[:1, :3])


@pytest.mark.parametrize("family", families.MOE)
def test_gates_round_to_the_dtype_of_the_model(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    model.set_experts_implementation("eager")  # grouped kernels need wider rows
    for policy in ("paper", "masked_gate"):
        config = GatingDropout(p=1.0, local_policy=policy)  # type: ignore[arg-type]
        attached = gating_dropout(model, config, ranks=2)
        attached.set_step(0)
        assert torch.isfinite(model(input_ids=tokens()).logits).all()
        attached.remove()


def test_confident_tokens_do_not_settle_how_a_gate_scales() -> None:
    model = build("qwen2_moe")  # does not scale
    config = GatingDropout(p=1.0, local_policy="masked_gate")
    attached = gating_dropout(model, config, ranks=1)
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    weights = [gate.weight.detach().clone() for gate in gates]
    usual = model.eval()(input_ids=tokens()).logits.detach()
    with torch.no_grad():
        for gate in gates:
            gate.weight.mul_(1e4)
    attached.set_step(0)
    model.train()(input_ids=tokens())
    with torch.no_grad():
        for gate, weight in zip(gates, weights, strict=True):
            gate.weight.copy_(weight)
    torch.testing.assert_close(model(input_ids=tokens()).logits, usual)


def test_experts_that_take_other_arguments_are_named() -> None:
    gpt_oss = tr.GptOssForCausalLM(tr.GptOssConfig(**SIZES, head_dim=8))
    switch = tr.SwitchTransformersForConditionalGeneration(
        tr.SwitchTransformersConfig(
            vocab_size=tiny.VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
            num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        )
    )  # fmt: skip
    for model, what in (
        (gpt_oss, r"mlp\.experts .*GptOssExperts.*router_indices.*Mixtral"),
        (switch, r"mlp\.experts .*SwitchTransformersExperts.*selected_experts.*Mixtral"),
    ):
        with pytest.raises(ModelError, match=what):
            gating_dropout(model, GatingDropout(p=1.0), ranks=2)
        with pytest.raises(ModelError, match=what):
            expert_parallel_plan(model)
