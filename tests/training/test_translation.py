"""Translators with random weights: pieces, losses, what is scored, and how they are handed back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import log_softmax

from moduli.data.translation import language_of, tagged
from moduli.errors import ConfigError, DataError, UnknownNameError
from moduli.training.evaluate import evaluate, outputs_of
from moduli.training.finetune import finetune
from moduli.training.kinds.base import Examples, get_kind
from moduli.training.kinds.per_token import token_loss
from moduli.training.pieces import tags_of, train_pieces
from moduli.training.plain import BEAMS
from moduli.training.settings import FinetuneSettings
from moduli.training.translator import SETTINGS, fresh_translator, size_of

THINGS = {  # in English, Spanish and Czech
    "library": ("biblioteca", "knihovna"),
    "editor": ("editor", "editor"),
    "game": ("juego", "hra"),
    "viewer": ("visor", "prohlížeč"),
    "compiler": ("compilador", "překladač"),
}
OF = {"music": ("música", "hudby"), "maps": ("mapas", "map"), "mail": ("correo", "pošty")}
KIND = get_kind("translation")


def rows() -> list[dict[str, str]]:
    """Every thing of everything, in two languages."""
    return [
        {"source": tagged(language, f"{thing} for {what}"), "target": f"{one[i]} {the[i]} {kind}"}
        for thing, one in THINGS.items()
        for what, kinds in OF.items()
        for i, (language, the) in enumerate((("es", "de"), ("cs", "pro")))
        for kind in [kinds[i]]
    ]


def table() -> dict[str, list[str]]:
    return {name: [row[name] for row in rows()] for name in ("source", "target")}


@pytest.fixture(scope="module")
def learnt() -> tuple[Any, Any, Any]:
    """A translator that has learnt the rows, its tokenizer, and what training said."""
    transformers.set_seed(0)
    model, tokenizer = fresh_translator("tiny", "translation", table())
    settings = FinetuneSettings(
        max_steps=60, learning_rate=3e-3, batch_size=10, schedule="inverse-sqrt", warmup=0.2,
        adam_beta2=0.98, label_smoothing=0.1, max_length=16, bf16=False,
    )  # fmt: skip
    result = finetune(model, tokenizer, "translation", rows(), settings=settings, seed=0)
    return model.eval(), tokenizer, result


def test_texts_come_back_from_pieces_as_they_were() -> None:
    texts = [
        "Knihovna pro prohlížeče (vývojové soubory)",
        "C++'s «std», 100 % of it",
        "консольная утилита",
    ]
    sources = [tagged("ru", "console utility"), tagged("cs", "library for viewers")]
    tokenizer = train_pieces(sources, texts, 200)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tags_of(tokenizer) == ["cs", "ru"]
    ids = tokenizer(sources[0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == ">>ru<<"
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "console utility"


def test_the_same_texts_make_the_same_pieces_and_plain_transformers_reads_them(
    tmp_path: Path,
) -> None:
    first, second = (train_pieces(**_given(), vocab_size=120) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    first.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*table()["source"], *table()["target"]):
        assert again(text)["input_ids"] == first(text)["input_ids"]
    with pytest.raises(DataError, match="no text"):
        train_pieces([tagged("cs", "")], [" "], 100)


def _given() -> dict[str, list[str]]:
    return {"sources": table()["source"], "targets": table()["target"]}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_mass_goes_to_the_other_classes_in_equal_parts(smoothing: float) -> None:
    """fairseq's definition since 2021, in which the target keeps 1 - smoothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator)
    labels = torch.tensor([[1, 6, -100], [0, -100, -100]])
    target = torch.full((2, 3, 7), smoothing / 6)
    target.scatter_(2, labels.clamp(min=0).unsqueeze(-1), 1 - smoothing)
    each = -(target * log_softmax(logits, -1)).sum(-1)[labels != -100]
    output = transformers.modeling_outputs.Seq2SeqLMOutput(logits=logits)
    loss = token_loss(output, labels, None, label_smoothing=smoothing)
    torch.testing.assert_close(loss, each.mean())


