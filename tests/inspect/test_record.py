"""An inspection survives its file; a file that is not one is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moduli.errors import CheckpointError
from moduli.inspect.record import (
    ActivationPattern,
    Inspection,
    LayerInspection,
    Selection,
    TokenTrace,
)

LAYER = LayerInspection(
    name="encoder.layer.0",
    num_experts=2,
    top_k=1,
    active=1.0,
    tokens=30,
    padding=0.25,
    load=(0.75, 0.25),
    mass=(0.5, 0.5),
    entropy=None,
    load_entropy=0.8,
    dead=(1,),
    duplicates=((0, 1, 0.99),),
    coselection=((0.75, 0.0), (0.0, 0.25)),
    by_domain={"films": (1.0, 0.0), "books": (0.5, 0.5)},
    by_class={"good": (0.75, 0.25)},
    quality={"share": 0.25},
)
WHOLE = Inspection(
    title="a model <of> mine",
    layers=(LAYER, replace(LAYER, name="encoder.layer.1", coselection=None, quality=None)),
    overlap=((1.0, 0.5), (0.5, None)),
    overlap_by_chance=((0.25, 0.125), (0.125, None)),
    domains=("films", "books"),
    classes=("good", "bad"),
    selection=Selection(steps=(10, 20), shares={"encoder.layer.0": ((0.5, 0.5), (1.0, 0.0))}),
    tokens=(
        TokenTrace(
            pieces=("a", "b"),
            experts={"encoder.layer.0": ((0,), ())},
            weights={"encoder.layer.0": ((1.0,), ())},
        ),
    ),
    activations=(
        ActivationPattern(
            layer="encoder.layer.0", sizes=(3, 3), original=((1, 2),), by_expert=((0, 3),)
        ),
    ),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "inspection.json"
    WHOLE.write(path)
    assert Inspection.read(path) == WHOLE
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_record_from_before_chance_was_counted_is_read() -> None:
    data = WHOLE.to_dict()
    del data["overlap_by_chance"]
    assert Inspection.from_dict(data) == replace(WHOLE, overlap_by_chance=())


def test_numbers_are_short() -> None:
    data = replace(WHOLE, layers=(replace(LAYER, padding=1 / 3),)).to_dict()
    assert data["layers"][0]["padding"] == 0.33333


def test_minimal_record() -> None:
    bare = Inspection(title="", layers=())
    assert Inspection.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version is 2"),
        ({"layers": 3}, "not iterable"),
        ({"overlap": [[1.0]]}, "1 columns of overlap where 2"),
        ({"overlap_by_chance": [[1.0]]}, "1 columns of overlap where 2"),
        ({"surprise": 1}, "surprise"),
        ({"tokens": [{"pieces": ["a"], "experts": {"x": []}, "weights": {}}]}, "0 tokens of x"),
        ({"selection": {"steps": [1], "shares": {"x": [[1], [1]]}, "padding": False}}, "2 rows"),
        ({"selection": {"steps": [1.5], "shares": {}, "padding": False}}, "1.5 is not a whole"),
    ],
)
def test_another_form_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Inspection.from_dict({**WHOLE.to_dict(), **change})


@pytest.mark.parametrize("name", ["version", "layers", "title", "domains"])
def test_a_missing_part_is_named(name: str) -> None:
    data = WHOLE.to_dict()
    del data[name]
    with pytest.raises(CheckpointError, match=name):
        Inspection.from_dict(data)


def test_experts_that_do_not_add_up_are_refused() -> None:
    data = WHOLE.to_dict()
    data["layers"][0]["load"].append(0.0)
    with pytest.raises(CheckpointError, match="3 experts where 2"):
        Inspection.from_dict(data)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "inspection.json"
    with pytest.raises(CheckpointError, match="No such file"):
        Inspection.read(path)
    WHOLE.write(path)
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(CheckpointError, match="not JSON"):
        Inspection.read(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not an inspection"):
        Inspection.read(path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="could not write"):
        WHOLE.write(tmp_path / "file" / "inspection.json")
