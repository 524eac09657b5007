"""A run that begins with random weights is a run like others: one spec, one result, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

import moduli
from moduli.data.task import Splits, Task
from moduli.errors import ConfigError, DataError
from moduli.methods.dense import Dense
from moduli.study.plan import Plan, TaskSpec, arm
from moduli.study.run import execute
from moduli.study.tuned import describe_rows, load_tuned
from moduli.training.kinds.base import get_kind
from moduli.training.settings import FinetuneSettings
from tests.training.test_translation import rows

MODEL = "translator:tiny"


def task() -> Task:
    domains = {}
    for language in ("es", "cs"):
        mine = [row for row in rows() if row["source"].startswith(f">>{language}<<")]
        domains[language] = Splits(Dataset.from_list(mine[:11]), None, Dataset.from_list(mine[11:]))
    return Task("made up", "translation", (), domains, sources=("es", "cs"))


def plan(seed: int = 0) -> Plan:
    return Plan(
        model=MODEL,
        tasks=(TaskSpec("made up"),),
        sources=(),
        arms=(arm(Dense()),),
        seeds=(seed,),
        settings=FinetuneSettings(max_steps=4, batch_size=8, max_length=16, bf16=False),
    )


@pytest.mark.slow
def test_the_same_spec_gives_the_same_translator(tmp_path: Path) -> None:
    given = task()
    (run,) = plan().runs([given])
    assert run.spec.train_domains == ("es", "cs")
    first = execute(run.spec, given, tmp_path / "a", keep_model=True)
    again = execute(run.spec, given, tmp_path / "b", keep_model=True)
    assert first.result() == again.result()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "tok:13a" in first.environment["metrics"]["bleu"]
    kind = get_kind("translation")
    model, tokenizer = load_tuned(str(tmp_path / "a"), kind)
    assert not moduli.surgery.modular.is_modular(model)
    (said,) = describe_rows(model, tokenizer, kind, [rows()[0]], max_length=16)
    assert set(said) == {"source", "target", "greedy"}


def test_another_seed_begins_with_other_weights_and_the_same_tokenizer() -> None:
    from moduli.study.run import load_model

    given = task()
    models = []
    for seed in (0, 1):
        (run,) = plan(seed).runs([given])
        models.append(load_model(run.spec, given))
    (one, pieces), (other, same) = models
    assert not (one.get_input_embeddings().weight == other.get_input_embeddings().weight).all()
    assert pieces.get_vocab() == same.get_vocab()
    assert len(pieces) == one.config.vocab_size


def test_it_is_for_texts_only(tmp_path: Path) -> None:
    labels = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    other = Task("made up", "classification", ("x", "y"), {"all": Splits(labels, None, labels)})
    (run,) = plan().runs([other])
    with pytest.raises(ConfigError, match="not of classification"):
        execute(run.spec, other, tmp_path / "run")


def test_a_language_that_is_tested_but_not_learnt_is_refused_before_training(
    tmp_path: Path,
) -> None:
    (run,) = replace(plan(), sources=(("es",),)).runs([task()])
    with pytest.raises(DataError, match=r"learn es and be tested in cs as well.*--domains es"):
        execute(run.spec, task(), tmp_path / "run")


def test_pieces_are_learnt_from_the_training_rows_of_the_run_only() -> None:
    from moduli.study.run import load_model

    given = task()
    test = Dataset.from_list([{"source": ">>es<< ohm", "target": "Ω"}])
    given = replace(given, domains={**given.domains, "other": Splits(None, None, test)})
    (run,) = plan().runs([given])
    _, pieces = load_model(run.spec, given)
    assert pieces("Ω")["input_ids"][-2] == pieces.unk_token_id
    for text in (t for name in ("es", "cs") for t in given.domains[name].train["target"]):
        assert pieces.unk_token_id not in pieces(text)["input_ids"]
