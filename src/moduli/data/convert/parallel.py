"""Parallel text: which parts of a text and of its translation are translations of each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

SHORTEST, LONGEST = 10, 300
"""Characters of a sentence that is kept, in both languages."""
RATIO = (0.3, 3.0)
"""Of the length of a translation to that of its source."""

# Japanese and Chinese write no space after the end of a sentence.
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


def one_line(text: str) -> str:
    """The text with single spaces for all white space."""
    return " ".join(text.split())


def sentence_pairs(source: str, target: str) -> Iterator[tuple[str, str]]:
    """Sentences that correspond: those of texts with equally many, in order.

    Texts that differ in the number of their sentences give none, for then it is not known which
    belong together. Pairs are left out that are equal (not translated), shorter or longer than
    `SHORTEST` to `LONGEST` characters, or too unequal in length (`RATIO`) to say the same.

    Args:
        source, target: a text and its translation.
    """
    one, other = _sentences(source), _sentences(target)
    if len(one) != len(other):
        return
    for a, b in zip(one, other, strict=True):
        fits = all(SHORTEST <= len(text) <= LONGEST for text in (a, b))
        if a != b and fits and RATIO[0] <= len(b) / len(a) <= RATIO[1]:
            yield a, b


def _sentences(text: str) -> list[str]:
    return [part for part in _END.split(one_line(text)) if part]
