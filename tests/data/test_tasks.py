"""Tasks from the user's own files: what is read, how it is split, and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moduli.data import DataOptions, Splits, Task, load_task
from moduli.errors import ConfigError, DataError, UnknownNameError

SPLITS = ("train", "validation", "test")


def table(rows: int = 200) -> list[dict[str, Any]]:
    """Rows of 2 domains and 20 documents, with some texts repeated across documents."""
    rng = random.Random(7)
    words = ["red", "green", "blue", "tall", "warm", "cold", "early", "late", "north", "south"]
    out = []
    for i in range(rows):
        text = " ".join(rng.choices(words, k=2 if i % 10 == 0 else 8))
        label = rng.choice(["pos", "neg"])
        out.append(
            {"text": text, "label": label, "domain": "ab"[i % 2], "doc": f"d{(i % 40) // 2}"}
        )
    return out


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows by the suffix of the path; the name for `load_task`."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return f"{path.suffix[1:]}:{path}"


def parts(splits: Splits) -> dict[str, list[str]]:
    return {s: list(d["text"]) if (d := getattr(splits, s)) is not None else [] for s in SPLITS}


def all_rows(task: Task) -> list[tuple[str, str, str, int]]:
    """(domain, split, text, label) of everything."""
    return [
        (domain, split, text, label)
        for domain, splits in task.domains.items()
        for split in SPLITS
        if (data := getattr(splits, split)) is not None
        for text, label in zip(data["text"], data["label"], strict=True)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_row_of_a_file_arrives_once(tmp_path: Path, suffix: str) -> None:
    rows = table()
    task = load_task(write(tmp_path / f"data{suffix}", rows), domain_column="domain")
    assert task.kind == "classification"
    assert task.label_names == ("neg", "pos")
    assert list(task.domains) == ["a", "b"]
    got = sorted((d, text, task.label_names[label]) for d, _, text, label in all_rows(task))
    assert got == sorted((r["domain"], r["text"], r["label"]) for r in rows)


def test_the_three_formats_give_the_same_task(tmp_path: Path) -> None:
    rows = table()
    tasks = [
        all_rows(load_task(write(tmp_path / f"data{suffix}", rows), domain_column="domain"))
        for suffix in (".csv", ".jsonl", ".parquet")
    ]
    assert tasks[0] == tasks[1] == tasks[2]


def test_sizes_are_the_shares_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"sentence {i}", "label": i % 3} for i in range(100)]
    (splits,) = load_task(write(tmp_path / "data.csv", rows)).domains.values()
    assert {s: len(p) for s, p in parts(splits).items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }


def test_the_split_depends_on_content_and_seed_only(tmp_path: Path) -> None:
    rows = table()
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    options: dict[str, Any] = {"domain_column": "domain", "group_column": "doc"}
    one = all_rows(load_task(write(tmp_path / "one.csv", rows), **options))
    assert all_rows(load_task(write(tmp_path / "two.csv", shuffled), **options)) == one
    assert all_rows(load_task(f"csv:{tmp_path / 'one.csv'}", seed=1, **options)) != one
    # and not on which domains are looked at
    only_b = all_rows(load_task(f"csv:{tmp_path / 'one.csv'}", domains=["b"], **options))
    assert only_b == [row for row in one if row[0] == "b"]


def test_a_row_more_moves_few_others(tmp_path: Path) -> None:
    rows = [{"text": f"sentence {i}", "label": i % 2} for i in range(300)]

    def placed(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
        task = load_task(write(tmp_path / name, rows))
        return {text: split for _, split, text, _ in all_rows(task)}

    before = placed("one.csv", rows)
    after = placed("two.csv", [*rows, {"text": "one more", "label": 0}])
    assert sum(after[text] != split for text, split in before.items()) <= 2


def homes(task: Task, key: Callable[[str], str]) -> dict[str, set[str]]:
    """The splits in which each text, or document, by `key`, is found."""
    found: dict[str, set[str]] = {}
    for _, split, text, _ in all_rows(task):
        found.setdefault(key(text), set()).add(split)
    return found


def test_repeated_texts_never_cross_splits(tmp_path: Path) -> None:
    rows = table(400)
    rows += [{**row, "text": f"  {row['text'].upper()} "} for row in rows[:60]]
    task = load_task(write(tmp_path / "data.csv", rows), domain_column="domain")
    found = homes(task, lambda text: " ".join(text.lower().split()))
    assert len(found) < 400  # some are repeated, also across domains
    assert all(len(splits) == 1 for splits in found.values())
    assert {s for splits in found.values() for s in splits} == set(SPLITS)


def test_documents_never_cross_splits(tmp_path: Path) -> None:
    rows = [{**row, "text": f"{row['doc']} sentence {i}"} for i, row in enumerate(table(400))]
    name = write(tmp_path / "data.csv", rows)
    found = homes(load_task(name, group_column="doc"), lambda text: text.split()[0])
    assert len(found) == 20
    assert all(len(splits) == 1 for splits in found.values())
    assert {s for splits in found.values() for s in splits} == set(SPLITS)
    # without the column they do cross: the test above can fail
    loose = homes(load_task(name), lambda text: text.split()[0])
    assert any(len(splits) > 1 for splits in loose.values())


def test_a_repeated_text_joins_the_documents_it_is_in(tmp_path: Path) -> None:
    rows = [
        {"text": f"{doc} sentence {i}", "label": i % 2, "doc": doc}
        for doc in (f"d{n}" for n in range(30))
        for i in range(4)
    ]
    rows += [{"text": "the same", "label": 0, "doc": f"d{n}"} for n in (0, 9, 17, 25)]
    task = load_task(write(tmp_path / "data.csv", rows), group_column="doc")
    found = homes(task, lambda text: text.split()[0])
    assert len(found["d0"] | found["d9"] | found["d17"] | found["d25"] | found["the"]) == 1


def test_a_text_in_two_domains_is_in_the_same_split_of_both(tmp_path: Path) -> None:
    rows = [
        {"text": f"sentence {i}", "label": i % 2, "domain": domain}
        for i, domain in itertools.product(range(100), "ab")
    ]
    task = load_task(write(tmp_path / "data.csv", rows), domain_column="domain")
    a, b = (parts(splits) for splits in task.domains.values())
    assert {s: sorted(a[s]) for s in SPLITS} == {s: sorted(b[s]) for s in SPLITS}


def test_limits_keep_a_subset_of_the_shuffled_split(tmp_path: Path) -> None:
    name = write(tmp_path / "data.csv", table())
    (full,) = load_task(name).domains.values()
    (cut,) = load_task(name, max_train=30, max_test=7).domains.values()
    assert parts(cut)["train"] == parts(full)["train"][:30]
    assert parts(cut)["test"] == parts(full)["test"][:7]
    assert parts(cut)["validation"] == parts(full)["validation"]


def test_pairs(tmp_path: Path) -> None:
    rows = [{"a": f"premise {i}", "b": f"hypothesis {i}", "y": i % 2} for i in range(50)]
    task = load_task(
        write(tmp_path / "pairs.jsonl", rows),
        text_column="a",
        text_pair_column="b",
        label_column="y",
    )
    data = task.domains["all"].train
    assert data is not None
    assert data.column_names == ["text", "text_pair", "label"]
    assert all(row["text"].split()[1] == row["text_pair"].split()[1] for row in data)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["no", "yes", "maybe"], ("maybe", "no", "yes")),
        ([True, False], ("false", "true")),
        ([1.0, 0.0], ("0", "1")),
        (["1", "one"], ("1", "one")),
    ],
)
def test_classes_are_in_order_whatever_the_order_of_the_rows(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...]
) -> None:
    rows = [{"text": f"t {i}", "label": labels[i % len(labels)]} for i in range(30)]
    task = load_task(write(tmp_path / "data.jsonl", rows))
    assert task.label_names == names
    for _, _, text, label in all_rows(task):
        value = labels[int(text.split()[1]) % len(labels)]
        word = str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")
        assert names[label] == word


def test_given_test_rows_stay_and_what_would_leak_into_them_goes(tmp_path: Path) -> None:
    train = [{"text": f"train {i}", "label": i % 2} for i in range(50)]
    test = [{"text": f"test {i}", "label": i % 2} for i in range(10)]
    train += [{"text": "TEST  3", "label": 1}, {"text": "test 4", "label": 0}]
    write(tmp_path / "train.csv", train)
    write(tmp_path / "test.csv", test)
    task = load_task(f"csv:{tmp_path / 'train.csv'},test={tmp_path / 'test.csv'}")
    got = parts(task.domains["all"])
    assert sorted(got["test"]) == sorted(row["text"] for row in test)
    assert len(got["train"]) == 45
    assert len(got["validation"]) == 5
    (note, guess) = task.notes
    assert note.startswith("2 rows of train were left out")
    assert guess.startswith("Taken as classification")


def test_a_train_file_that_is_the_test_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data.csv", table())
    refused(
        f"csv:{tmp_path / 'data.csv'},test={tmp_path / 'data.csv'}", "No rows are left to train"
    )


def test_a_domain_only_in_the_given_test_file_has_no_train(tmp_path: Path) -> None:
    home = [{"text": f"home {i}", "label": i % 2, "domain": "home"} for i in range(50)]
    away = [{"text": f"away {i}", "label": i % 2, "domain": "away"} for i in range(20)]
    write(tmp_path / "train.csv", home)
    write(tmp_path / "test.csv", away)
    name = f"csv:{tmp_path / 'train.csv'},test={tmp_path / 'test.csv'}"
    task = load_task(name, domain_column="domain")
    assert task.domains["away"].train is None
    assert task.domains["away"].test is not None
    assert task.domains["home"].test is None


def test_a_local_directory_loads_as_a_datasets_name(tmp_path: Path) -> None:
    for split, count in (("train", 60), ("test", 12)):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(count)]
        write(tmp_path / f"{split}.jsonl", rows)
    got = parts(load_task(str(tmp_path)).domains["all"])
    assert {s: len(p) for s, p in got.items()} == {"train": 54, "validation": 6, "test": 12}


def test_a_hidden_test_set_is_not_used_and_class_names_are_kept(tmp_path: Path) -> None:
    """As GLUE has it: class names in the features, and -1 for every label of test."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "even"])})
    for split, count in (("train", 60), ("test", 12)):
        labels = [i % 2 if split == "train" else -1 for i in range(count)]
        texts = [f"{split} {i}" for i in range(count)]
        data = Dataset.from_dict({"text": texts, "label": labels}, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    task = load_task(str(tmp_path))
    assert task.label_names == ("no", "even")
    assert all(text.startswith("train") for _, _, text, _ in all_rows(task))
    assert {s: len(p) for s, p in parts(task.domains["all"]).items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
    }
    assert any("(test) is not used: it has no labels" in note for note in task.notes)


def test_csv_texts_may_hold_commas_quotes_newlines_and_a_bom(tmp_path: Path) -> None:
    texts = ['say "hi", then', "two\nlines", "null", "NA", "x" * 300_000, "naïve ☃"]
    texts += [f"plain {i}" for i in range(20)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    name = write(tmp_path / "data.csv", rows)
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sorted(text for _, _, text, _ in all_rows(load_task(name))) == sorted(texts)


def refused(name: str, match: str, **options: Any) -> str:
    with pytest.raises(DataError, match=match) as caught:
        load_task(name, **options)
    return str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", table())
    refused(f"csv:{tmp_path / 'review.csv'}", r"does not exist.*reviews\.csv")
    refused(f"csv:{tmp_path}", "is a directory")


def test_a_missing_column_names_those_that_exist_and_the_option(tmp_path: Path) -> None:
    rows = [{"texts": f"t {i}", "sentiment": i % 2} for i in range(9)]
    name = write(tmp_path / "data.csv", rows)
    message = refused(name, r"no column 'text'. Did you mean 'texts'\?")
    assert "'texts', 'sentiment'" in message
    message = refused(name, "no column 'label'", text_column="texts")
    assert "label_column" in message
    refused(name, "domain_column", text_column="texts", label_column="sentiment", domain_column="d")


def test_one_class_is_refused(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": "pos"} for i in range(9)]
    refused(write(tmp_path / "data.csv", rows), r"all 9 rows have the same label 'pos'")


@pytest.mark.parametrize(
    ("suffix", "nothing"), [(".csv", ""), (".csv", " \t"), (".jsonl", None), (".parquet", None)]
)
def test_empty_texts_are_counted_shown_and_droppable(
    tmp_path: Path, suffix: str, nothing: str | None
) -> None:
    rows = table()
    for i in (3, 50, 51):
        rows[i]["text"] = nothing
    name = write(tmp_path / f"data{suffix}", rows)
    message = refused(name, r"3 of 200 rows with no text \(column 'text'\): rows 4, 51, 52\.")
    assert "drop_empty=True" in message
    task = load_task(name, drop_empty=True)
    assert len(all_rows(task)) == 197
    assert "left out 3 of 200 rows" in task.notes[0]


@pytest.mark.parametrize(
    ("suffix", "nothing"),
    [(".csv", ""), (".csv", "nan"), (".jsonl", None), (".jsonl", float("nan")), (".parquet", None)],
)
def test_missing_labels_are_counted_shown_and_droppable(
    tmp_path: Path, suffix: str, nothing: Any
) -> None:
    rows = [{"text": f"t {i}", "label": i % 2 if suffix == ".parquet" else "ab"[i % 2]}
            for i in range(40)]  # fmt: skip
    rows[0]["label"] = nothing
    name = write(tmp_path / f"data{suffix}", rows)
    refused(name, r"1 of 40 rows with no label \(column 'label'\): row 1\.")
    assert len(all_rows(load_task(name, drop_empty=True))) == 39


def test_a_file_with_nothing_usable_is_refused_even_if_dropping(tmp_path: Path) -> None:
    name = write(tmp_path / "data.jsonl", [{"text": "", "label": i} for i in range(3)])
    refused(name, "none of its 3 rows", drop_empty=True)


def test_an_absent_domain_names_the_existing_ones(tmp_path: Path) -> None:
    name = write(tmp_path / "data.csv", table())
    message = refused(name, "no domain 'c'", domain_column="domain", domains=["a", "c"])
    assert "'a', 'b'" in message


def test_a_domain_too_small_to_split_is_refused(tmp_path: Path) -> None:
    rows = [*table(), {"text": "lonely", "label": "pos", "domain": "c", "doc": "c1"}]
    name = write(tmp_path / "data.csv", rows)
    message = refused(name, r"'c' has no rows for test: its 1 rows", domain_column="domain")
    assert "domains=" in message
    # the others are usable
    task = load_task(name, domain_column="domain", domains=("a", "b"))
    assert list(task.domains) == ["a", "b"]


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 2, "doc": "same"} for i in range(50)]
    refused(write(tmp_path / "d.csv", rows), "has no rows for test", group_column="doc")


def test_rows_without_a_domain_are_refused(tmp_path: Path) -> None:
    rows = table()
    rows[9]["domain"] = ""
    name = write(tmp_path / "data.csv", rows)
    refused(
        name, r"1 of 200 rows have no domain \(column 'domain'\): row 10", domain_column="domain"
    )


@pytest.mark.parametrize("labels", [[0.5, 1.25, 3.0], ["0.5", "1.25", "3"]])
def test_real_numbers_are_no_classes(tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"text": f"t {i}", "label": labels[i % 3]} for i in range(30)]
    name = write(tmp_path / "data.jsonl", rows)
    refused(name, r"holds real numbers \(0.5\)", kind="classification")


