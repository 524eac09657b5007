"""Parameters, operations and memory against numbers made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.study import cost
from moduli.study.cost import PeakMemory, measure_cost
from moduli.training.settings import FinetuneSettings
from moduli.training.trainable import prepare
from tests import families, tiny

D, F, L = tiny.WIDTH, tiny.NEURONS, tiny.LAYERS
B, S, LABELS = 4, 32, 3  # of the random batch that texts are measured on
METHODS: dict[str, Any] = {
    "split": moduli.EMoE(num_experts=6, top_k=2, layers="all"),
    "learned": moduli.EMoE(num_experts=6, top_k=2, layers="all", gate="cosine"),
    "owned": moduli.GMoE(num_experts=3, top_k=1, layers="all", projection=8),
}


def measured(model: nn.Module, method: Any = None) -> dict[str, Any]:
    report = None if method is None else moduli.convert(model, method)
    return measure_cost(model, report)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_dense_encoder_by_hand() -> None:
    model = tiny.build("bert")
    found = measured(model)
    tokens = B * S
    per_layer = 2 * tokens * (4 * D * D + 2 * D * F) + 2 * 2 * B * S * S * D
    expected = L * per_layer + 2 * B * D * (D + LABELS)
    assert found["flops_per_token"] == found["dense_flops_per_token"] == expected / tokens
    parameters = found["parameters"], found["active_parameters"], found["trainable_parameters"]
    assert parameters == (count(model),) * 3


def test_experts_that_are_not_chosen_cost_nothing() -> None:
    model = tiny.build("bert")
    found = measured(model, METHODS["split"])
    dense = measured(tiny.build("bert"))
    assert found["dense_flops_per_token"] == dense["dense_flops_per_token"]
    saved = 2 * 2 * D * F * (1 - 2 / 6) - 2 * D * 6  # two thirds of both matrices, less the gate
    expected = dense["flops_per_token"] - L * saved
    assert found["flops_per_token"] == pytest.approx(expected, rel=1e-12)
    assert found["parameters"] == dense["parameters"]
    unused = L * (2 * D * F + F) * 4 / 6
    assert found["active_parameters"] == round(dense["parameters"] - unused)


def test_copies_add_parameters_but_one_is_used() -> None:
    model = tiny.build("bert")
    found, dense = measured(model, METHODS["owned"]), measured(tiny.build("bert"))
    assert found["parameters"] == count(model) > dense["parameters"]
    bank = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert found["active_parameters"] == round(count(model) - bank * 2 / 3)
    assert found["dense_flops_per_token"] == dense["dense_flops_per_token"]
    assert found["flops_per_token"] > dense["flops_per_token"]  # one of one size, and the gate


@pytest.mark.parametrize("family", ["t5-gated", "bart", "whisper", "vit", "llama", "modernbert"])
def test_all_experts_cost_what_the_dense_model_does_and_the_gate(family: str) -> None:
    model = families.build(family)
    found = measured(model, moduli.EMoE(num_experts=4, top_k=4, layers="all", split="contiguous"))
    dense = measured(families.build(family))
    assert found["dense_flops_per_token"] == dense["dense_flops_per_token"] > 0
    gates = found["flops_per_token"] - dense["flops_per_token"]
    assert 0 < gates <= 2 * 4 * families.WIDTH * families.ffn_count(family)
    assert found["active_parameters"] == found["parameters"]


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_no_part_of_the_ordinary_model(method: str) -> None:
    model = tiny.build("bert")
    report = moduli.convert(model, METHODS[method])
    plain = measure_cost(model, report)
    adapted = prepare(model, FinetuneSettings(trains="lora", lora_rank=2))
    found = measure_cost(adapted, report)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found == {**plain, "trainable_parameters": trained}
    assert 0 < trained < plain["parameters"]


def test_measuring_leaves_everything_as_it_was() -> None:
    model = families.build("bert")
    report = moduli.convert(model, METHODS["learned"])
    adapted = prepare(model, FinetuneSettings(trains="lora")).train()
    adapted.get_submodule("base_model.model.bert.embeddings").eval()

    def picture() -> tuple[Any, ...]:
        modes = [module.training for module in adapted.modules()]
        hooks = [len(module._forward_pre_hooks) for module in adapted.modules()]
        trains = [p.requires_grad for p in adapted.parameters()]
        tensors = [t.clone() for t in adapted.state_dict().values()]
        return modes, hooks, trains, torch.get_rng_state(), tensors

    before = picture()
    measure_cost(adapted, report)
    after = picture()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert all(torch.equal(a, b) for a, b in zip(before[4], after[4], strict=True))


def test_a_batch_of_ones_own() -> None:
    model = tiny.build("bert")
    short = measure_cost(model, batch={"input_ids": torch.ones(2, 8, dtype=torch.long)})
    long = measure_cost(model, batch={"input_ids": torch.ones(2, 16, dtype=torch.long)})
    attention = 2 * 2 * D * L * 8
    pooled = 2 * D * (D + LABELS) * (1 / 8 - 1 / 16)
    difference = long["flops_per_token"] - short["flops_per_token"]  # type: ignore[operator]
    assert difference == pytest.approx(attention - pooled)


def test_unknown_inputs_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "probe_batch", lambda model: None)
    found = measure_cost(tiny.build("bert"))
    assert found["flops_per_token"] is None
    assert found["parameters"] == count(tiny.build("bert"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts memory of the device instead")
def test_peak_memory_is_that_of_the_block() -> None:
    size = 256 * 2**20

    def use(count: int) -> None:
        block = torch.empty(count // 4).fill_(1.0)
        del block

    use(2 * size)  # before the block: must not count
    with PeakMemory() as little:
        pass
    with PeakMemory() as much:
        use(size)
    assert little.peak is not None
    assert much.peak is not None
    assert 0.9 * size < much.peak - little.peak < 1.5 * size


def test_peak_memory_where_it_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cost, "PROC", tmp_path / "nothing")
    with PeakMemory() as memory:
        pass
    assert memory.peak is None
