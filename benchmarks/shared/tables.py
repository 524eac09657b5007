"""What commands that fill tables into pages share: the places, and numbers as they stand there."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moduli.study.statistics import paired_difference, summarise

ROOT = Path(__file__).parents[2]


def write_places(
    pages: Sequence[str], filled: Callable[[str], str], *, check: bool, command: str
) -> int:
    """Fill the places of all pages anew, or only say which are not up to date.

    Args:
        pages: relative to the repository.
        filled: the text of a page with its places filled.
        check: write nothing.
        command: that would bring them up to date.

    Returns:
        1 if something was to be checked and is not up to date, else 0.
    """
    stale = []
    for page in (ROOT / name for name in pages):
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"not up to date: {', '.join(stale)}; run {command}\n")
        return 1
    return 0


def check_option(description: str) -> argparse.ArgumentParser:
    """A parser of a command whose `--check` writes nothing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    return parser


def spread(values: Mapping[int, float], *, signed: bool = False, digits: int = 3) -> str:
    """A mean over seeds with its standard deviation, if there is one."""
    summary = summarise(values)
    mean = number(summary.mean, signed=signed, digits=digits)
    return mean if summary.sd is None else f"{mean} ± {summary.sd:.{digits}f}"


def difference(
    values: Mapping[int, float], baseline: Mapping[int, float], *, digits: int = 3
) -> str:
    """A paired difference over seeds with its interval."""
    found = paired_difference(values, baseline)
    if found is None:
        return ""
    mean = number(found.mean, signed=True, digits=digits)
    if found.interval is None:
        return mean
    ends = (number(end, signed=True, digits=digits) for end in found.interval)
    return f"{mean} ({' to '.join(ends)})"


def number(value: float, *, signed: bool = False, digits: int = 3) -> str:
    """Some decimals, and a real minus sign."""
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def average(values: Mapping[int, float]) -> float:
    """The mean over seeds."""
    return math.fsum(values.values()) / len(values)


def lines_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown: the first row is its head, the first column its labels."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|---|{'--:|' * (len(rows[0]) - 1)}")
    return lines