def test_a_column_of_identifiers_is_no_column_of_classes(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": f"id{i}"} for i in range(100)]
    refused(write(tmp_path / "data.csv", rows), "100 different values in 100 rows")


def test_a_text_column_of_numbers_is_refused(tmp_path: Path) -> None:
    rows = [{"text": i, "label": i % 2} for i in range(10)]
    refused(write(tmp_path / "data.jsonl", rows), "holds int at row 1")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", b"text,label\ngood,1\nbad, worse,0\n", "not a well-formed CSV"),
        ("a.csv", b"text,text\na,b\n", "two columns named 'text'"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "not UTF-8"),
        ("a.csv", bytes(range(256)), "not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "lab\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is list"),
        ("a.jsonl", b"", "no column 'text'"),
        ("a.parquet", b"PAR1 but not really", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
    ],
)
def test_a_garbled_file_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refused(f"{path.suffix[1:]}:{path}", match)


def test_a_path_without_its_kind_says_what_to_type(tmp_path: Path) -> None:
    write(tmp_path / "data.csv", table())
    refused(str(tmp_path / "data.csv"), "csv:")


def test_near_misses_are_said_without_asking_a_hub() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'sentiment'"):
        load_task("sentimnt")
    with pytest.raises(UnknownNameError, match="Did you mean 'jsonl'"):
        load_task("json:data.json")
    with pytest.raises(UnknownNameError, match="Did you mean 'text_column'"):
        load_task("sentiment", text_colum="x")


def test_a_name_that_datasets_cannot_load_is_a_data_error() -> None:
    refused("nobody/has-this-data-set", "datasets.load_dataset could not load it")


@pytest.mark.parametrize(
    "options",
    [
        {"max_train": 0},
        {"test_size": 1.0},
        {"validation_size": -0.1},
        {"test_size": 0.6, "validation_size": 0.5},
        {"domains": ()},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DataOptions(**options)
