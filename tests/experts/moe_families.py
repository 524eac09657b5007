"""Tiny random models of every MoE family of transformers whose experts use its experts interface.

The list is read off the installed package: every class under `@use_experts_implementation` is a
case, so a family that a new version adds is a case without anybody writing it down. A model is
the generative class of the family's module where there is one, from its own default configuration
with the sizes of `TINY`; `CHANGES` has what single families need besides.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests import tiny

VOCAB, WIDTH, EXPERTS, TOP_K, LAYERS = 61, 32, 6, 2, 2

TINY: dict[str, Any] = {
    # sizes
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": WIDTH,
    "moe_hidden_size": WIDTH,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 20,
    "dense_intermediate_size": 20,
    "moe_intermediate_size": 20,
    "shared_intermediate_size": 20,
    "shared_expert_intermediate_size": 20,
    "shared_experts_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "prefix_dense_intermediate_size": 20,
    "router_hidden_size": 8,
    "max_position_embeddings": 64,
    "num_hidden_layers": LAYERS,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse"],
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # towers of pictures and sounds, which no test looks at
    "depth": 1,
    "downsample_channels": [8, 8],
    "output_channels": 8,
    "projector_hidden_size": WIDTH,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "d_model": 8,
    "num_mel_bins": 8,
    "output_dim": WIDTH,
    "downsample_hidden_size": 8,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "image_size": 16,
    "patch_size": 4,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CHANGES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": _LINEAR,
    "KimiLinearConfig": _LINEAR,
    "Qwen3_5MoeTextConfig": _LINEAR,
    "Qwen3NextConfig": _LINEAR,
    "Qwen4ExpTextConfig": _LINEAR
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybridConfig": _LINEAR | {"mamba_n_heads": 4, "mamba_d_head": 16},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "NemotronHConfig": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "moe"]},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [20, 12], "rope_parameters": _MROPE},
    "FlintConfig": {"mlp_only_layers": [0]},
    "Gemma4TextConfig": {"enable_moe_block": True},
    "Glm4vMoeTextConfig": {"rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}},
    "Glm5NextTextConfig": _LINEAR | {"qk_rope_head_dim": 0, "index_kpool": 4},
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "Mistral4Config": {"head_dim": 16},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8)},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 3},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 20},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "DiffusionGemmaConfig": {"canvas_length": 8},
}
MARK = r"^@use_experts_implementation.*\nclass (\w+)"
ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")
# Modules that hold more than one experts class, or none that generates by itself.
HEADS = {
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}
# Heads that generate no text one token after the other.
NO_TEXT = {
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "labels tokens",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts": "speaks, as one part of several models",
}
# A sampler that redraws tokens until they settle turns rounding errors into other texts: in float32
# transformers' own backends do not agree either, in float64 all do.
IN_DOUBLE = {"diffusion_gemma.DiffusionGemmaTextExperts"}


@cache
def cases() -> list[str]:
    """Every experts class of transformers that uses the interface, as "family.Class"."""
    root = Path(transformers.__file__).parent / "models"
    return [
        f"{path.parent.name}.{name}"
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in re.findall(MARK, path.read_text(encoding="utf-8"), re.M)
    ]


def experts_class(case: str) -> type[nn.Module]:
    """The class that the case is named after."""
    family, name = case.split(".")
    found: type[nn.Module] = getattr(_module(family), name)
    return found


def model_class(case: str) -> type[PreTrainedModel]:
    """The class whose tiny instance is the case's model."""
    module = _module(case.split(".")[0])
    if case in HEADS:
        return getattr(module, HEADS[case])
    classes = {name: c for name, c in vars(module).items() if inspect.isclass(c)}
    for ending in ENDINGS:
        for name, c in classes.items():
            if name.endswith(ending) and c.__module__ == module.__name__:
                return c
    raise LookupError(f"{case}: no class of {module.__name__} ends in one of {ENDINGS}")


def _module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def tiny_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default configuration of `cls` with the sizes of `TINY`."""
    default = cls()
    known = set(default.to_dict()) - set(cls.sub_configs)
    values = {name: value for name, value in TINY.items() if name in known}
    for name in cls.sub_configs:
        sub = getattr(default, name, None)
        if sub is not None:
            values[name] = tiny_config(type(sub)).to_dict()
    return cls(**{**values, **CHANGES.get(cls.__name__, {})})


def build(case: str, seed: int = 0) -> Any:
    """The model of a case in evaluation mode, its experts large enough to matter."""
    cls = model_class(case)
    model = tiny.initialise(lambda: cls(tiny_config(cls.config_class)), seed)
    with torch.no_grad():
        for module in experts_of(model, case):
            for parameter in module.parameters():
                parameter.normal_(0, 0.3)
    return model


def experts_of(model: nn.Module, case: str) -> list[nn.Module]:
    """The experts modules of a model, of which there is at least one."""
    found = [m for m in model.modules() if type(m) is experts_class(case)]
    assert found, f"the tiny model of {case} has no experts"
    return found


def inputs(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two texts of nine tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    if model.main_input_name == "input_ids" and not hasattr(model, "codec_embedding"):
        return {"input_ids": ids}
    return {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
