"""EMoE with repeated clusters (experts that overlap) and with splits from data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

import moduli
from moduli.errors import ConfigError, ModelError
from moduli.surgery.layout import Layout, OwnedLayout
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.probe import ffn_output
from tests import tiny
from tests.parity.adapters.emoe import members_for
from tests.parity.case import Case

CASES = Path(__file__).parents[2] / "parity" / "data" / "emoe"
E, K = 6, 2


def emoe(**changes: Any) -> moduli.EMoE:
    settings = {"num_experts": E, "top_k": K, "layers": "last:1", "expert_repeat": 2, **changes}
    return moduli.EMoE(**settings)


def inputs(family: str = "bert", count: int = 3) -> dict[str, Tensor]:
    made = tiny.batch(tiny.rows(family, count))
    del made["labels"]
    return made


def converted(family: str = "bert", **changes: Any) -> tuple[Any, OwnedExperts]:
    model = tiny.build(family)
    moduli.convert(model, emoe(**changes))
    (layer,) = routed_layers(model).values()
    return model, layer


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp_bert_avgk_overlap2", "mlp_bert_gmoe_repeatN"])
def test_on_a_host_it_gives_what_the_reference_gave(name: str) -> None:
    case = Case.read(CASES / name / "case.json")
    config = case.config
    width, hidden = case.given("w1").shape
    model = ViTModel(
        ViTConfig(
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).eval()
    (ffn,) = moduli.surgery.locate.find_ffns(model)
    for module, weight, bias in ((ffn.first, "w1", "b1"), (ffn.last, "w2", "b2")):
        module.weight.copy_(case.given(weight))
        module.bias.copy_(case.given(bias))
    cosine = str(config["gate"]).startswith("cosine")
    method = moduli.EMoE(
        num_experts=config["num_experts"],
        top_k=config["top_k"],
        expert_repeat=config["expert_repeat"],
        gate="cosine" if cosine else "avgk",
        preset="paper",
    )
    members = tuple(members_for(case, width))
    layout = Layout(method.name, method.to_dict(), [OwnedLayout(ffn.name, members)])
    method.restore(model, layout, permuted=False)
    (layer,) = routed_layers(model).values()
    if cosine:
        gate = layer.router
        gate.projector.weight.copy_(case.given("cos_proj_weight"))
        gate.projector.bias.copy_(case.given("cos_proj_bias"))
        gate.directions.copy_(case.given("cos_sim_matrix"))
        gate.temperature.copy_(case.given("cos_temperature"))
    y = ffn_output(layer.eval(), case.given("x"))
    torch.testing.assert_close(y, case.expected("y"), atol=case.atol, rtol=case.rtol)
    if case.expects("gate_weight") and not cosine:
        torch.testing.assert_close(layer.router.current_gate(), case.expected("gate_weight"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("split", ["cluster", "random", "contiguous"])
def test_expert_i_has_clusters_i_to_i_plus_r(family: str, split: str) -> None:
    clusters = tiny.build(family)
    moduli.convert(clusters, emoe(expert_repeat=1, split=split))
    (entry,) = moduli.surgery.convert.layout_of(clusters).layers
    _, layer = converted(family, expert_repeat=3, split=split)
    for i, members in enumerate(layer.members):
        assert members.tolist() == sorted(members.tolist())
        of = entry.labels[members]
        assert set(of.tolist()) == {i, (i + 1) % E, (i + 2) % E}
        assert len(members) == sum(entry.sizes[c] for c in set(of.tolist()))


@torch.no_grad()
def test_the_gate_is_the_mean_key_of_the_enlarged_expert_and_follows_training() -> None:
    model, layer = converted()
    dense = moduli.surgery.locate.find_ffns(tiny.build("bert"))[-1]
    means = torch.stack([dense.keys()[m].mean(0) for m in layer.members])
    torch.testing.assert_close(layer.router.current_gate(), means)
    layer.experts.up_proj[3] += 1.0
    means[3] += 1.0
    torch.testing.assert_close(layer.router.current_gate(), means)
    twin = copy.deepcopy(model)
    (other,) = routed_layers(twin).values()
    other.experts.up_proj[0] += 5.0
    torch.testing.assert_close(layer.router.current_gate(), means)  # a copy follows its own keys
    assert not torch.allclose(other.router.current_gate(), means)


@torch.no_grad()
@pytest.mark.parametrize("bias", ["shared", "split"])
def test_the_output_is_the_sum_of_the_chosen_experts(bias: str) -> None:
    _, layer = converted(out_bias=bias)
    ffn = moduli.surgery.locate.find_ffns(tiny.build("bert"))[-1]
    x = torch.randn(5, tiny.WIDTH)
    chosen = layer.router.scores(x).topk(K).indices
    hidden = ffn.activation(ffn.first(x))
    expected = ffn.last.bias.expand_as(x).clone()
    for t in range(len(x)):
        for i in chosen[t].tolist():
            m = layer.members[i]
            expected[t] += ffn.last.weight[:, m] @ hidden[t, m]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"gate": "cosine"}], ids=str)
def test_untrained_copies_merge_to_what_was_there(family: str, changes: dict[str, Any]) -> None:
    if family == "llama" and changes.get("preset"):
        with pytest.raises(ConfigError, match="gated FFN"):
            converted(family, **changes)
        return
    model, _ = converted(family, **changes)
    before = tiny.build(family).state_dict()
    with pytest.raises(ModelError, match="overlap"):
        moduli.merge(model, exact=True)
    moduli.merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("repeat", [3, E])
def test_merging_trained_copies_averages_and_says_so(repeat: int) -> None:
    model, layer = converted(expert_repeat=repeat)
    with torch.no_grad():
        layer.experts.up_proj[1] += 1.0
    keys = moduli.surgery.locate.find_ffns(tiny.build("bert"))[-1].keys()
    expected = keys.detach().clone()
    expected[layer.members[1]] += 1.0 / repeat
    with pytest.raises(ModelError, match="cannot be merged exactly"):
        moduli.merge(model, exact=True)
    report = moduli.merge(model)
    assert not report.exact
    merged = moduli.surgery.locate.find_ffns(model)[-1].keys()
    torch.testing.assert_close(merged.detach(), expected)


def test_whole_copies_that_are_added_up_are_no_dense_layer() -> None:
    model, _ = converted(expert_repeat=E)
    with pytest.raises(ModelError, match="cannot be merged exactly"):
        moduli.merge(model, exact=True)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"gate": "linear"}], ids=str)
@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_it_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any], how: str) -> None:
    model, layer = converted(**changes)
    layer.experts.up_proj.add_(torch.randn_like(layer.experts.up_proj))
    model.train()(**inputs())  # a kept gate is due for an update now
    model.eval()
    (moduli.save if how == "save" else lambda m, d: m.save_pretrained(d))(model, tmp_path)
    again = moduli.load(tmp_path)
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)


def test_coactivation_splits_by_what_fires_together_and_needs_inputs() -> None:
    model = tiny.build("bert")
    method = emoe(split="coactivation", expert_repeat=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"coactivation.*batch=batch"):
        moduli.convert(model, method)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    batches = [inputs(count=4), inputs(count=2)]
    moduli.convert(model, method, batch=batches)
    (entry,) = moduli.surgery.convert.layout_of(model).layers
    again = tiny.build("bert")
    moduli.convert(again, method, batch=batches)
    assert torch.equal(moduli.surgery.convert.layout_of(again).layers[0].labels, entry.labels)
    other = tiny.build("bert")
    moduli.convert(other, emoe(expert_repeat=1))
    assert not torch.equal(moduli.surgery.convert.layout_of(other).layers[0].labels, entry.labels)
    assert entry.sizes == (6,) * 6
    moduli.merge(model, exact=True)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_repeated_clusters_of_a_data_split() -> None:
    model = tiny.build("gpt2")
    moduli.convert(model, emoe(split="coactivation"), batch=inputs("gpt2"))
    (layer,) = routed_layers(model).values()
    counts = torch.bincount(torch.cat(layer.members), minlength=tiny.NEURONS)
    assert counts.tolist() == [2] * tiny.NEURONS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_repeat": 0}, "expert_repeat is 0"),
        ({"expert_repeat": E + 1}, "expert_repeat is 7"),
        ({"select": "up"}, "select='gate'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        emoe(**changes)
