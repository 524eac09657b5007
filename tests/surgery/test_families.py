"""Families whose blocks do more than an FFN, or have changed: nothing is bypassed, all is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moduli
from moduli.errors import ModelError
from moduli.surgery.locate import find_ffns
from moduli.surgery.modular import routed_layers
from tests import families

METHODS: dict[str, moduli.Method] = {
    "split": moduli.EMoE(num_experts=6, top_k=2, layers="all", path="fast"),
    "owned": moduli.GMoE(num_experts=3, layers="all", projection=8),
}


class DropsLast(families.OwnFFN):
    """Dropout after the last projection, from a module that was registered before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.shrink(self.nonlinearity(self.expand(x))))


def own_blocks() -> Any:
    model = families.tiny.vit()
    for layer in model.vit.layers:
        layer.mlp = DropsLast(gated=False)
    return model.eval()


def drop_everything(block: nn.Module) -> None:
    """Set the dropout behind the last projection to 1, however the block keeps it."""
    for name in ("residual_dropout", "dropout"):
        if isinstance(getattr(block, name, None), float):
            setattr(block, name, 1.0)
    for name in ("drop", "drop2", "output_dropout"):
        if hasattr(block, name):
            getattr(block, name).p = 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["starcoder2", "xlm", "wav2vec2", "timm-mlp", "drops last"])
def test_dropout_behind_the_last_projection_is_not_lost(family: str, method: str) -> None:
    model = own_blocks() if family == "drops last" else families.build(family)
    blocks = [ffn.block for ffn in find_ffns(model)]
    x = torch.randn(2, 5, families.WIDTH)
    for block in blocks:
        drop_everything(block)
        block.train()
        assert not block(x).any(), "the dropout is elsewhere; the test proves nothing"
    moduli.convert(model, METHODS[method])
    model.train()
    for name, layer in routed_layers(model).items():
        block = model.get_submodule(name)
        assert not block(x).any(), type(layer)
        block.eval()
        assert block(x).any()


@pytest.mark.parametrize("family", ["bert", "megatron-bert", "bloom", "xlm", "gpt-j"])
def test_what_a_block_does_besides_is_kept_where_the_fast_path_is_asked_for(family: str) -> None:
    """Residuals, LayerNorms in other places than BERT's: the fast path takes over none of them."""
    batch, outputs = families.inputs(family), []
    for path in ("masked", "fast"):
        model = families.build(family)
        moduli.convert(model, moduli.EMoE(num_experts=6, top_k=2, layers="all", path=path))
        outputs.append(families.outputs(model, batch))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


RENAMED: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bart": ("activation_fn", lambda block: block),
    "opt": ("fc1", lambda block: block),
    "bert": ("intermediate_act_fn", lambda block: block.get_submodule("intermediate")),
}


@pytest.mark.parametrize("family", RENAMED)
def test_an_attribute_with_another_name_is_named_by_the_error(family: str) -> None:
    """As a newer transformers might rename it."""
    attribute, owner_of = RENAMED[family]
    model = families.build(family)
    for ffn in find_ffns(model):
        owner = owner_of(ffn.block)
        module = getattr(owner, attribute)
        delattr(owner, attribute)
        setattr(owner, f"{attribute}_renamed", module)
    with pytest.raises(ModelError, match=rf"looks like [\w-]+, but has no [\w.]*{attribute}\n"):
        moduli.convert(model, "emoe")


@pytest.mark.parametrize("family", families.REFUSED)
def test_families_without_a_convertible_ffn_are_left_alone(family: str) -> None:
    model = families.build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in METHODS.values():
        with pytest.raises(ModelError, match="no FFN found in"):
            moduli.convert(model, method)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not moduli.is_modular(model)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt-oss"])
def test_a_model_that_has_experts_is_told_so(family: str) -> None:
    with pytest.raises(ModelError, match=r"experts: is a bank of experts already"):
        moduli.convert(families.build(family), "emoe")


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, "hash"])
def test_texts_to_choose_from_are_rows_with_ids_and_padding(method: str) -> None:
    """[batch, choices, tokens], also in what a conversion is measured on."""
    config = families.tr.BertConfig(**families._ENCODER)
    model = families.tiny.initialise(lambda: families.tr.BertForMultipleChoice(config))
    hashed = moduli.HashLayers(num_experts=3, layers="all")
    report = moduli.convert(model, {**METHODS, "hash": hashed}[method])
    assert report is not None
    assert report.probe == "128 random tokens"
    assert all(layer.error is not None for layer in report.layers)
    ids = torch.randint(3, families.VOCAB, (2, 3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 5, 2])[:, None]).expand_as(ids).long()
    seen: list[Tensor | None] = []
    shared = next(iter(routed_layers(model).values())).shared
    shared.record = lambda name, routing, real: seen.append(real)
    assert model(ids, mask).logits.shape == (2, 3)
    assert len(seen) == families.LAYERS
    assert all(real is not None and torch.equal(real, mask.flatten().bool()) for real in seen)
