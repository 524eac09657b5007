"""Translation: as `seq2seq`, with what the model writes scored against a human translation.

Sources begin with the language to translate into (`moduli.data.translation`). The loss is
teacher-forced; BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacreBLEU's (Post 2018), of
what is written by greedy search and along several beams.

    M target tokens
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from moduli.data.translation import HARD, language_of
from moduli.errors import DataError
from moduli.training.kinds import per_token, seq2seq
from moduli.training.kinds.base import Examples, Output
from moduli.training.metrics import Metric, Scores
from moduli.training.pieces import tags_of
from moduli.training.plain import BEAMS, TOKENS_AND_TEXT

CHARACTERS = {"ja": "char", "zh": "zh"}
"""Languages without spaces between words, wherever spoken, and how sacreBLEU is to cut them."""
WORDS = "13a"
"""How it is to cut the others."""


@dataclass(frozen=True)
class TranslationScores(Scores):
    """`n` is the number of target tokens; BLEU and chrF are of a corpus, in [0, 100].

    Texts into one language are a corpus. Of several the scores are averaged, each counting once.
    """

    loss: float
    """Mean cross-entropy per target token, nats, given the right ones before."""
    bleu: float
    chrf: float
    """Of what is written by greedy search."""
    beam_bleu: float
    beam_chrf: float
    """Of what is written along `BEAMS` beams."""
    hard: TranslationScores | None = None
    """The same of those rows that are marked as hard (`moduli.data.translation.mark_hard`)."""

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers; those of the hard rows, if there are any, as "hard_loss" and so on."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != HARD}
        hard = {} if self.hard is None else self.hard.to_dict()
        return own | {f"{HARD}_{name}": value for name, value in hard.items()}


def signatures() -> dict[str, str]:
    """How BLEU and chrF were computed, as sacreBLEU says it, by metric and tokens."""
    found = {}
    for tokens in (WORDS, *sorted(set(CHARACTERS.values()))):
        for name, metric in _measures(tokens).items():
            metric.corpus_score(["a"], [["a"]])  # it counts references when it scores
            key = name if tokens == WORDS or name == "chrf" else f"{name} ({tokens})"
            found[key] = str(metric.get_signature())
    return found


def _tokens(language: str | None) -> str:
    """How sacreBLEU is to cut texts of a language: "zh_CN", "zh-Hans" and "zh" are one."""
    return CHARACTERS.get(re.split("[-_]", language or "")[0].casefold(), WORDS)


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
    assert examples.decode is not None  # `_prepare` saw to it
    pairs = list(zip(rows, outputs, strict=True))
    scores = _scores(pairs, examples.decode)
    hard = [(row, output) for row, output in pairs if row.get(HARD)]
    return replace(scores, hard=_scores(hard, examples.decode)) if hard else scores


def _scores(
    pairs: Sequence[tuple[Mapping[str, Any], Output]], decode: Callable[[Tensor], str]
) -> TranslationScores:
    """Of rows and what the model said to each; a corpus for sacreBLEU has one language."""
    corpora: dict[str | None, list[tuple[Mapping[str, Any], Output]]] = defaultdict(list)
    for row, output in pairs:
        corpora[language_of(row["source"])].append((row, output))
    values: dict[str, list[float]] = defaultdict(list)
    for language, corpus in corpora.items():
        references = [[row["target"] for row, _ in corpus]]
        for search, prefix in (("greedy", ""), ("beam", "beam_")):
            texts = [decode(output[search]) for _, output in corpus]
            for name, metric in _measures(_tokens(language)).items():
                values[prefix + name].append(float(metric.corpus_score(texts, references).score))
    nll = per_token.joined([output for _, output in pairs])["nll"].double()
    means = {name: fmean(found) for name, found in values.items()}
    return TranslationScores(
        n=len(nll),
        loss=float(nll.mean()),
        bleu=means["bleu"],
        chrf=means["chrf"],
        beam_bleu=means["beam_bleu"],
        beam_chrf=means["beam_chrf"],
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