def test_the_rate_falls_with_one_over_the_root_of_the_step() -> None:
    seen: list[float] = []
    model, tokenizer = fresh_translator("tiny", "translation", table())
    settings = FinetuneSettings(
        max_steps=8, learning_rate=1e-3, batch_size=2, schedule="inverse-sqrt", warmup=0.5,
        max_length=8, bf16=False,
    )  # fmt: skip
    finetune(
        model, tokenizer, "translation", rows()[:4], settings=settings, seed=0,
        on_progress=lambda progress: seen.append(progress.learning_rate),
    )  # fmt: skip
    peak = seen.index(max(seen))
    after = torch.tensor(seen[peak:])
    # steps are counted from the start, and the warm-up is 4 of them
    step = 4 + torch.arange(len(after))
    torch.testing.assert_close(after, after[0] * (step[0] / step).sqrt())


def test_it_learns_to_translate_into_several_languages(learnt: tuple[Any, Any, Any]) -> None:
    model, tokenizer, result = learnt
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])
    scores = evaluate(model, tokenizer, rows(), kind="translation", max_length=16).to_dict()
    assert scores["chrf"] > 60
    assert scores["beam_chrf"] > 60
    # the tag decides: one source, two languages
    both = [{"source": tagged(tag, "game for maps"), "target": ""} for tag in ("es", "cs")]
    examples, outputs = outputs_of(KIND, model, tokenizer, both, max_length=16)
    spanish, czech = KIND.describe(model, tokenizer, both, examples, outputs)
    assert spanish["target"] != czech["target"]
    assert "juego" in spanish["target"]
    assert "hra" in czech["target"]


def test_scores_are_those_of_sacrebleu_on_what_generate_writes(
    learnt: tuple[Any, Any, Any],
) -> None:
    import sacrebleu

    model, tokenizer, _ = learnt
    some = [row for row in rows() if language_of(row["source"]) == "cs"]
    scores = evaluate(model, tokenizer, some, kind="translation", max_length=32).to_dict()
    references = [[row["target"] for row in some]]
    total = tokens = 0.0
    written: dict[int, list[str]] = {1: [], BEAMS: []}
    longest = max(len(tokenizer(row["source"])["input_ids"]) for row in some)
    for row in some:  # one by one: padding changes nothing
        batch = tokenizer(row["source"], return_tensors="pt")
        for beams, texts in written.items():
            ids = model.generate(**batch, num_beams=beams, max_new_tokens=2 * longest + 10)
            texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(**batch, labels=labels).loss) * labels.numel()
        tokens += labels.numel()
    assert scores["n"] == tokens
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-5)
    for beams, prefix in ((1, ""), (BEAMS, "beam_")):
        for name, corpus in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
            expected = corpus(written[beams], references).score
            assert scores[prefix + name] == pytest.approx(expected), prefix + name


def test_it_is_said_how_scores_were_computed() -> None:
    import sacrebleu

    said = KIND.signatures()
    assert set(said) == {"bleu", "bleu (char)", "bleu (zh)", "chrf"}
    assert "tok:13a" in said["bleu"]
    assert all(f"version:{sacrebleu.__version__}" in text for text in said.values())
    assert get_kind("classification").signatures() == {}


def scored(*given: tuple[str, str, str], hard: Sequence[bool] = ()) -> dict[str, float]:
    """Scores of texts that are given as language, what was written, and the right one."""
    examples = Examples.of(given)
    examples = replace(examples, decode=lambda ids: "".join(map(chr, ids.tolist())))
    rows, outputs = [], []
    for number, (language, text, target) in enumerate(given):
        ids = torch.tensor([ord(c) for c in text])
        nll = torch.full((2,), float(number))
        outputs.append({"nll": nll, "target": torch.zeros(2), "greedy": ids, "beam": ids})
        rows.append({"source": tagged(language, "a sentence"), "target": target})
    marked = [{**row, "hard": one} for row, one in zip(rows, hard, strict=False)]
    return KIND.score(outputs, examples, marked or rows).to_dict()


JAPANESE = ("日本語の文草", "日本語の文章")
"""One character of six is wrong, which as a word would be all of it."""


