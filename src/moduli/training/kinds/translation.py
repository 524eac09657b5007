"""Translation: as `seq2seq`, with what the model writes scored against a human translation.

Sources begin with the language to translate into (`moduli.data.translation`). The loss is
teacher-forced; BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacreBLEU's (Post 2018), of
what is written by greedy search and along several beams.

    M target tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from moduli.data.translation import language_of
from moduli.errors import DataError
from moduli.training.kinds import per_token, seq2seq
from moduli.training.kinds.base import Examples, Output
from moduli.training.metrics import Metric, Scores
from moduli.training.pieces import tags_of
from moduli.training.plain import BEAMS, TOKENS_AND_TEXT

CHARACTERS = {"ja": "char", "zh_CN": "zh", "zh_TW": "zh"}
"""Languages without spaces between words, and how sacreBLEU is to cut them; others by its 13a."""


@dataclass(frozen=True)
class TranslationScores(Scores):
    """`n` is the number of target tokens; BLEU and chrF are of the whole corpus, in [0, 100]."""

    loss: float
    """Mean cross-entropy per target token, nats, given the right ones before."""
    bleu: float
    chrf: float
    """Of what is written by greedy search."""
    beam_bleu: float
    beam_chrf: float
    """Of what is written along `BEAMS` beams."""


def signatures() -> dict[str, str]:
    """How BLEU and chrF were computed, as sacreBLEU says it, by metric and tokens."""
    found = {}
    for tokens in ("13a", *sorted(set(CHARACTERS.values()))):
        for name, metric in _measures(tokens).items():
            metric.corpus_score(["a"], [["a"]])  # it counts references when it scores
            key = name if tokens == "13a" or name == "chrf" else f"{name} ({tokens})"
            found[key] = str(metric.get_signature())
    return found


def _measures(tokens: str) -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(tokenize=tokens), "chrf": CHRF()}


def _prepare(tokenizer: Any, rows: Any, max_length: int) -> Examples:
    """The examples, if the tokenizer knows their languages.

    Raises:
        DataError: a text is to be translated into a language that the model has not learnt, or
            does not say into which.
    """
    if tags := tags_of(tokenizer):
        for row in rows:
            language = language_of(row["source"])
            if language not in tags:
                known = " ".join(f">>{tag}<<" for tag in tags)
                said = "without a language" if language is None else f"for {language!r}"
                raise DataError(
                    f"A text is {said}, which the model does not know: {row['source'][:60]!r}. "
                    f"Begin it with one of {known}."
                )
    examples = seq2seq.KIND.prepare(tokenizer, rows, max_length)
    return replace(examples, decode=partial(tokenizer.decode, skip_special_tokens=True))


def _texts(outputs: Sequence[Output], examples: Examples, search: str) -> list[str]:
    """What was written for each example."""
    assert examples.decode is not None  # `_prepare` saw to it
    return [examples.decode(output[search]) for output in outputs]


def _score(outputs: Sequence[Output], examples: Examples, rows: Any) -> TranslationScores:
    found = per_token.joined(outputs)
    languages = {language_of(row["source"]) for row in rows}
    tokens = CHARACTERS.get(str(languages.pop()), "13a") if len(languages) == 1 else "13a"
    references = [[row["target"] for row in rows]]
    values = {}
    for search in ("greedy", "beam"):
        texts = _texts(outputs, examples, search)
        for name, metric in _measures(tokens).items():
            key = name if search == "greedy" else f"{search}_{name}"
            values[key] = float(metric.corpus_score(texts, references).score)
    return TranslationScores(
        n=len(found["nll"]), loss=float(found["nll"].double().mean()), **values
    )


def _describe(
    model: Any, processor: Any, rows: Any, examples: Examples, outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    """What the model makes of each source along several beams, and by greedy search."""
    pairs = zip(_texts(outputs, examples, "beam"), _texts(outputs, examples, "greedy"), strict=True)
    return [
        {"source": row["source"], "target": beam, "greedy": greedy}
        for row, (beam, greedy) in zip(rows, pairs, strict=True)
    ]


def _decide(output: Output) -> Tensor:
    """The text along several beams."""
    return output["beam"]


KIND = replace(
    seq2seq.KIND,
    name="translation",
    metrics=(
        Metric("loss", "loss per token", higher_is_better=False, share=False),
        Metric(
            "bleu",
            "BLEU",
            share=False,
            note="sacreBLEU's, of what the model writes by greedy search. Of short texts by small "
            "models it is low; chrF tells them apart better.",
        ),
        Metric("chrf", "chrF", share=False, note="sacreBLEU's, of the same texts."),
        Metric("beam_bleu", "beam-BLEU", share=False, note=f"BLEU along {BEAMS} beams."),
        Metric("beam_chrf", "beam-chrF", share=False, note=f"chrF along {BEAMS} beams."),
    ),
    prepare=_prepare,
    reduction=TOKENS_AND_TEXT,
    score=_score,
    describe=_describe,
    signatures=signatures,
)
