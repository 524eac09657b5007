"""What cannot work is refused before anything is changed, and the message says what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moduli
from moduli.errors import ConfigError, ModelError, UnknownNameError
from moduli.surgery.locate import find_ffns, survey
from tests.surgery.test_roundtrip import digests, emoe, make


def test_no_ffn_found_says_what_was_looked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ModelError, match=r"no FFN found in Sequential.*fc1, fc2"):
        moduli.convert(model, emoe())


def test_near_misses_are_explained() -> None:
    model = make("vit")
    model.vit.layers[0].mlp.fc2 = nn.Linear(36, 8)
    mlp = model.vit.layers[1].mlp
    mlp.activation = mlp.activation_fn  # as if a newer transformers had renamed it
    del mlp.activation_fn
    found, rejected = survey(model)
    assert not found
    reasons = {r.name: r.reason for r in rejected}
    assert "fc2 maps 36 to 8" in reasons["vit.layers.0.mlp"]
    assert "does not run" in reasons["vit.layers.1.mlp"]
    with pytest.raises(ModelError, match="fc2 maps 36 to 8"):
        find_ffns(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, r"top_k is 9, but there are 6 experts; choose 1 to 6"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"num_experts": 0}, r"num_experts is 0"),
        ({"aux": "load_importance"}, r"needs noise > 0"),
        ({"gate": "cosine", "gate_momentum": 0.5}, r"gate_momentum is for gate='avgk'"),
        ({"gate": "cosine", "select": "up"}, r"select='up' is for gate='avgk'"),
        ({"gate_momentum": 1.0}, r"0 <= m < 1"),
        ({"choose": "not_top", "top_k": 6}, r"leaves no expert"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        emoe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 40, "top_k": 2}, r"num_experts is 40, but the FFN has 36 neurons"),
        ({"select": "up"}, r"select='up' needs a gated FFN"),
        ({"layers": "lst:2"}, r"layers='lst:2' is not understood; it may be \"all\""),
        ({"layers": "last:9"}, r"the model has only 2 FFNs"),
        ({"layers": [0, 7]}, r"\[7\] out of range, the model has 2 FFNs"),
        ({"layers": []}, r"not understood"),
        ({"layers": "*.nothing"}, r"no FFN has a name like '\*\.nothing'.*bert\.encoder"),
    ],
)
def test_settings_that_do_not_fit_the_model_leave_it_untouched(
    settings: dict[str, Any], message: str
) -> None:
    model = make("bert")
    before = digests(model)
    with pytest.raises(ConfigError, match=message):
        moduli.convert(model, emoe(**settings))
    assert digests(model) == before
    assert not moduli.is_modular(model)


@pytest.mark.parametrize(
    ("spec", "indices"),
    [
        ("all", [0, 1]),
        ("last:1", [1]),
        ("first:1", [0]),
        ("every:2", [1]),
        ([0], [0]),
        ([-1], [1]),
        ("*.layer.0", [0]),
        (["bert.encoder.layer.1", "*.0"], [0, 1]),
        ("bert.encoder.layer.1", [1]),
    ],
)
def test_layer_specs(spec: Any, indices: list[int]) -> None:
    model = make("bert")
    report = moduli.convert(model, emoe(layers=spec))
    assert report is not None
    assert [layer.name for layer in report.layers] == [f"bert.encoder.layer.{i}" for i in indices]


def test_unknown_methods_and_names_get_suggestions() -> None:
    with pytest.raises(UnknownNameError, match=r"no method 'emo'. Did you mean 'emoe' or 'gmoe'\?"):
        moduli.convert(make("bert"), "emo")
    with pytest.raises(AttributeError, match="EMoEE"):
        _ = moduli.EMoEE
    with pytest.raises(ConfigError, match="Did you mean 'top_k'"):
        moduli.EMoE.from_dict({"topk": 3})


def test_something_that_is_no_method(without_shape_checks: None) -> None:
    with pytest.raises(ConfigError, match="expected a config such as"):
        moduli.convert(make("bert"), 3)  # type: ignore[arg-type]


def test_converting_twice_and_merging_dense_models() -> None:
    model = make("bert")
    with pytest.raises(ModelError, match="no routed layers"):
        moduli.merge(model)
    with pytest.raises(ModelError, match="no routed layers"), moduli.dense(model):
        pass
    moduli.convert(model, emoe())
    with pytest.raises(ModelError, match="modular already"):
        moduli.convert(model, emoe())
    with pytest.raises(ConfigError, match="choose 1 to 6"):
        moduli.set_top_k(model, 7)


def test_weights_that_are_not_finite_are_not_clustered() -> None:
    model = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = float("nan")
    before = digests(model)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        moduli.convert(model, emoe())
    assert digests(model) == before
    assert not moduli.is_modular(model)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        from tests.tiny import MODELS

        model = MODELS["llama"]()
    with pytest.raises(ModelError, match="meta device"):
        moduli.convert(model, emoe())
