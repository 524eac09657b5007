"""The real parallel texts, fetched by apt-get: how many there are, and no leak among them."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import pytest

from moduli.data import Task, fetch, load_task
from moduli.data.translation import core
from moduli.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed"),
]

# Pairs of Debian 12.15. The lists change with the release, its translations hardly any more.
SHORT = {"es": 1988, "cs": 2007, "ru": 3142, "pl": 3468, "de": 12887, "fr": 19230}


def texts(task: Task, split: str) -> list[str]:
    parts = [getattr(task.domains[name], split) for name in task.sources]
    return [source.split("<< ", 1)[1] for part in parts for source in part["source"]]


@pytest.fixture(scope="module")
def descriptions() -> Task:
    return load_task("debian-descriptions")


def test_debian_has_the_known_number_of_descriptions_and_says_of_which_release(
    descriptions: Task,
) -> None:
    path = fetch("debian-descriptions")
    columns: dict[str, list[Any]] = pq.read_table(
        path / "debian-descriptions.parquet", columns=["language", "part"]
    ).to_pydict()
    counts = Counter(zip(columns["language"], columns["part"], strict=True))
    for language, count in SHORT.items():
        assert counts[language, "short"] == pytest.approx(count, rel=0.02)
        assert counts[language, "sentence"] > count
    release = (path / "InRelease").read_text()
    assert "Codename: bookworm" in release
    assert "BEGIN PGP SIGNATURE" in release
    assert descriptions.kind == "translation"
    assert descriptions.sources == ("es", "cs", "ru", "pl")
    assert list(descriptions.domains) == ["es", "cs", "ru", "pl"]


def test_no_english_text_is_learnt_and_tested(descriptions: Task) -> None:
    train, test = texts(descriptions, "train"), texts(descriptions, "test")
    assert not {t.casefold() for t in train} & {t.casefold() for t in test}
    assert not {t.casefold() for t in train} & {
        t.casefold() for t in texts(descriptions, "validation")
    }
    tests = (splits.test for splits in descriptions.domains.values())
    rows = [row for table in tests if table is not None for row in table]
    hard = [row["source"] for row in rows if row["hard"]]
    assert not {core(t) for t in train} & {core(t) for t in hard}
    assert 0.8 < len(hard) / len(rows) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("descriptions", "short"), ("sentences", "sentence")])
def test_no_project_is_learnt_and_tested(name: str, part: str) -> None:
    task = load_task(f"debian-{name}")
    table: dict[str, list[Any]] = pq.read_table(
        fetch("debian-descriptions") / "debian-descriptions.parquet",
        columns=["source", "projects"],
        filters=[("part", "=", part)],
    ).to_pydict()
    projects = dict(zip(table["source"], table["projects"], strict=True))
    train, validation, test = (
        {one for text in texts(task, split) for one in projects[text].split(" ")}
        for split in ("train", "validation", "test")
    )
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert len(test) > 200


@pytest.mark.slow
def test_wesnoth_keeps_a_campaign_for_testing() -> None:
    task = load_task("wesnoth", domains=("de", "fi", "ja"))
    assert list(task.domains) == ["de", "fi", "ja"]
    assert not set(texts(task, "train")) & set(texts(task, "test"))
    for name, splits in task.domains.items():
        assert splits.train is not None
        assert splits.test is not None
        assert len(splits.train) > 1000
        assert len(splits.test) > 150, name


@pytest.mark.slow
def test_a_language_without_data_is_refused_with_those_that_have_it() -> None:
    with pytest.raises(DataError, match=r"no domain 'tr'.*'es', 'cs', 'ru', 'pl', 'da', 'de'"):
        load_task("debian-sentences", domains=("tr",))


@pytest.mark.slow
def test_the_split_is_part_of_the_task_and_what_is_scored_is_not() -> None:
    task = load_task("wesnoth", kind="seq2seq", domains=("fi",), max_train=10)
    assert (task.kind, len(task.domains["fi"].train or ())) == ("seq2seq", 10)
    with pytest.raises(ConfigError, match="one of translation, not of classification"):
        load_task("wesnoth", kind="classification")
    with pytest.raises(ConfigError, match=r"test_size.*'wesnoth' does\. max_test takes fewer"):
        load_task("wesnoth", test_size=0.5)
