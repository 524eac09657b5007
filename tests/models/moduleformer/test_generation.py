"""Generation: every way of going on from a cache says what one whole pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moduli.errors import ConfigError
from tests.models.moduleformer import small

NEW = 6
KINDS: dict[str, dict[str, Any]] = {"projections": {}, "published": small.PUBLISHED_KIND}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return small.build(**KINDS[request.param])


def generated(model: Any, ids: Tensor, seed: int = 0, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)  # or token 0 in a text would be padding
    found: Tensor = model.generate(ids, **settings | options)
    return found


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_greedy_is_the_best_token_of_whole_passes(model: Any) -> None:
    ids = small.tokens()
    found = generated(model, ids, do_sample=False)
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)
    assert len(found[:, -NEW:].unique()) > 2  # not one token for ever


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_nothing(model: Any, way: str) -> None:
    ids = small.tokens()
    with_cache = generated(model, ids, use_cache=True, **WAYS[way])
    assert torch.equal(with_cache, generated(model, ids, use_cache=False, **WAYS[way]))
    assert with_cache.shape == (4 if way == "beams" else 2, ids.shape[1] + NEW)


def test_beams_find_a_likelier_text_than_greedy(model: Any) -> None:
    ids = small.tokens(1)

    @torch.no_grad()
    def likelihood(text: Tensor) -> float:
        scores = model(text).logits.log_softmax(-1)[:, :-1]
        each = scores.gather(2, text[:, 1:, None])[:, ids.shape[1] - 1 :]
        return float(each.sum())

    wide = generated(model, ids, num_beams=8)
    assert likelihood(wide) >= likelihood(generated(model, ids, do_sample=False))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_padding_on_the_left_is_not_seen(model: Any, way: str) -> None:
    ids = small.tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    found = generated(model, padded, attention_mask=(padded != 0).long(), **WAYS[way])
    assert torch.equal(found[:, 3:], generated(model, ids, **WAYS[way]))


def test_rows_of_different_lengths_are_what_each_is_alone(model: Any) -> None:
    ids = small.tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    both = generated(model, ids * mask, attention_mask=mask, do_sample=False)
    alone = generated(model, ids[1:, 5:], do_sample=False)
    assert torch.equal(both[1:, 5:], alone)
    assert torch.equal(both[:1], generated(model, ids[:1], do_sample=False))


def test_padding_on_the_right_gives_the_logits_of_the_text_alone(model: Any) -> None:
    ids = small.tokens()
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    found = model(padded, attention_mask=(padded != 0).long()).logits[:, :-4]
    near(found, model(ids).logits)


def test_a_past_goes_on_where_it_stopped(model: Any) -> None:
    ids = small.tokens(length=12)
    whole = model(ids).logits
    past = None
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        out = model(ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    near(torch.cat(parts, dim=1), whole)
    assert past.get_seq_length() == 12


def test_a_masked_past_goes_on_where_it_stopped(model: Any) -> None:
    ids, mask = small.tokens(length=12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = mask[1, 4:6] = 0  # padding of the past, on the left and in the middle
    whole = model(ids, attention_mask=mask).logits
    past = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    rest = model(ids[:, 8:], attention_mask=mask, past_key_values=past, use_cache=True).logits
    near(rest, whole[:, 8:])


def test_generation_goes_on_from_what_it_returned(model: Any) -> None:
    ids = small.tokens()
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first: Any = generated(model, ids, **settings, max_new_tokens=3)
    second: Any = generated(
        model, first.sequences, **settings, max_new_tokens=3, past_key_values=first.past_key_values
    )
    assert torch.equal(second.sequences, generated(model, ids, do_sample=False))


def test_long_prompts_are_read_in_chunks(model: Any) -> None:
    ids = small.tokens(length=20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = generated(model, ids * mask, attention_mask=mask, do_sample=False)
    chunks = generated(
        model, ids * mask, attention_mask=mask, do_sample=False, prefill_chunk_size=6
    )
    assert torch.equal(whole, chunks)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 11])])
def test_logits_of_some_places_only(model: Any, keep: int | Tensor) -> None:
    ids = small.tokens()
    places = slice(-keep, None) if isinstance(keep, int) else keep
    near(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, places])


def test_an_assistant_changes_nothing(model: Any) -> None:
    """Assisted generation takes back tokens that it does not keep from the cache."""
    ids = small.tokens(1)
    alone = generated(model, ids, do_sample=False)
    assistant = small.build(1, **KINDS["projections"])
    assert torch.equal(alone, generated(model, ids, do_sample=False, assistant_model=assistant))
    assert torch.equal(alone, generated(model, ids, do_sample=False, prompt_lookup_num_tokens=2))


def test_embeddings_may_start_a_text(model: Any) -> None:
    ids = small.tokens()
    found = model.generate(
        inputs_embeds=model.transformer.wte(ids),
        do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(found, generated(model, ids, do_sample=False)[:, ids.shape[1] :])


def test_a_static_cache_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"static cache.*leave out cache_implementation"):
        generated(model, small.tokens(), cache_implementation="static")


def test_the_usual_cache_by_its_name(model: Any) -> None:
    ids = small.tokens()
    found = generated(model, ids, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(found, generated(model, ids, do_sample=False))


def test_shared_keys_and_values_are_kept_once() -> None:
    model = small.build(**small.PUBLISHED_KIND)
    past = model(small.tokens(), use_cache=True).past_key_values
    assert {layer.keys.shape for layer in past.layers} == {(2, 1, 12, small.WIDTH)}
    assert {layer.values.numel() for layer in past.layers} == {0}


def test_the_past_is_not_looked_at_without_cache(model: Any) -> None:
    ids = small.tokens()
    past = model(ids[:, :5], use_cache=True).past_key_values
    near(
        model(ids[:, 5:], past_key_values=past, use_cache=False).logits,
        model(ids[:, 5:]).logits,
    )
