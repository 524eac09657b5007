"""Converted decoders generate: every family, cache, search and padding side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moduli
from tests import families

QUICK = ("gpt2", "llama", "t5")
LENGTH = 6
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
}
# Audio prompts have one length; encoders of BART's kind count positions from the left edge.
PADDED = [
    (family, side)
    for family in families.GENERATIVE
    for side in ("left", "right")
    if family != "whisper" and (side == "right" or family not in ("bart", "marian"))
]


def marked(*values: str) -> Any:
    """A test parameter; slow unless its family is one of the quick ones."""
    return pytest.param(*values, marks=[] if values[0] in QUICK else pytest.mark.slow)


every_family = pytest.mark.parametrize("family", [marked(f) for f in families.GENERATIVE])


def converted(family: str, top_k: int) -> Any:
    model = families.build(family)
    moduli.convert(model, moduli.EMoE(num_experts=6, top_k=top_k, layers="all"))
    return model


def prompts(family: str, side: str = "left") -> dict[str, Tensor]:
    """Two prompts, the second of them shorter and padded."""
    generator = torch.Generator().manual_seed(1)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    ids = torch.randint(3, families.VOCAB, (2, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if side == "left" else slice(3, 5)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, batch: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens of both prompts, and the logits that they were chosen by."""
    torch.manual_seed(0)
    found = model.generate(
        **batch,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("search", SEARCHES)
@every_family
def test_with_every_expert_the_tokens_are_those_of_the_dense_model(
    family: str, search: str
) -> None:
    batch = prompts(family, "right" if family in families.SEQ2SEQ else "left")
    dense, _ = generate(families.build(family), batch, **SEARCHES[search])
    routed, _ = generate(converted(family, 6), batch, **SEARCHES[search])
    assert dense.shape[1] >= LENGTH
    assert torch.equal(routed, dense)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_family
def test_a_cache_changes_nothing(family: str, cache: str) -> None:
    """One new token at a time is routed as it is within the whole sequence."""
    model = converted(family, 2)
    batch = prompts(family)
    plain, expected = generate(model, batch, use_cache=False)
    cached, logits = generate(model, batch, cache_implementation=cache)
    assert torch.equal(cached, plain)
    assert float((logits - expected).norm() / expected.norm()) < 1e-4
    with moduli.dense(model):
        assert not torch.allclose(generate(model, batch)[1], logits, atol=1e-2)


@every_family
def test_sampling_follows_its_seed(family: str) -> None:
    model = converted(family, 2)
    one, two = (generate(model, prompts(family), **SEARCHES["sampling"]) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(("family", "side"), [marked(*pair) for pair in PADDED])
def test_padding_changes_no_prompt(family: str, side: str) -> None:
    """Logits of a padded prompt are those of the prompt alone, at its real tokens."""
    model = converted(family, 2)
    batch = prompts(family, side)
    real = batch["attention_mask"][1].bool()
    alone = {name: tensor[1:, real] for name, tensor in batch.items()}
    if family in families.SEQ2SEQ:
        start = torch.tensor([[1, 7, 9]])
        padded = model(**batch, decoder_input_ids=start.expand(2, -1)).logits[1]
        expected = model(**alone, decoder_input_ids=start).logits[0]
    else:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        given = {} if family == "opt" else {"position_ids": positions}
        padded = model(**batch, **given).logits[1][real]
        expected = model(**alone).logits[0]
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
