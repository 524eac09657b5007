"""LLaMA-MoE on models: divisions and sharing, scale and noise of the gate, the loss, the return."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moduli
from moduli.errors import ConfigError, DataError, ModelError
from moduli.losses.noisy_top_k import noisy_top_k_loss
from moduli.methods.llama_moe.assemble import shared_members
from moduli.methods.llama_moe.groups import data_groups, mean_embedding
from moduli.surgery.convert import layout_of
from moduli.surgery.locate import find_ffns
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.partition import Sample, greedy_labels, neuron_importance
from moduli.surgery.probe import ffn_output
from tests import tiny
from tests.parity.case import Case
from tests.training.ddp_worker import Gradients, InOrder, arguments

CASE = Path(__file__).parents[2] / "parity" / "data" / "emoe" / "llama_moe_importance_split"
E, K = 6, 2
WAYS: dict[str, dict[str, Any]] = {
    "random": {"split": "random"},
    "cluster": {"split": "cluster"},
    "importance": {"split": "importance"},
    "inner": {"split": "importance", "sharing": "inner", "expert_size": 10},
    "inter": {"split": "importance", "sharing": "inter", "num_residual": 3},
    "inter, overlapping": {
        "split": "importance",
        "sharing": "inter",
        "num_residual": 2,
        "expert_size": 7,
    },
}
PARTITIONS = ["random", "cluster", "importance", "inter"]


def method(way: str = "random", **changes: Any) -> Any:
    settings = {"num_experts": E, "top_k": K, "layers": "last:2", **WAYS[way], **changes}
    return moduli.LlamaMoE(**settings)


def data(family: str = "llama") -> list[dict[str, Tensor]]:
    """A labelled batch per expert."""
    return [tiny.batch(tiny.rows(family, 3, seed=10 + i)) for i in range(E)]


def inputs(family: str = "llama", count: int = 3) -> dict[str, Tensor]:
    made = tiny.batch(tiny.rows(family, count))
    del made["labels"]
    return made


def converted(family: str = "llama", way: str = "random", **changes: Any) -> Any:
    model = tiny.build(family)
    moduli.convert(model, method(way, **changes), batch=data(family))
    return model


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# --- who is where -------------------------------------------------------------------------------


def test_members_are_those_of_the_reference() -> None:
    case = Case.read(CASE / "case.json")
    scores, shape = case.given("importance"), case.config["residual"]
    inner = moduli.LlamaMoE(
        num_experts=len(scores),
        top_k=1,
        split="importance",
        sharing="inner",
        expert_size=case.config["expert_size_inner_sharing"],
    )
    found, residual = shared_members(inner, scores)
    name = next(n for n in case.data["expected"] if n.startswith("sharing_inner.max."))
    assert residual is None
    assert torch.equal(torch.stack(list(found)), case.expected(name).long())
    names = [n for n in case.data["expected"] if n.startswith("residual") and ".max." in n]
    assert len(names) == 2
    for name in names:
        overlap = name.startswith("residual_sharing")
        inter = moduli.LlamaMoE(
            num_experts=shape["n_moe"],
            top_k=1,
            split="importance",
            sharing="inter",
            num_residual=shape["n_residual"],
            expert_size=shape["expert_size"] if overlap else None,
        )
        found, residual = shared_members(inter, scores[: shape["n_moe"]])
        members = torch.cat([residual, *found]).reshape(-1, shape["expert_size"])
        assert torch.equal(members, case.expected(name).long())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_importance_is_that_of_the_groups_given(family: str) -> None:
    model, batches = tiny.build(family), data(family)
    ffns = find_ffns(model)
    expected = neuron_importance(model, ffns, [[batch] for batch in batches])
    moduli.convert(model, method("importance"), batch=batches)
    for entry in layout_of(model).layers:
        assert torch.equal(entry.labels, greedy_labels(expected[entry.name]))
    swapped = tiny.build(family)
    moduli.convert(swapped, method("importance"), batch=batches[::-1])
    assert not torch.equal(layout_of(swapped).layers[0].labels, layout_of(model).layers[0].labels)


def test_rows_of_texts_are_grouped_by_their_mean_embedding() -> None:
    model = tiny.build("llama")
    batches = [tiny.batch(tiny.rows("llama", 8, seed=i)) for i in range(2)]
    groups = data_groups(Sample(model, batches), 4, seed=0)
    rows = [row for group in groups for row in group]
    assert len(rows) == 16
    assert all(row["input_ids"].shape == (1, 9) == row["labels"].shape for row in rows)
    everyone = torch.cat([b["input_ids"] for b in batches]).tolist()
    assert sorted(r["input_ids"][0].tolist() for r in rows) == sorted(everyone)
    means = torch.stack([mean_embedding(model, row) for row in rows])
    first, mask = rows[0]["input_ids"][0], rows[0]["attention_mask"][0].bool()
    torch.testing.assert_close(means[0], model.get_input_embeddings().weight[first[mask]].mean(0))
    centers = torch.stack(
        [torch.stack([mean_embedding(model, r) for r in group]).mean(0) for group in groups]
    )
    nearest = torch.cdist(means, centers).argmin(-1).tolist()
    assert nearest == [i for i, group in enumerate(groups) for _ in group]
    moduli.convert(model, method("importance"), batch=batches)
    assert moduli.is_modular(model)


@pytest.mark.parametrize("way", ["importance", "inner", "inter"])
def test_importance_without_fitting_data_says_what_to_give(way: str) -> None:
    model = tiny.build("llama")
    before = states(model)
    with pytest.raises(ConfigError, match=r"importance.*looks at data.*batch=batch"):
        moduli.convert(model, method(way))
    with pytest.raises(DataError, match="labels"):
        moduli.convert(model, method(way), batch=inputs(count=8))
    with pytest.raises(DataError, match="3 rows cannot make 6 groups"):
        moduli.convert(model, method(way), batch=data()[0])
    pictures, seeing = tiny.batch(tiny.rows("vit", 4)), tiny.build("vit")
    with pytest.raises(ConfigError, match=r"give 6 batches.*not 2"):
        moduli.convert(seeing, method(way), batch=[pictures, pictures])
    assert same(before, model.state_dict())
    assert not moduli.is_modular(model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_experts_that_share_are_as_large_as_they_should_be(family: str) -> None:
    sizes = {"inner": (10, 0, False), "inter": (4, 12, True), "inter, overlapping": (7, 14, False)}
    for way, (size, always, partition) in sizes.items():
        for layer in routed_layers(converted(family, way)).values():
            assert isinstance(layer, OwnedExperts)
            assert layer.sizes == (size,) * E
            pool = layer.residual_members
            assert (0 if pool is None else len(pool)) == always
            everyone = torch.cat([*layer.members, *([] if pool is None else [pool])])
            if pool is not None:
                assert not set(pool.tolist()) & set(torch.cat(layer.members).tolist())
            counts = torch.bincount(everyone, minlength=tiny.NEURONS)
            assert bool((counts == 1).all()) == partition


# --- the function ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("way", PARTITIONS)
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_an_even_gate_of_scale_e_is_the_dense_model_at_k_e(family: str, way: str) -> None:
    model = tiny.build(family)
    dense = model(**inputs(family)).logits
    with torch.enable_grad():
        moduli.convert(model, method(way, top_k=E, scale="dense"), batch=data(family))
    torch.testing.assert_close(model(**inputs(family)).logits, dense, atol=1e-5, rtol=1e-4)
    published = converted(family, way, top_k=E)
    assert not torch.allclose(published(**inputs(family)).logits, dense, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("way", ["random", "inter"])
def test_scale_e_is_dense_on_average_over_all_choices(way: str) -> None:
    model = converted(way=way, scale="dense", layers=[1])
    (layer,) = routed_layers(model).values()
    x = torch.randn(5, tiny.WIDTH)
    full = find_ffns(tiny.build("llama"))[1].block(x)
    mean = torch.zeros_like(full)
    choices = list(itertools.combinations(range(E), K))
    ones = torch.ones(len(x), 1)
    for chosen in choices:  # scores that are even among the chosen, and far below elsewhere
        scores = torch.full((E,), -50.0).index_fill(0, torch.tensor(chosen), 50.0)
        layer.router.scores = lambda x, scores=scores: ones[: len(x)] * scores
        mean += ffn_output(layer, x) / len(choices)
    torch.testing.assert_close(mean, full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scale", "sum_of_weights"), [("published", E / K), ("dense", E), (1.5, 1.5)]
)
def test_the_scale_is_the_sum_of_the_weights(scale: Any, sum_of_weights: float) -> None:
    model = converted(scale=scale, gate="mlp")
    layer = next(iter(routed_layers(model).values()))
    seen = []
    layer.shared.record = lambda name, routing, real: seen.append(routing)
    model(**inputs())
    for routing in seen:
        total = routing.weights.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, sum_of_weights))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_noise_is_for_training_only(way: str) -> None:
    model = converted(way=way)
    batch = inputs()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    with torch.enable_grad():
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        quiet = converted(way=way, noise_floor=None).train()
        assert torch.equal(quiet(**batch).logits, quiet(**batch).logits)


def test_the_gate_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_model, batch = tiny.build("llama"), data()
    torch.manual_seed(3)
    moduli.convert(tiny_model, method(gate="mlp"), batch=batch)
    assert torch.equal(torch.rand(2), expected)
    first, second = (layer.router for layer in routed_layers(tiny_model).values())
    again = next(iter(routed_layers(converted(gate="mlp")).values())).router
    assert torch.equal(first.network[0].weight, again.network[0].weight)
    assert not torch.equal(first.network[0].weight, second.network[0].weight)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["random", "inner"])
@pytest.mark.parametrize("aux", ["noisy_top_k", "noisy_top_k_paper"])
def test_the_trainer_minimises_the_balance_loss_once(way: str, aux: str, tmp_path: Path) -> None:
    family, weight = "bert", 0.5
    model = converted(family, way, aux=aux, aux_weight=weight)
    examples = tiny.rows(family)
    batch, layers = tiny.batch(examples), routed_layers(model)
    shared, seen = next(iter(layers.values())).shared, []
    for name in layers:
        shared.noise[name] = torch.randn(batch["input_ids"].numel(), E)
    shared.record = lambda name, routing, real: seen.append((routing, real))
    model.train()
    logits = model(**{n: t for n, t in batch.items() if n != "labels"}).logits
    by = "noise" if aux == "noisy_top_k_paper" else "scores"
    terms = [
        noisy_top_k_loss(r.scores[real], r.noisy_scores[real], r.spread[real], K, chosen_by=by)
        for r, real in seen
    ]
    assert len(terms) == 2
    total = F.cross_entropy(logits, batch["labels"]) + weight * sum(terms)
    total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shared.record = None
    steps = Gradients()
    trainer = InOrder(
        model=model, args=arguments(tmp_path), train_dataset=examples, callbacks=[steps]
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-5)
    (found,) = steps.steps
    assert any("router.noise" in name and bool(g.any()) for name, g in found.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    evaluated = model.eval()(**batch)
    plain = F.cross_entropy(evaluated.logits, batch["labels"])
    torch.testing.assert_close(evaluated.loss, plain)


def test_padding_does_not_enter_the_loss() -> None:
    model = converted("bert")
    batch = tiny.batch(tiny.rows("bert", 3))
    layers = routed_layers(model)
    shared = next(iter(layers.values())).shared
    noise = {name: torch.randn(batch["input_ids"].numel(), E) for name in layers}
    shared.noise.update(noise)
    model.train()(**batch)
    terms = {name: layer.auxiliary.item() for name, layer in layers.items()}
    padding = (batch["attention_mask"] == 0).flatten()
    for name in layers:
        shared.noise[name] = noise[name] + 3 * padding[:, None] * torch.randn(E)
    model(**batch)
    for name, layer in layers.items():
        assert layer.auxiliary.item() == pytest.approx(terms[name], rel=1e-5)


# --- back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_partitions_come_back_bit_for_bit_and_overlaps_refuse(family: str, way: str) -> None:
    before = states(tiny.build(family))
    model = converted(family, way)
    if way not in PARTITIONS:
        with pytest.raises(ModelError, match="overlap"):
            moduli.merge(model, exact=True)
        moduli.merge(model)
        return
    assert moduli.merge(model, exact=True).exact
    assert same(before, model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_it_comes_back_without_data_bit_for_bit(tmp_path: Path, way: str, how: str) -> None:
    model = converted("gpt2", way, gate="mlp")
    for layer in routed_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.add_(torch.randn_like(parameter))
    (moduli.save if how == "save" else lambda m, d: m.save_pretrained(d))(model, tmp_path)
    again = moduli.load(tmp_path)
    assert torch.equal(again(**inputs("gpt2")).logits, model(**inputs("gpt2")).logits)
    batch = tiny.batch(tiny.rows("gpt2"))
    torch.manual_seed(0)
    with torch.enable_grad():
        one = model.train()(**batch).loss
    torch.manual_seed(0)
    with torch.enable_grad():
        two = again.train()(**batch).loss
    assert torch.equal(one, two)  # noise and balance loss came back too


@torch.no_grad()
def test_masked_and_fast_paths_agree() -> None:
    batch = inputs()
    outputs = []
    for path in ("masked", "fast"):
        model = converted(path=path, gate="mlp")
        outputs.append(model(**batch).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_real_encoder_divides_and_comes_back(minilm_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm_path)
    before = states(model)
    ids = torch.arange(1000, 1064).reshape(2, 32)
    dense = model(ids).last_hidden_state
    config = moduli.LlamaMoE(num_experts=16, top_k=16, scale="dense", layers=[4, 5])
    report = moduli.convert(model, config)
    torch.testing.assert_close(model(ids).last_hidden_state, dense, atol=1e-4, rtol=1e-3)
    assert report.added_parameters == 2 * 2 * 16 * 384  # gate and noise of two layers
    moduli.merge(model, exact=True)
    assert same(before, model.state_dict())


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": E + 1}, "top_k is 7"),
        ({"split": "gradient"}, "'importance'"),
        ({"sharing": "inner"}, "split='importance'"),
        ({"expert_size": 5}, "expert_size"),
        ({"num_residual": 0}, "num_residual 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": "even"}, "'dense'"),
        ({"noise_floor": 0.0}, "noise_floor"),
        ({"aux": "load_importance"}, "'noisy_top_k'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**changes)


def test_residual_experts_that_do_not_divide_are_refused_before_anything_changes() -> None:
    model = tiny.build("llama")
    with pytest.raises(ConfigError, match=r"1 residual and 6 routed.*36 neurons"):
        moduli.convert(model, method("inter", num_residual=1), batch=data())
    assert not moduli.is_modular(model)
