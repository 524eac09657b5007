"""Padding, packed sequences, and what the routers say of real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moduli.losses.mutual_information import mutual_information_loss, router_statistics
from tests.models.moduleformer import small

KINDS: dict[str, dict[str, Any]] = {
    "projections": {}, "published": small.PUBLISHED_KIND, "linear": {"gate_type": "linear"},
    "gmm": {"gate_type": "gmm"},
}  # fmt: skip
MASKS = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    "middle": [1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1],
    "everywhere": [0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0],
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return small.build(**KINDS[request.param])


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("kind", [int, bool, float])
def test_padding_anywhere_is_not_seen(model: Any, where: str, kind: type) -> None:
    ids, mask = small.tokens(1), torch.tensor([MASKS[where]])
    whole = model(ids, attention_mask=mask.to(torch.tensor(kind(1)).dtype)).logits
    near(whole[mask.bool()], model(ids[mask.bool()][None]).logits[0])


def test_a_row_that_is_all_padding_is_finite_and_leaves_the_others_alone(model: Any) -> None:
    ids, mask = small.tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    near(out.logits[1:], model(ids[1:]).logits)


def test_nothing_but_padding_has_finite_losses(model: Any) -> None:
    model.config.aux_loss_weight = model.config.concentration_weight = 0.1
    ids = small.tokens()
    out = model(ids, attention_mask=torch.zeros_like(ids), labels=ids)
    assert out.loss.isfinite()
    assert out.aux_loss.isfinite()


def test_packed_sequences_are_what_each_is_alone(model: Any) -> None:
    ids = small.tokens(1)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]])
    whole = model(ids, position_ids=positions).logits
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 12)):
        near(whole[:, start:end], model(ids[:, start:end]).logits)
    assert (whole[:, 3:] - model(ids).logits[:, 3:]).abs().max() > 1e-2


def test_ordinary_positions_mean_nothing(model: Any) -> None:
    ids = small.tokens()
    assert torch.equal(model(ids, position_ids=torch.arange(12)[None]).logits, model(ids).logits)
    shifted = torch.arange(7, 19)[None]
    assert torch.equal(model(ids, position_ids=shifted).logits, model(ids).logits)


@pytest.mark.parametrize("where", MASKS)
def test_load_counts_real_tokens(model: Any, where: str) -> None:
    ids, mask = small.tokens(), torch.tensor([[1] * 12, MASKS[where]])
    out = model(ids, attention_mask=mask, output_router_logits=True)
    assert len(out.router_load) == len(out.router_logits) == len(out.router_experts) == 4
    for i, (load, logits, experts) in enumerate(
        zip(out.router_load, out.router_logits, out.router_experts, strict=True)
    ):
        number = small.SIZES["n_mlp_experts" if i % 2 else "n_att_experts"]
        assert load.shape == (number,)
        assert logits.shape == (24, number)
        assert int(load.sum()) == 2 * int(mask.sum())  # two experts per token
        assert torch.equal(
            load, experts[mask.flatten().bool()].flatten().bincount(minlength=number)
        )


def test_losses_leave_padding_out_unless_it_is_counted(model: Any) -> None:
    ids, mask = small.tokens(), torch.tensor([[1] * 12, MASKS["everywhere"]])
    real = mask.flatten().bool()

    def loss() -> tuple[Tensor, Tensor, Tensor]:
        out = model(ids, attention_mask=mask, output_router_logits=True)
        seen = list(zip(out.router_logits, out.router_experts, strict=True))
        alone = sum(mutual_information_loss(router_statistics(s[real], e[real])) for s, e in seen)
        counted = sum(mutual_information_loss(router_statistics(s, e)) for s, e in seen)
        return out.aux_loss, alone, counted

    found, alone, counted = loss()
    near(found, alone)
    model.config.count_padding = True
    found, alone, counted = loss()
    near(found, counted)
    assert (alone - counted).abs() > 1e-3


def test_a_text_ends_at_its_last_real_token() -> None:
    from moduli.models.moduleformer import ModuleFormerForSequenceClassification as Classifier

    model = small.build(auto=Classifier, num_labels=3)
    ids = small.tokens(1)
    for where in MASKS:
        mask = torch.tensor([MASKS[where]])
        alone = model(ids[mask.bool()][None]).logits
        near(model(ids, attention_mask=mask).logits, alone)
    model.config.pad_token_id = 0
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1).repeat(2, 1)
    near(model(padded).logits, model(ids).logits.repeat(2, 1))
