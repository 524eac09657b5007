"""Kinds of tasks from files: what a table is taken for, what its cells become, what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from moduli.data import Task, load_task
from moduli.data.kinds import KINDS
from moduli.data.media import open_image, read_audio
from moduli.errors import ConfigError, DataError, UnknownNameError
from tests.training import tinykinds


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return f"csv:{path}"


def all_rows(task: Task) -> list[dict[str, Any]]:
    return [
        row
        for splits in task.domains.values()
        for part in (splits.train, splits.validation, splits.test)
        if part is not None
        for row in part
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_say_the_kind_and_it_is_said_what_they_were_taken_for(
    kind: str, tmp_path: Path
) -> None:
    name = tinykinds.write_rows(kind, tmp_path)
    if kind == "language-modeling":
        with pytest.raises(DataError, match="kind='language-modeling'"):
            load_task(name)
    else:
        task = load_task(name)
        # what is scored of a translation is another text's own matter, and has to be asked for
        guess = "seq2seq" if kind == "translation" else kind
        assert task.kind == guess
        assert task.notes[-1].startswith(f"Taken as {guess}: ")
    task = load_task(name, kind=kind)
    assert task.kind == kind
    assert not task.notes
    rows = all_rows(task)
    assert len(rows) == len(Path(name.removeprefix("jsonl:")).read_text().splitlines())
    assert set(rows[0]) == {cell.name for cell in KINDS[kind].columns} - {"text_pair"}


def test_a_text_and_a_label_go_before_other_columns(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 2, "source": "a", "target": "b"} for i in range(20)]
    assert load_task(table(tmp_path / "d.csv", rows)).kind == "classification"
    assert load_task(f"csv:{tmp_path / 'd.csv'}", kind="regression").kind == "regression"


def test_labels_of_sets_may_be_lists_or_words_with_marks_between(tmp_path: Path) -> None:
    sets = [["b"], ["a", "c"], [], ["c"]]
    rows = [{"text": f"t {i}", "label": sets[i % 4]} for i in range(40)]
    lists = load_task(jsonl(tmp_path / "a.jsonl", rows))
    words = [{**row, "label": " ; ".join(row["label"])} for row in rows]
    marked = load_task(table(tmp_path / "b.csv", words), kind="multilabel")
    spaced = [{**row, "label": " ".join(row["label"])} for row in rows]
    plain = load_task(table(tmp_path / "c.csv", spaced), kind="multilabel")
    for task in (lists, marked, plain):
        assert task.kind == "multilabel"
        assert task.label_names == ("a", "b", "c")
        for row in all_rows(task):
            wanted = sets[int(row["text"].split()[1]) % 4]
            assert [task.label_names[i] for i in row["label"]] == wanted


def test_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i / 8} for i in range(40)]
    for task in (
        load_task(jsonl(tmp_path / "a.jsonl", rows)),
        load_task(table(tmp_path / "b.csv", rows)),
    ):
        assert task.kind == "regression"
        assert task.label_names == ()
        assert {row["label"]: row["text"] for row in all_rows(task)} == {
            row["label"]: row["text"] for row in rows
        }


def test_words_and_tags_may_be_lists_or_texts(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", f"w{i}"], "tags": ["X", "Y"]} for i in range(20)]
    lists = load_task(jsonl(tmp_path / "a.jsonl", rows))
    texts = [{k: " ".join(v) for k, v in row.items()} for row in rows]
    words = load_task(table(tmp_path / "b.csv", texts))
    quoted = [{k: json.dumps(v) for k, v in row.items()} for row in rows]
    coded = load_task(table(tmp_path / "c.csv", quoted))
    assert all_rows(lists) == all_rows(words) == all_rows(coded)
    assert lists.label_names == ("X", "Y")


def test_tags_of_a_datasets_directory_keep_their_names(tmp_path: Path) -> None:
    """As CoNLL has them: integers in lists, with names in the features."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    names = ["O", "B-PER", "B-LOC"]
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
    )
    columns = {"tokens": [["a", f"w{i}"] for i in range(30)], "ner_tags": [[0, 2]] * 30}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    task = load_task(str(tmp_path), tags_column="ner_tags")
    assert task.kind == "token-classification"
    assert task.label_names == tuple(names)
    assert all(row["tags"] == [0, 2] for row in all_rows(task))


def test_equal_pictures_are_in_one_split(tmp_path: Path) -> None:
    for i in range(30):
        for copy in "ab":
            (tmp_path / f"{copy}{i}.png").write_bytes(tinykinds.picture(i, bool(i % 2)))
    rows = [{"image": f"{copy}{i}.png", "label": i % 2} for i in range(30) for copy in "ab"]
    task = load_task(jsonl(tmp_path / "d.jsonl", rows))
    (splits,) = task.domains.values()
    homes: dict[str, set[str]] = {}
    for name in ("train", "validation", "test"):
        for row in getattr(splits, name):
            homes.setdefault(row["image"]["digest"], set()).add(name)
    assert len(homes) == 30
    assert all(len(places) == 1 for places in homes.values())


