"""Inference modes: what each computes, and that a sentence's experts are its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor

import moduli
from moduli.errors import ModelError
from moduli.methods.thor.chooser import MODES, ThorChooser
from moduli.methods.thor.outputs import mean_prediction
from moduli.methods.thor.passes import passes_of
from moduli.surgery.stochastic import StochasticProjection
from tests import families, tiny
from tests.methods.thor.models import build, labelled, only, parted

GENERATIVE = ["llama", "gpt2", "t5", "bart"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "t5-gated", "marian"])
def test_equal_experts_are_the_dense_model_in_every_mode(family: str) -> None:
    batch = families.inputs(family)
    expected = families.build(family)(**batch).logits
    model = build(family)
    for mode in (*MODES, "fixed:0", "fixed:2"):
        moduli.set_inference(model, mode)
        found = model(**batch).logits
        # An ensemble says probabilities, which logits are up to a constant.
        wanted = expected.log_softmax(-1) if mode == "ensemble_prob" else expected
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_modes_of_a_single_or_all_experts(family: str) -> None:
    model, batch = parted(build(family)), families.inputs(family)
    alone = [only(model, e)(**batch).logits for e in range(3)]
    assert not torch.allclose(alone[0], alone[1], atol=0.1)
    for e, expected in enumerate(alone):
        moduli.set_inference(model, f"fixed:{e}")
        assert torch.equal(model(**batch).logits, expected)
    moduli.set_inference(model, "ensemble_prob")
    mean = torch.stack([one.softmax(-1) for one in alone]).mean(0)
    torch.testing.assert_close(model(**batch).logits.exp(), mean, rtol=1e-4, atol=1e-6)
    moduli.set_inference(model, "average")
    average = model(**batch).logits
    moduli.merge(model)
    assert torch.equal(model(**batch).logits, average)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_ensemble_of_a_layer_is_the_mean_of_its_outputs(family: str) -> None:
    """Of the last layer, which an untied head would make logits of by a linear map alone."""
    model, batch = parted(build(family, layers=[-1])), families.inputs(family)
    last = [m for m in model.modules() if isinstance(m, StochasticProjection) and m.last]
    seen: list[Tensor] = []
    last[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    for mode in ("fixed:0", "fixed:1", "fixed:2", "ensemble_layer"):
        moduli.set_inference(model, mode)
        model(**batch)
    torch.testing.assert_close(seen[3], torch.stack(seen[:3]).mean(0))


@torch.no_grad()
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("random")])
def test_random_modes_are_seeded_and_mix_experts(mode: str) -> None:
    model = parted(build("bert", layers=[0]))
    batch = {"input_ids": torch.randint(3, families.VOCAB, (12, 9))}
    layer = next(m for m in model.modules() if isinstance(m, StochasticProjection) and m.last)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for experts in range(3):
        moduli.set_inference(model, f"fixed:{experts}")
        model(**batch)
    for seed in (1, 1, 2, 3, 4, 5):
        moduli.set_inference(model, mode, seed=seed)
        model(**batch)
    fixed, (one, again, *others) = torch.stack(seen[:3]), seen[3:]
    assert torch.equal(one, again)
    assert any(not torch.equal(one, other) for other in others)
    # Every token is what one expert makes of it, and the experts are shared as the mode says.
    close = (one - fixed).abs().amax(-1) < 1e-5  # [N, B, S]
    assert bool(close.any(0).all())
    experts = close.int().argmax(0)
    shared = {
        "random_token": None,
        "random_sentence": experts[:, :1],
        "random_position": experts[:1],
        "random_batch": experts[:1, :1],
    }[mode]
    if shared is not None:
        assert torch.equal(experts, shared.expand_as(experts))
    assert len(experts.unique()) == (1 if mode == "random_batch" else 3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_a_sentence_does_not_depend_on_its_batch(family: str) -> None:
    model = parted(build(family, inference="random_sentence", num_experts=4))
    batch = families.inputs(family)
    together = model(**batch).logits
    for row in range(2):
        real = int(batch["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, :real]
        found = model(**alone).logits[0]
        width = len(found) if found.dim() > 1 and family != "bart" else None
        torch.testing.assert_close(found, together[row][:width], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sentence_does_not_depend_on_how_its_batch_is_written() -> None:
    model = parted(build("bert", inference="random_sentence", num_experts=4), by=1.0)
    batch = families.inputs("bert")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = model(ids, mask).logits
    assert torch.equal(model(ids.int(), mask).logits, expected)
    wide, shown = (torch.nn.functional.pad(one, (0, 2)) for one in (ids, mask))
    seen = shown[:, None, None].bool().expand(-1, 1, wide.shape[1], -1)
    torch.testing.assert_close(model(wide, seen).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="tell padding from tokens"):
        model(ids, mask[:, None].expand(-1, ids.shape[1], -1))


@torch.no_grad()
def test_padding_of_texts_to_choose_from_is_no_part_of_them() -> None:
    model = tiny.initialise(lambda: tr.BertForMultipleChoice(tr.BertConfig(**families._ENCODER)))
    moduli.convert(model, moduli.THOR(num_experts=8, layers="all", inference="random_sentence"))
    parted(model, by=1.0)
    ids = torch.randint(3, families.VOCAB, (2, 3, 5))
    padded = torch.nn.functional.pad(ids, (0, 2))
    expected = model(ids, torch.ones_like(ids)).logits
    found = model(padded, (padded > 0).long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def written(model: Any, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**prompt, **{**settings, **options})
    return [row[-6:].tolist() for row in out]


def left_padded(family: str) -> dict[str, Tensor]:
    """Two prompts; padding is before the text, where decoders have it."""
    batch = families.inputs(family)
    if family in families.DECODERS:
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    return batch


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", GENERATIVE)
def test_sentences_keep_their_experts_while_they_are_written(
    family: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parted(build(family, inference="random_sentence", num_experts=4))
    chosen: dict[int, set[tuple[int, ...]]] = {}
    by_sentence = ThorChooser._by_sentence

    def spy(self: ThorChooser, layer: int, lead: torch.Size) -> Any:
        experts = by_sentence(self, layer, lead)
        rows = experts.reshape(2, -1)  # all tokens of a sentence, in all of its beams
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        chosen.setdefault(layer, set()).add(tuple(rows[:, 0].tolist()))
        return experts

    batch = left_padded(family)
    with monkeypatch.context() as context:
        context.setattr(ThorChooser, "_by_sentence", spy)
        together = written(model, batch, num_beams=beams)
    assert chosen
    assert all(len(experts) == 1 for experts in chosen.values())
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    assert written(model, alone, num_beams=beams) == together[:1]


def decoding(model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """Logits of the steps of greedy decoding by hand, in any of two cases with a cache."""
    ids = batch["input_ids"]
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(ids)
        yield encoded[0]
        out = model(encoder_outputs=encoded, decoder_input_ids=ids[:, :1], use_cache=True)
    else:
        encoded, out = None, model(ids, use_cache=True)
    for _ in range(2):
        yield out.logits
        chosen, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        if encoded is None:
            out = model(chosen, past_key_values=cache)
        else:
            out = model(encoder_outputs=encoded, decoder_input_ids=chosen, past_key_values=cache)
    yield out.logits


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_texts_that_are_written_by_turns_keep_their_experts(family: str) -> None:
    model = parted(build(family, inference="random_sentence", num_experts=8), by=1.0)
    batches = [families.inputs(family, seed) for seed in (1, 2)]
    one, other = (list(decoding(model, batch)) for batch in batches)
    by_turns = zip(*(decoding(model, batch) for batch in batches), strict=True)
    for found, expected in zip(by_turns, zip(one, other, strict=True), strict=True):
        for logits, wanted in zip(found, expected, strict=True):
            assert torch.equal(logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_beams_take_the_experts_of_the_text_that_they_are_given(family: str) -> None:
    model = parted(build(family, inference="random_sentence", num_experts=8), by=1.0)
    one, other = ({**families.inputs(family, seed)} for seed in (1, 2))
    for batch in (one, other):
        del batch["decoder_input_ids"]
    encoder = model.get_encoder()

    def write() -> list[list[int]]:
        found: list[list[int]] = model.generate(
            encoder_outputs=copy.copy(encoded),
            attention_mask=one["attention_mask"],
            num_beams=2,
            max_new_tokens=4,
            do_sample=False,
        ).tolist()
        return found  # fmt: skip

    encoded = encoder(**one)
    assert write() == model.generate(**one, num_beams=2, max_new_tokens=4, do_sample=False).tolist()
    encoder(**other)
    with pytest.raises(ModelError, match="has read none"):
        write()


@torch.no_grad()
def test_a_copy_of_a_cache_has_its_sentences_and_another_cache_none() -> None:
    model, dense = parted(build("llama", inference="random_sentence"), by=1.0), tiny.build("llama")
    ids = families.inputs("llama")["input_ids"]
    filled = model(ids, use_cache=True).past_key_values
    kept = copy.deepcopy(filled)
    expected = model(ids[:, :1], past_key_values=filled).logits
    model(ids.flip(1))
    assert torch.equal(model(ids[:, :1], past_key_values=kept).logits, expected)
    with pytest.raises(ModelError, match=r"has read none.*a cache that it has filled"):
        model(ids[:, :1], past_key_values=dense(ids, use_cache=True).past_key_values)
    with pytest.raises(ModelError, match="has read none"):
        model.model(ids)  # and not the sentences of an earlier pass


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", GENERATIVE)
def test_an_ensemble_writes_with_a_cache_what_it_writes_without(family: str, beams: int) -> None:
    model, batch = parted(build(family, inference="ensemble_prob"), by=1.0), left_padded(family)
    cached = written(model, batch, num_beams=beams)
    assert cached == written(model, batch, num_beams=beams, use_cache=False)
    moduli.set_inference(model, "fixed:0")
    assert cached != written(model, batch, num_beams=beams)
    assert model(**families.inputs(family)).logits.shape[0] == 2


@torch.no_grad()
def test_the_loss_of_an_ensemble_is_that_of_the_mean() -> None:
    model, batch = parted(build("llama", inference="ensemble_prob")), labelled("llama")
    found = model(**batch)
    logs = torch.log_softmax(found.logits[:, :-1], -1).flatten(0, 1)
    expected = torch.nn.functional.nll_loss(logs, batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)


@torch.no_grad()
def test_a_part_of_a_model_has_no_ensemble_and_no_sentences() -> None:
    model, batch = build("bert", inference="ensemble_prob"), families.inputs("bert")
    with pytest.raises(ModelError, match="call the model itself"):
        model.bert(**batch)
    moduli.set_inference(model, "random_sentence")
    with pytest.raises(ModelError, match="it has read none"):
        model.bert(**batch)


@torch.no_grad()
def test_an_ensemble_of_maps_is_refused() -> None:
    maps = torch.randn(2, 5, 3, 3)  # [B, V, height, width], as segmentation has them
    with pytest.raises(ModelError, match="use ensemble_layer"):
        mean_prediction(build("vit"), [maps, maps])


@torch.no_grad()
def test_another_mode_keeps_the_seed() -> None:
    model, batch = build("bert", inference="random_token", inference_seed=7), labelled("bert")
    model = parted(model)
    expected = model(**batch).logits
    moduli.set_inference(model, "average")
    moduli.set_inference(model, "random_token")
    assert torch.equal(model(**batch).logits, expected)
    assert model.config.moduli["config"]["inference_seed"] == 7


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, batch = build("bart", inference="ensemble_prob"), families.inputs("bart")
    expected = model(**batch).logits
    hook = model.get_decoder().register_forward_pre_hook(_fail)
    with pytest.raises(ModelError, match="stop"):
        model(**batch)
    hook.remove()
    assert not passes_of(model).inside
    assert torch.equal(model(**batch).logits, expected)


def _fail(module: Any, args: Any) -> None:
    raise ModelError("stop")


@torch.no_grad()
def test_the_report_measures_every_mode() -> None:
    model, batch = parted(build("llama"), by=0.1), labelled("llama")
    report = moduli.thor_report(model, [batch, labelled("llama", seed=5)])
    for e in range(3):
        one = [only(model, e)(**b).loss for b in (batch, labelled("llama", seed=5))]
        assert report.losses[f"fixed:{e}"] == pytest.approx(float(sum(one)) / 2, rel=1e-5)
    assert report.spread == max(report.fixed) - min(report.fixed) > 0
    assert report.ensemble_gain > 0  # the mean of -log is above -log of the mean
    assert report.disagreement > 0
    assert 0.9 < min(report.similarity.values()) < max(report.similarity.values()) < 1
    assert moduli.thor_report(build("llama"), batch).disagreement == 0
    assert "collapse gap" in str(report)
    assert report.to_dict()["collapse_gap"] == report.collapse_gap
    assert model.config.moduli["config"]["inference"] is None  # the mode stays what it was
    model.train().model.embed_tokens.eval()
    moduli.thor_report(model, batch)
    assert model.training
    assert not model.model.embed_tokens.training