@pytest.mark.parametrize("language", ["ja", "zh_CN", "zh_TW", "zh", "zh-Hans", "ZH"])
def test_languages_without_spaces_are_cut_into_characters(language: str) -> None:
    assert scored((language, *JAPANESE))["bleu"] > 50
    assert scored(("cs", *JAPANESE))["bleu"] < 1


def test_texts_into_several_languages_are_a_corpus_each() -> None:
    spanish = ("es", "una biblioteca de juegos", "una biblioteca de música")
    apart = [scored(("ja", *JAPANESE), ("ja", *JAPANESE)), scored(spanish)]
    together = scored(("ja", *JAPANESE), spanish, ("ja", *JAPANESE))
    for name in ("bleu", "chrf", "beam_bleu", "beam_chrf"):
        assert together[name] == pytest.approx(sum(one[name] for one in apart) / 2)
    assert together["n"] == 6


def test_hard_rows_are_scored_from_what_was_written_for_all() -> None:
    texts = [("cs", "knihovna pro hry", "knihovna pro mapy"), ("cs", "hra s mapou", "hra s mapou")]
    found = scored(*texts, *texts, hard=[True, False, False, True])
    whole, hard = scored(*texts, *texts), scored(texts[0], texts[1])
    assert {name: found[name] for name in whole} == whole
    for name in ("n", "bleu", "chrf", "beam_bleu", "beam_chrf"):
        assert found[f"hard_{name}"] == hard[name]
    assert found["hard_loss"] == 1.5  # of the first and the last
    assert found["hard_n"] == 4
    assert scored(*texts, hard=[False, False]).keys() == whole.keys()


@pytest.mark.slow
def test_it_is_handed_back_as_what_plain_transformers_loads(
    learnt: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    import moduli

    model, tokenizer, _ = learnt
    moduli.save(model, tmp_path / "out", tokenizer)
    code = """
import sys
sys.modules["moduli"] = sys.modules["sentencepiece"] = None
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
batch = tokenizer([">>es<< game for maps"], return_tensors="pt")
ids = model.generate(**batch, num_beams=4, max_new_tokens=30)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    batch = tokenizer([">>es<< game for maps"], return_tensors="pt")
    here = tokenizer.decode(
        model.generate(**batch, num_beams=4, max_new_tokens=30)[0], skip_special_tokens=True
    )
    assert done.stdout.strip() == here


def test_a_language_that_was_not_learnt_is_refused(learnt: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = learnt
    for source, message in (
        (tagged("fr", "game for maps"), "for 'fr'.*>>cs<< >>es<<"),
        ("game for maps", "without a language.*>>cs<< >>es<<"),
    ):
        one = [{"source": source, "target": "jeu"}]
        with pytest.raises(DataError, match=message):
            evaluate(model, tokenizer, one, kind="translation")


def test_what_cannot_work_is_refused() -> None:
    assert size_of("translator:base") == "base"
    assert size_of("minilm") is None
    with pytest.raises(UnknownNameError, match="translator:small"):
        size_of("translator:smal")
    with pytest.raises(ConfigError, match="tasks of translation or seq2seq, not of regression"):
        fresh_translator("tiny", "regression", table())
    with pytest.raises(ConfigError, match="label_smoothing"):
        FinetuneSettings(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="warm-up"):
        FinetuneSettings(schedule="inverse-sqrt", warmup=0.0)


def test_the_command_line_trains_random_weights_as_suits_them() -> None:
    from moduli.cli.options import parse_with_method
    from moduli.cli.tune import Tune

    words = ["--data", "wesnoth", "--epochs", "2", "dense"]
    args, _ = parse_with_method("tune", Tune, ["--model", "translator:tiny", *words])
    assert args.settings.label_smoothing == SETTINGS.label_smoothing == 0.1
    assert args.settings.schedule == "inverse-sqrt"
    assert args.settings.max_length == 128  # of sentences; cut ones would be learnt to end there
    assert args.settings.epochs == 2
    args, _ = parse_with_method("tune", Tune, ["--model=minilm", *words])
    assert args.settings == FinetuneSettings(epochs=2)
    with pytest.raises(UnknownNameError, match="translator:tiny"):
        parse_with_method("tune", Tune, ["--model", "translator:tyni", *words])
