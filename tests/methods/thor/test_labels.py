"""What the labels of a model are, and at which position it wants them, as its own loss has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor

import moduli
from tests import families, tiny
from tests.families import VOCAB

IDS = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
TEXT = {"input_ids": IDS, "labels": IDS.where(IDS % 5 > 0, -100)}
IMAGE_TOKENS = torch.cat([torch.full((2, 4), 3), IDS], 1)


def _llava() -> Any:
    vision = {**families._IMAGE, "num_hidden_layers": 3, "patch_size": 4, "projection_dim": 16}
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(
            text_config=tr.LlamaConfig(**families._DECODER),
            vision_config=tr.CLIPVisionConfig(**{**vision, "attention_dropout": 0.0}),
            image_token_index=3,
            image_seq_length=4,
        )
    )


def _xlm() -> Any:
    sizes = {"vocab_size": VOCAB, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
    return tr.XLMWithLMHeadModel(tr.XLMConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def _pair() -> Any:
    bert = tr.BertConfig(**families._ENCODER)
    both = tr.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert, bert, decoder_start_token_id=1, pad_token_id=0
    )
    return tr.EncoderDecoderModel(both)


def _bert(head: Any, **options: Any) -> Callable[[], Any]:
    return lambda: head(tr.BertConfig(**families._ENCODER, **options))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llava": (
        _llava,
        {
            "input_ids": IMAGE_TOKENS,
            "labels": IMAGE_TOKENS,
            "pixel_values": torch.randn(2, 3, 8, 8),
        },
    ),
    "xlm": (_xlm, TEXT),
    "bart decoder": (lambda: tr.BartForCausalLM(tr.BartConfig(**families._SEQ2SEQ)), TEXT),
    "two berts": (_pair, TEXT),  # whose decoder is blind to places without a label
    "masked": (_bert(tr.BertForMaskedLM), TEXT),
    "next token": (_bert(tr.BertLMHeadModel, is_decoder=True), TEXT),
    "tagger": (_bert(tr.BertForTokenClassification), {**TEXT, "labels": IDS % 3}),
    "choice": (
        _bert(tr.BertForMultipleChoice),
        {"input_ids": IDS[:, None] * torch.tensor([1, 0, 1])[:, None], "labels": IDS[:, 0] % 3},
    ),
    "gpt2": (families.DECODERS["gpt2"], TEXT),
    "opt": (families.DECODERS["opt"], TEXT),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_copies_have_the_loss_of_the_model_itself(name: str) -> None:
    """In training, in an ensemble and in a report, at the first loss and at later ones."""
    make, batch = CASES[name]
    dense = tiny.initialise(make)
    start = copy.deepcopy(dense)
    stock = dense.train()(**batch).loss.detach()
    for first in ("training", "ensemble", "report"):
        model = copy.deepcopy(start)
        moduli.convert(model, moduli.THOR(alpha=5.0, layers="all", inference="ensemble_prob"))
        if first == "report":
            found = torch.tensor(list(moduli.thor_report(model, batch).losses.values()))
        else:
            model.train(first == "training")
            found = torch.stack([model(**batch).loss.detach() for _ in range(2)])
            found = found / 2 if first == "training" else found
        torch.testing.assert_close(found, stock.expand(len(found)), rtol=1e-4, atol=1e-5)


def test_numbers_keep_their_precision_in_a_model_of_less() -> None:
    config = tr.BertConfig(**{**families._ENCODER, "num_labels": 1})
    model = tiny.initialise(lambda: tr.BertForSequenceClassification(config)).bfloat16()
    batch = {"input_ids": IDS, "labels": torch.tensor([1001.0, 1003.0])}  # bfloat16: 1000, 1004
    expected = model(**batch).loss
    moduli.convert(model, moduli.THOR(num_experts=1, alpha=0.0, layers="all"))
    torch.testing.assert_close(model.train()(**batch).loss, 2 * expected, rtol=1e-5, atol=0.0)
