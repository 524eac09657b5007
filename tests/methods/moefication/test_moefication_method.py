"""MoEfication on models: the published selection, the fit of its router, what comes back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moduli
from moduli.errors import ConfigError, DataError, ModelError
from moduli.methods.moefication import fit_routers
from moduli.methods.moefication.fit import carried
from moduli.routing import GroundTruthRouter, MLPRouter
from moduli.surgery.convert import layout_of
from moduli.surgery.layout import LayerLayout, Layout
from moduli.surgery.locate import find_ffns
from moduli.surgery.modular import routed_layers
from moduli.surgery.probe import ffn_output
from moduli.training.router_fit import captured_share
from tests import tiny
from tests.parity.case import Case

CASE = Path(__file__).parents[2] / "parity" / "data" / "emoe" / "moefication_selection"
E, K = 6, 2
SELECTS = ["ground_truth", "similarity", "mlp"]
PARTITIONS = ["cluster", "coactivation", "random", "contiguous"]


def method(**changes: Any) -> Any:
    settings = {"num_experts": E, "top_k": K, "layers": "last:2", "router_epochs": 3, **changes}
    return moduli.MoEfication(**settings)


def inputs(family: str = "bert", count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    made = tiny.batch(tiny.rows(family, count, seed))
    del made["labels"]
    return made


def relu_model(family: str = "bert") -> Any:
    model = tiny.build(family)
    for ffn in find_ffns(model):
        ffn.set_activation(nn.ReLU())
    return model


def converted(family: str = "bert", batch: Any = None, **changes: Any) -> Any:
    model = relu_model(family)
    moduli.convert(model, method(**changes), batch=inputs(family) if batch is None else batch)
    return model


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("select", ["ground_truth", "similarity"])
@pytest.mark.parametrize("path", ["masked", "fast"])
def test_on_a_host_it_gives_what_the_published_rules_give(select: str, path: str) -> None:
    case = Case.read(CASE / "case.json")
    from transformers import ViTConfig, ViTModel

    width, hidden = case.given("w1").shape
    model = ViTModel(
        ViTConfig(
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            hidden_act=case.config["activation"],
        )
    ).eval()
    (ffn,) = find_ffns(model)
    for module, weight, bias in ((ffn.first, "w1", "b1"), (ffn.last, "w2", "b2")):
        module.weight.copy_(case.given(weight))
        module.bias.copy_(case.given(bias))
    config = method(
        num_experts=case.config["num_experts"],
        top_k=case.config["top_k"],
        select=select,
        path=path,
    )
    labels = case.given("labels").long()
    layout = Layout(config.name, config.to_dict(), [LayerLayout(ffn.name, labels)])
    config.restore(model, layout, permuted=False)
    (layer,) = routed_layers(model).values()
    seen = []
    layer.shared.record = lambda name, routing, real: seen.append(routing)
    entry = ffn.family.entry
    assert entry == "forward"
    y = ffn.block(case.given("x")) if path == "fast" else ffn_output(layer, case.given("x"))
    tolerance = {"atol": case.atol, "rtol": case.rtol}
    torch.testing.assert_close(y, case.expected(f"{select}.y"), **tolerance)
    torch.testing.assert_close(seen[0].scores, case.expected(f"{select}.scores"), **tolerance)
    assert torch.equal(seen[0].experts, case.expected(f"{select}.ids").long())


@pytest.mark.parametrize("split", PARTITIONS)
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_converting_and_merging_gives_every_bit_back(family: str, split: str) -> None:
    model = relu_model(family)
    before, config = states(model), model.config.to_dict()
    for select in SELECTS:
        moduli.convert(model, method(split=split, select=select), batch=inputs(family))
        sizes = {layer.sizes for layer in routed_layers(model).values()}
        assert sizes == {(tiny.NEURONS // E,) * E}
        assert moduli.merge(model, exact=True).exact
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert model.config.to_dict() == config


@torch.no_grad()
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("path", ["masked", "fast"])
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:the activation of this model")
def test_all_experts_together_are_the_dense_model(family: str, select: str, path: str) -> None:
    model = tiny.build(family)  # exact whatever the activation
    dense = model(**inputs(family)).logits
    batch = inputs(family)
    moduli.convert(model, method(select=select, top_k=E, path=path), batch=batch)
    torch.testing.assert_close(model(**inputs(family)).logits, dense)
    moduli.set_top_k(model, 1)
    assert not torch.allclose(model(**inputs(family)).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_masked_and_fast_paths_choose_the_same(family: str, select: str) -> None:
    model = converted(family, select=select)
    masked = model(**inputs(family, 5, seed=9)).logits
    fast = converted(family, select=select, path="fast")
    torch.testing.assert_close(fast(**inputs(family, 5, seed=9)).logits, masked)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_choice_captures_more_than_the_ground_truth(k: int) -> None:
    batch = inputs(count=8)
    shares = {}
    for select in SELECTS:
        model = converted(select=select, batch=batch)
        for name, layer in routed_layers(model).items():
            x, scores = carried(model, layer, batch)
            shares[select, name] = captured_share(layer.router.scores(x), scores, k)
    for (_select, name), share in shares.items():
        assert shares["ground_truth", name] >= share - 1e-9
    assert shares["ground_truth", name] > shares["similarity", name]


@torch.no_grad()
def test_what_experts_carry_is_the_positive_activation_per_length_of_the_real_tokens() -> None:
    batch = inputs(count=4)
    dense = relu_model()
    model = converted(batch=batch, split="random", layers=[1])
    (layer,) = routed_layers(model).values()
    x, scores = carried(model, layer, batch)
    assert len(x) == int(batch["attention_mask"].sum())
    ffn = find_ffns(dense)[1]
    labels = layout_of(model).layers[0].labels
    fired = torch.relu(ffn.first(x))
    by_hand = torch.stack([fired[:, labels == i].sum(-1) for i in range(E)], dim=-1)
    torch.testing.assert_close(scores, by_hand / x.norm(dim=-1, keepdim=True))


def test_the_fit_helps_is_seeded_and_leaves_nothing_to_train() -> None:
    batches = [inputs(count=24, seed=i) for i in range(4)]
    lines: list[str] = []
    model = relu_model()
    moduli.convert(
        model, method(select="mlp", router_epochs=20), batch=batches, progress=lines.append
    )
    routers = [layer.router for layer in routed_layers(model).values()]
    assert all(isinstance(r, MLPRouter) for r in routers)
    assert not any(p.requires_grad or p.grad is not None for r in routers for p in r.parameters())
    assert sum("of the positive activation" in line for line in lines) == 2
    fits = fit_routers(model, batches, epochs=0)
    untrained = converted(select="mlp", router_epochs=0, batch=batches)
    starts = fit_routers(untrained, batches, epochs=0)
    assert all(fits[name].best > starts[name].best for name in fits)
    twin = relu_model()
    moduli.convert(twin, method(select="mlp", router_epochs=20), batch=batches)
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())
    other = relu_model()
    moduli.convert(other, method(select="mlp", router_epochs=20, seed=5), batch=batches)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            routers[0].parameters(),
            next(iter(routed_layers(other).values())).router.parameters(),
            strict=True,
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_it_comes_back_bit_for_bit_without_data(tmp_path: Path, select: str, how: str) -> None:
    model = tiny.build("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moduli.convert(model, method(select=select), batch=inputs("gpt2"))
    (moduli.save if how == "save" else lambda m, d: m.save_pretrained(d))(model, tmp_path)
    again = moduli.load(tmp_path)
    assert torch.equal(again(**inputs("gpt2")).logits, model(**inputs("gpt2")).logits)
    if select == "mlp":
        trained = next(iter(routed_layers(model).values())).router.first.weight
        assert torch.equal(next(iter(routed_layers(again).values())).router.first.weight, trained)
        assert not any(
            p.requires_grad for x in routed_layers(again).values() for p in x.router.parameters()
        )


@pytest.mark.parametrize("changes", [{"select": "mlp"}, {"split": "coactivation"}], ids=str)
def test_without_data_it_says_what_to_give_and_changes_nothing(changes: dict[str, Any]) -> None:
    model = relu_model()
    before = states(model)
    with pytest.raises(ConfigError, match=r"looks at data.*batch=batch"):
        moduli.convert(model, method(**changes))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not moduli.is_modular(model)


def test_too_little_data_is_said() -> None:
    one = {name: t[:1, :4] for name, t in inputs(count=1).items()}
    with pytest.raises(DataError, match="10 tokens"):
        converted(select="mlp", batch=one)


def test_it_warns_where_neurons_are_never_silent() -> None:
    with pytest.warns(UserWarning, match="not 0 for negative numbers"):
        moduli.convert(tiny.build("bert"), method())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(select="similarity")


def test_routers_are_fitted_only_where_there_are_some() -> None:
    with pytest.raises(ModelError, match="no router to fit"):
        fit_routers(converted(select="similarity"), inputs())


@torch.no_grad()
def test_the_ground_truth_follows_what_the_projection_computes() -> None:
    model = converted(select="ground_truth")
    layer = next(iter(routed_layers(model).values()))
    assert isinstance(layer.router, GroundTruthRouter)
    x = torch.randn(7, tiny.WIDTH)
    layer.ffn.first.weight.add_(torch.randn_like(layer.ffn.first.weight))
    z = layer.ffn.first(x)
    from_z = layer.router.from_preactivations(z, layer.ffn.key_bias())
    torch.testing.assert_close(layer.router.scores(x), from_z)
    twin = copy.deepcopy(model)
    next(iter(routed_layers(twin).values())).ffn.first.weight.zero_()
    torch.testing.assert_close(layer.router.scores(x), from_z)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 7}, "top_k is 7"),
        ({"split": "graph"}, "'coactivation'"),
        ({"select": "oracle"}, "'ground_truth'"),
        ({"router_lr": 0.0}, "router_lr"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**changes)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the activation of this model")
def test_on_a_real_model_the_fitted_router_beats_similarity(minilm_path: Path) -> None:
    from pydoc_data.topics import topics

    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    lines = [line for page in topics.values() for line in page.splitlines() if len(line) > 60]
    batches = [
        dict(tokenizer(lines[i : i + 32], padding=True, return_tensors="pt"))
        for i in range(0, 96, 32)
    ]
    unseen = dict(tokenizer(lines[200:232], padding=True, return_tensors="pt"))
    shares = {}
    for select in SELECTS:
        model = AutoModel.from_pretrained(minilm_path)
        config = method(
            num_experts=64,
            top_k=13,
            select=select,
            split="contiguous",
            router_epochs=8,
            layers=[4],
        )
        moduli.convert(model, config, batch=batches)
        (layer,) = routed_layers(model).values()
        x, scores = carried(model, layer, unseen)
        shares[select] = captured_share(layer.router.scores(x), scores, 13)
    assert shares["ground_truth"] > shares["mlp"] > shares["similarity"]
