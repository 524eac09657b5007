"""Splits without leaks: a document or a repeated input is never in two splits.

Rows that share a document, a (normalised) text, or an image or sound byte for byte are one
component, also across domains, and a component goes to one split as a whole. Components are
ordered by a seeded hash of their content, so the split does not depend on the order of the file,
and a row that is added moves few others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moduli.data.kinds import DataKind
from moduli.data.rows import Row
from moduli.data.task import DataOptions, Splits
from moduli.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")


def split_rows(
    rows: Sequence[Row],
    names: tuple[str, ...],
    options: DataOptions,
    kind: DataKind,
    order: Sequence[str] | None = None,
) -> tuple[dict[str, Splits], list[str]]:
    """Splits of every domain, and notes on rows that were removed because they would leak.

    Args:
        rows: where `row.split` is None, or "train" while another split is not given, the split is
            decided here: cut by row counts at 1 - validation - test and 1 - test of each domain.
        names: of the labels.
        options: sizes, seed, limits, domains.
        kind: what the columns hold.
        order: the domains in order; sorted names by default.

    Raises:
        DataError: a domain that was asked for does not exist, or a split has no rows.
    """
    known = list(order) if order is not None else sorted({row.domain for row in rows})
    wanted = list(options.domains or known)
    for name in wanted:
        if name not in known:
            existing = ", ".join(repr(domain) for domain in known)
            hint = nearest(name, known)
            hint = f" {hint}" if hint.startswith("Did") else ""
            raise DataError(f"There is no domain {name!r}.{hint} Domains of this data: {existing}.")
    assigned, removed = _assign(rows, options)
    given = {row.split for row in rows} != {None}
    if given and "train" not in assigned:
        raise DataError(
            "No rows are left to train on: the texts or documents of all of them are in the given "
            "validation or test rows as well."
        )
    domains: dict[str, Splits] = {}
    for name in wanted:
        parts = {
            split: [
                row
                for row, to in zip(rows, assigned, strict=True)
                if row.domain == name and to == split
            ]
            for split in SPLITS
        }
        _check_parts(name, parts, options, given)
        domains[name] = Splits(**{s: _dataset(parts[s], names, options, kind, s) for s in SPLITS})
    notes = [
        f"{count} rows of {lost} were left out: their text or document is in {kept} as well."
        for (lost, kept), count in sorted(removed.items())
    ]
    return domains, notes


def _assign(
    rows: Sequence[Row], options: DataOptions
) -> tuple[list[str | None], Counter[tuple[str, str]]]:
    """The split of every row, None for those removed, and how many were removed from where."""
    fixed = {row.split for row in rows} - {None, "train"}
    test = 0.0 if "test" in fixed else options.test_size
    validation = 0.0 if "validation" in fixed else options.validation_size
    digests = [_digest(row, options.seed) for row in rows]
    assigned: list[str | None] = [row.split for row in rows]
    removed: Counter[tuple[str, str]] = Counter()
    free = []
    for members in _components(rows):
        held = {assigned[i] for i in members} & fixed
        if not held:
            free.append(sorted(members, key=lambda i: digests[i]))
            continue
        # a given split keeps its rows; those that would leak into it are removed
        kept = "test" if "test" in held else "validation"
        for i in members:
            if assigned[i] != kept:
                removed[(assigned[i] or "train", kept)] += 1
                assigned[i] = None

    totals = Counter(rows[i].domain for members in free for i in members)
    done: Counter[str] = Counter()
    for members in sorted(free, key=lambda members: digests[members[0]]):
        sizes = Counter(rows[i].domain for i in members)
        anchor = rows[members[0]].domain
        # share of the domain's rows from the middle of this component to the end
        left = 1 - (done[anchor] + sizes[anchor] / 2) / totals[anchor]
        split = "test" if left < test else "validation" if left < test + validation else "train"
        for i in members:
            assigned[i] = split
        done.update(sizes)
    return assigned, removed


def _components(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of rows connected by a shared document or text (union-find)."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        keys = [("content", row.content)]
        if row.group is not None:
            keys.append(("group", row.group))
        for key in keys:
            parent[root(i)] = root(owner.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(rows)):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def _digest(row: Row, seed: int) -> bytes:
    salt = seed.to_bytes(16, "little", signed=True)
    return hashlib.blake2b(row.content.encode("utf-8", "surrogatepass"), salt=salt).digest()


def _check_parts(name: str, parts: dict[str, list[Row]], options: DataOptions, given: bool) -> None:
    """A domain without rows to train or test on is refused, unless the user split it so."""
    required = [] if given else ["train"] + (["test"] if options.test_size else [])
    total = sum(len(part) for part in parts.values())
    empty = [split for split in required if not parts[split]]
    if empty or not total:
        raise DataError(
            f"Domain {name!r} has no rows for {' and '.join(empty) or 'any split'}: its {total} "
            "rows (those of one document or with the same text stay together) cannot be split by "
            f"validation_size={options.validation_size} and test_size={options.test_size}. "
            "Leave the domain out with domains=..., join it with another, or change the sizes."
        )


def _dataset(
    rows: list[Row], names: tuple[str, ...], options: DataOptions, kind: DataKind, split: str
) -> Dataset | None:
    if not rows:
        return None
    from datasets import Dataset

    # rows, not documents, in shuffled order: the first n are a fair sample of the split
    rows = sorted(rows, key=lambda row: (_digest(row, options.seed), repr(row.values)))
    rows = rows[: getattr(options, f"max_{split}")]
    features = kind.features(names, set(rows[0].values))
    columns = {name: [row.values[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, features=features)
