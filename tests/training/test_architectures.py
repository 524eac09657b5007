"""Small models from scratch: sizes that agree, fields that exist, weights that a seed decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moduli.errors import ConfigError, UnknownNameError
from moduli.training.architectures import (
    SIZES,
    Architecture,
    Size,
    count_parameters,
    fresh_config,
    fresh_model,
)

TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def made(architecture: Architecture, size: Size = "tiny", **changes: Any) -> Any:
    return fresh_model(fresh_config(architecture, size, changes, **TOKENS), seed=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{}, {"k_mlp": 4}, {"n_att_experts": 16, "ffd_hidden": 300}])
def test_the_dense_model_has_as_many_active_parameters(size: Size, changes: dict[str, int]) -> None:
    ours = count_parameters(made("moduleformer", size, **changes))
    dense = count_parameters(made("dense", size, **changes))
    assert dense["active_parameters"] == pytest.approx(ours["active_parameters"], rel=0.01)
    assert dense["parameters"] < ours["parameters"]


def test_active_parameters_are_those_of_a_model_with_only_the_chosen_experts() -> None:
    few = made("moduleformer", n_att_experts=2, n_mlp_experts=2)
    blocks = sum(p.numel() for p in few.transformer.h.parameters())
    assert count_parameters(few)["active_parameters"] == blocks
    many = made("moduleformer", n_att_experts=4, n_mlp_experts=8)
    rows = 4 * (2 + 6) * 64  # layers, more rows of the two routers, their hidden width
    assert count_parameters(many)["active_parameters"] == blocks + rows


def test_experts_are_asked_for_balance_from_the_start() -> None:
    config = fresh_config("moduleformer", "tiny", {}, **TOKENS)
    assert config.aux_loss_type == "mi"
    assert config.aux_loss_weight == 0.01


def test_a_seed_decides_the_weights() -> None:
    one, two = made("moduleformer"), made("moduleformer")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_fields_that_do_not_exist_or_cannot_work_are_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'n_layer'"):
        fresh_config("moduleformer", "tiny", {"n_layers": 2})
    with pytest.raises(UnknownNameError, match="'hidden_size'"):
        fresh_config("dense", "tiny", {"hiden_size": 2})
    with pytest.raises(ConfigError, match="k_att is 9"):
        fresh_config("moduleformer", "tiny", {"k_att": 9})
    with pytest.raises(ConfigError, match="n_layer is 'four'"):
        fresh_config("moduleformer", "tiny", {"n_layer": "four"})


def test_fields_that_are_not_for_this_model_say_why() -> None:
    with pytest.raises(ConfigError, match=r"gate_type .* a dense model has no use for; .*n_layer"):
        fresh_config("dense", "tiny", {"gate_type": "linear"})
    for architecture in ("moduleformer", "dense"):
        with pytest.raises(ConfigError, match=r"vocab_size is given as 500.*--vocab-size"):
            fresh_config(architecture, "tiny", {"vocab_size": 500}, **TOKENS)