def test_pictures_come_from_paths_bytes_and_records_alike(tmp_path: Path) -> None:
    from datasets import Dataset, Image

    content = [tinykinds.picture(i, bool(i % 2)) for i in range(20)]
    labels = [i % 2 for i in range(20)]
    plain = Dataset.from_dict({"image": content, "label": labels})
    plain.to_parquet(tmp_path / "plain.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    typed = Dataset.from_dict(
        {"image": [{"bytes": c, "path": None} for c in content], "label": labels}
    ).cast_column("image", Image())
    typed.to_parquet(folder / "train.parquet")
    tasks = [load_task(f"parquet:{tmp_path / 'plain.parquet'}"), load_task(str(folder))]
    for task in tasks:
        assert task.kind == "image-classification"
    one, other = (
        {row["image"]["digest"]: row["label"] for row in all_rows(task)} for task in tasks
    )
    assert one == other
    assert open_image(all_rows(tasks[0])[0]["image"]).size == (20, 20)


def test_what_is_transparent_is_white() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    cell = {"path": None, "bytes": buffer.getvalue()}
    assert open_image(cell).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_sound_is_the_same_in_every_wav(dtype: Any) -> None:
    wave = 0.5 * np.sin(np.arange(800) / 10)
    scale = {np.uint8: 127, np.int16: 32767, np.int32: 2**31 - 1}.get(dtype, 1)
    stereo = np.stack([wave, wave], 1) * scale + (128 if dtype is np.uint8 else 0)
    buffer = io.BytesIO()
    wavfile.write(buffer, 8000, stereo.astype(dtype))
    cell = {"path": None, "bytes": buffer.getvalue()}
    found = read_audio(cell, 8000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wave, atol=0.02)  # 8 bits are coarse
    assert abs(len(read_audio(cell, 16000)) - 1600) <= 1
    spectrum = np.abs(np.fft.rfft(read_audio(cell, 16000)))
    frequency = spectrum.argmax() * 16000 / 1600
    assert frequency == pytest.approx(8000 / 10 / (2 * np.pi), abs=10)


def test_arrays_with_a_sampling_rate_are_sound(tmp_path: Path) -> None:
    rows = [
        {"audio": {"array": [i / 40, -i / 40, 0.25], "sampling_rate": 100}, "label": i % 2}
        for i in range(20)
    ]
    task = load_task(jsonl(tmp_path / "d.jsonl", rows))
    assert task.kind == "audio-classification"
    values = sorted(read_audio(row["audio"], 100).tolist() for row in all_rows(task))
    np.testing.assert_allclose(values, sorted(row["audio"]["array"] for row in rows), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "row", "match"),
    [
        ("regression", {"text": "a", "label": "many"}, r"holds str at row 2 \('many'\), not a"),
        ("regression", {"text": "a", "label": "inf"}, "not a finite number"),
        ("token-classification", {"tokens": ["a"], "tags": ["X", "Y"]}, "row 2 has 1 words.*2 tag"),
        ("token-classification", {"tokens": [1], "tags": ["X"]}, "row 2.*something else than"),
        ("token-classification", {"tokens": "[a", "tags": "X"}, "not closed or not JSON"),
        ("token-classification", {"tokens": [], "tags": []}, "no words .column 'tokens'.: row 2"),
        ("seq2seq", {"source": "a", "target": " "}, "no text .column 'target'.: row 2"),
        ("image-classification", {"image": "gone.png", "label": 1}, "row 2.*'gone.png'.*cannot be"),
        ("image-classification", {"image": "d.jsonl", "label": 1}, "no image that Pillow can"),
        ("audio-classification", {"audio": "d.jsonl", "label": 1}, "no wav file; convert"),
        ("audio-classification", {"audio": {"array": [1.0]}, "label": 1}, "without a sampling"),
    ],
)  # fmt: skip
def test_cells_that_cannot_be_used_are_refused_with_their_place(
    kind: str, row: dict[str, Any], match: str, tmp_path: Path
) -> None:
    first = Path(tinykinds.write_rows(kind, tmp_path).removeprefix("jsonl:"))
    lines = first.read_text().splitlines()
    good = {key: json.loads(lines[0])[key] for key in row}
    name = jsonl(tmp_path / "d.jsonl", [good, row])
    with pytest.raises(DataError, match=match):
        load_task(name, kind=kind)


def test_kinds_that_do_not_exist_and_kinds_of_named_tasks(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'regression'"):
        load_task("sentiment", kind="regressions")
    with pytest.raises(ConfigError, match="is one of classification"):
        load_task("sentiment", kind="regression")


def test_sets_without_any_label_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": []} for i in range(9)]
    with pytest.raises(DataError, match="no row has a label"):
        load_task(jsonl(tmp_path / "d.jsonl", rows))
