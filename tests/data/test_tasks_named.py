"""Named tasks on the real data that packages bring: domains, and nothing known from training."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduli.data import Task, fetch, load_task, task_names
from moduli.data.named import NAMED

pytestmark = pytest.mark.network


def parts(task: Task) -> dict[str, list[dict[str, object]]]:
    """All rows of all domains, by split."""
    return {
        split: [row for d in task.domains.values() for row in (getattr(d, split) or [])]
        for split in ("train", "validation", "test")
    }


def test_every_name_is_offered() -> None:
    assert task_names() == sorted(NAMED)


@pytest.fixture(scope="module")
def emoji() -> Path:
    return fetch("emoji")


def test_concepts_to_test_on_are_unseen_in_every_style(emoji: Path) -> None:
    content = NAMED["emoji"].read(emoji)
    concept = {row.content: row.group for row in content.rows}
    task = load_task("emoji")
    assert next(iter(task.domains)) == "noto"
    assert len(task.domains) >= 8
    assert len(task.label_names) == 8
    seen = {
        split: {concept[row["image"]["digest"]] for row in rows}  # type: ignore[index]
        for split, rows in parts(task).items()
    }
    assert min(map(len, seen.values())) > 100
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert sum(map(len, parts(task).values())) == len(content.rows)


def test_brown_is_500_documents_of_15_genres() -> None:
    task = load_task("brown")
    assert task.kind == "language-modeling"
    assert len(task.domains) == 15
    assert next(iter(task.domains)) == "news"
    texts = [row["text"] for rows in parts(task).values() for row in rows]
    assert len(texts) == len(set(texts)) == 500
    assert min(len(str(text).split()) for text in texts) > 1500


@pytest.mark.slow
def test_every_word_of_brown_has_a_tag_and_documents_stay_together() -> None:
    content = NAMED["brown-pos"].read(fetch("brown"))
    home = {row.content.split("\n", 1)[1] + row.domain: row.group for row in content.rows}
    task = load_task("brown-pos")
    assert {"nn", "vb", "jj", "at", "."} <= set(task.label_names)
    assert 50 < len(task.label_names) < 150
    words = 0
    for rows in parts(task).values():
        for row in rows:
            assert len(row["tokens"]) == len(row["tags"])  # type: ignore[arg-type]
            words += len(row["tokens"])  # type: ignore[arg-type]
    assert words > 1_100_000
    assert len(set(home.values())) == 500
    # A document is in one split: its sentences are found in no other.
    splits: dict[str, set[str]] = {}
    text_home = {}
    for row in content.rows:
        text = " ".join(row.values["tokens"])
        text_home[text] = None if text in text_home else row.group  # only sentences of one place
    for split, rows in parts(task).items():
        for row in rows:
            group = text_home[" ".join(row["tokens"])]  # type: ignore[arg-type]
            if group is not None:
                splits.setdefault(group, set()).add(split)
    assert len(splits) == 500
    assert all(len(found) == 1 for found in splits.values())
