"""Settings that cannot work say what was given and what works."""

from typing import Any

import pytest
import torch
import transformers as tr

import moduli
from moduli.errors import ConfigError, DataError, ModelError
from moduli.methods.thor import THOR
from tests.methods.thor.models import build, labelled


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_experts": 0}, "num_experts is 0; at least 1"),
        ({"alpha": -1.0}, "alpha is -1.0; it has to be 0 or more"),
        ({"passes": 0}, "passes is 0; at least 1"),
        ({"passes": 1, "alpha": 1.0}, "one pass has none to agree with; set passes=2"),
        ({"num_experts": 1, "pair": "distinct"}, "needs an expert for each of the 2 passes"),
        ({"pair": "both"}, "pair is 'both'; it may be 'independent' or 'distinct'"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it is a share, in \[0, 1\)"),
        ({"smoothing_style": "none"}, "smoothing_style is 'none'"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"preset": "best"}, "preset is 'best'; it may be 'paper' or None"),
        ({"inference": "fixed:2"}, "the experts are fixed:0 to fixed:1"),
        ({"inference": "fixed:-1"}, "the experts are fixed:0 to fixed:1"),
        ({"inference": "avarage"}, "no inference mode 'avarage'. Did you mean 'average'"),
        ({"inference": "fixed"}, "no inference mode 'fixed'. Did you mean 'fixed:0'"),
    ],
)
def test_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        THOR(**settings)


def test_one_pass_has_no_consistency() -> None:
    assert THOR(passes=1).objective.alpha == 0
    assert THOR().objective.alpha == 1


def test_the_preset_gives_way_to_what_is_given() -> None:
    paper = THOR(preset="paper")
    assert (paper.objective.alpha, paper.objective.label_smoothing) == (5.0, 0.1)
    assert paper.mode == "random_sentence"
    own = THOR(preset="paper", alpha=2.0, label_smoothing=0.0, inference="fixed:1")
    assert (own.objective.alpha, own.objective.label_smoothing, own.mode) == (2.0, 0.0, "fixed:1")


def test_a_row_that_is_passed_twice_needs_a_padding_token() -> None:
    config = tr.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_inner=8)
    model = tr.GPT2ForSequenceClassification(config).train()
    row = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([1])}
    expected = model.eval()(**row).loss
    moduli.convert(model.train(), moduli.THOR(inference="ensemble_prob"))
    for training in (True, False):
        with pytest.raises(ModelError, match=r"set model\.config\.pad_token_id"):
            model.train(training)(**row)
    model.config.pad_token_id = 0
    torch.testing.assert_close(model(**row).loss, expected)
    assert model.train()(**row).loss.isfinite()


def test_an_unknown_mode_leaves_the_model_as_it_was() -> None:
    model = build("bert", inference="fixed:2")
    with pytest.raises(ConfigError, match="fixed:0 to fixed:2"):
        moduli.set_inference(model, "fixed:3")
    assert model.config.moduli["config"]["inference"] == "fixed:2"


def test_a_report_needs_labels() -> None:
    model, batch = build("bert"), labelled("bert")
    for given in ([], {"input_ids": batch["input_ids"]}):
        with pytest.raises(DataError, match="give batches with labels"):
            moduli.thor_report(model, given)
    decoder, batch = build("llama"), labelled("llama")
    with pytest.raises(DataError, match="no position of the batches has a label"):
        moduli.thor_report(decoder, {**batch, "labels": batch["labels"].fill_(-100)})


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": 3}, r"give a list, \[3\]"),
        ({"num_experts": 2.5}, "num_experts is 2.5"),
        ({"passes": 2.0}, "passes is 2.0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"inference_seed": 1.5}, "inference_seed is 1.5"),
    ],
)
def test_settings_of_another_type_are_named(settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        moduli.THOR(**settings)
