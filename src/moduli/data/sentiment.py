"""Sentences of four domains that people rated: tweets, movie reviews, Amazon reviews, editorials.

Source: the ground-truth files of VADER (Hutto and Gilbert, ICWSM 2014), as the package
vaderSentiment ships them: id, mean rating in [-4, 4], text, tab separated. A rating above 0.5 is
positive, below -0.5 negative; sentences in between are left out.
"""

from __future__ import annotations

from pathlib import Path

from moduli.data.kinds import data_kind
from moduli.data.rows import Row
from moduli.errors import DataError

LABEL_NAMES = ("negative", "positive")
THRESHOLD = 0.5

_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
DOMAINS = tuple(_FILES)

_DOCUMENTS = ("amazon", "nyt")
"""Their ids are "document_sentence"; the sentences of a review or editorial stay together."""


def sentiment_rows(directory: Path) -> list[Row]:
    """The labelled rows of all four domains, from the directory that `fetch("sentiment")` gives.

    Raises:
        DataError: a file is not what the package ships.
    """
    kind = data_kind("classification")
    return [
        Row(
            values=(values := {"text": text, "label": int(rating > 0)}),
            content=kind.content(values),
            domain=domain,
            group=f"{domain} {key.rpartition('_')[0]}" if domain in _DOCUMENTS else None,
        )
        for domain in DOMAINS
        for key, rating, text in rated_sentences(directory, domain)
        if abs(rating) > THRESHOLD
    ]


def rated_sentences(directory: Path, domain: str) -> list[tuple[str, float, str]]:
    """(id, mean rating, text) of every sentence of a domain."""
    path = directory / _FILES[domain]
    sentences = []
    # only "\n" ends a record: texts contain other characters that splitlines() would break at
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.rstrip("\r"):
            continue
        try:
            key, rating, text = line.rstrip("\r").split("\t")
            sentences.append((key, float(rating), text))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not 'id, rating, text' separated by tabs. "
                "Delete the directory and fetch it again: moduli fetch sentiment"
            ) from error
    return sentences
