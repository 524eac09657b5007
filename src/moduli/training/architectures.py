"""Small language models with random weights: a ModuleFormer, or a dense model that costs as much.

The dense one is Llama of transformers. Its feed-forward width is chosen so that its blocks have as
many parameters as a token uses in the blocks of the ModuleFormer of the same size.
Letters: D width, A width of queries, F neurons of an expert, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from moduli.errors import ConfigError, UnknownNameError, nearest

Architecture = Literal["moduleformer", "dense"]
Size = Literal["tiny", "small"]

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "n_layer": 4,
        "n_embd": 128,
        "att_hidden": 128,
        "n_head": 2,
        "ffd_hidden": 192,
        "n_att_experts": 8,
        "n_mlp_experts": 16,
        "gating_size": 64,
    },
    "small": {
        "n_layer": 6,
        "n_embd": 256,
        "att_hidden": 256,
        "n_head": 4,
        "ffd_hidden": 384,
        "n_att_experts": 8,
        "n_mlp_experts": 16,
        "gating_size": 128,
    },
}
"""ModuleFormers; two experts of each kind per token."""

SHARED: dict[str, Any] = {
    "k_att": 2,
    "k_mlp": 2,
    "aux_loss_type": "mi",
    "aux_loss_weight": 0.01,
    "legacy_buffers": False,  # which nothing reads, and which would be most of a small file
    "tie_word_embeddings": True,
}
OF_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that are not for the user to choose."""
POSITIONS = 2048  # of the dense model, which knows them by rotation, and has no table of them


def fresh_config(
    architecture: Architecture, size: Size, changes: Mapping[str, Any], **tokens: Any
) -> Any:
    """The configuration of a small language model.

    Args:
        architecture: "moduleformer" or "dense".
        size: "tiny" or "small".
        changes: fields of the configuration with other values, by its own names; those of a
            ModuleFormer may also be given for the dense model, which then costs as much as that.
        **tokens: vocab_size and the ids of special tokens.

    Raises:
        UnknownNameError: a field does not exist.
        ConfigError: its value cannot work, the tokenizer decides it, or a dense model has no use
            for it.
    """
    modules = {**SIZES[size], **SHARED}
    if architecture == "dense":
        ours = {name: changes[name] for name in changes if name in modules}
        modules = modules | ours
        _made("moduleformer", modules)  # or what it costs would be nonsense
        values = _as_costly(modules)
        changes = {name: value for name, value in changes.items() if name not in ours}
    else:
        values = modules
    model_type = {"moduleformer": "moduleformer", "dense": "llama"}[architecture]
    known = _fields(model_type)
    for name, value in changes.items():
        if name in OF_TOKENIZER:
            raise ConfigError(
                f"{name} is given as {value!r}, but follows from the tokenizer that is learnt; "
                "--vocab-size says how many tokens that may have"
            )
        if name not in known:
            if architecture == "dense" and name in _fields("moduleformer"):
                raise ConfigError(
                    f"{name} is a field of ModuleFormers that a dense model has no use for; leave "
                    "it out, or choose architecture moduleformer. Those by which the dense model "
                    f"costs as much may be given: {', '.join(modules)}"
                )
            raise UnknownNameError(
                f"a {architecture} configuration has no field {name!r}. {nearest(name, known)}"
            )
        if isinstance(known[name], (int, float)) and not isinstance(value, (int, float)):
            raise ConfigError(f"{name} is {value!r}; it is a number, such as {known[name]}.")
    return _made(model_type, {**values, **changes, **tokens})


def _made(model_type: str, values: Mapping[str, Any]) -> Any:
    """A configuration.

    Raises:
        ConfigError: it cannot work.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type, **values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"the configuration cannot work: {reason}") from error


def _fields(model_type: str) -> dict[str, Any]:
    """Defaults of the fields of a configuration, by name."""
    from transformers import AutoConfig

    fields = dataclasses.fields(type(AutoConfig.for_model(model_type)))
    return {field.name: field.default for field in fields}


def fresh_model(config: Any, seed: int) -> Any:
    """A language model with random weights.

    Args:
        config: of `fresh_config`.
        seed: of the weights, and from here on of torch's own generator.
    """
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    build: Any = AutoModelForCausalLM.from_config
    return build(config)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of all experts and parts ("parameters"), and those of the blocks that one token
    uses ("active_parameters"): without embeddings, and K of E experts.

    Args:
        model: of `fresh_model`.
    """
    config: Any = model.config
    total = active = 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name.startswith(("transformer.h.", "model.layers.")):
            share = 1.0
            if parameter.dim() == 3:  # one matrix per expert
                k = config.k_att if ".attn." in name else config.k_mlp
                share = k / len(parameter)
            active += share * parameter.numel()
    return {"parameters": round(total), "active_parameters": round(active)}


def _as_costly(modules: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama whose blocks have as many parameters as a token uses of these modules."""
    d, a, g = modules["n_embd"], modules["att_hidden"], modules["gating_size"]
    attention = 2 * modules["k_att"] * d * a
    if not (a == d and modules["n_head"] == 1):  # else keys and values are the input itself
        attention += 2 * (a * d + a)
    feed_forward = 2 * modules["k_mlp"] * d * modules["ffd_hidden"]
    experts = modules["n_att_experts"] + modules["n_mlp_experts"]
    routers = 2 * (d * g + g) + experts * g
    width = round((attention + feed_forward + routers - 4 * d * d) / (3 * d))
    return {
        "hidden_size": d,
        "num_hidden_layers": modules["n_layer"],
        "num_attention_heads": modules["n_head"],
        "num_key_value_heads": modules["n_head"],
        "intermediate_size": max(width, 1),
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": modules["tie_word_embeddings"],
    }
