"""`moduli bench` on one tiny layer and one tiny model: records, tables, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moduli.bench.machine import Machine
from moduli.bench.models import ModelRow, default_case, measure_model
from moduli.bench.records import read_record
from moduli.cli import main
from moduli.errors import ConfigError
from tests import tiny

TINY = ("--tokens", "16", "--hidden", "16", "--experts", "4", "--top-k", "2", "--rounds", "1")
MACHINE = Machine(
    *("made up", "none", "cpu", 1, 1, "test", {}, "passive", "untouched", "as torch has it"),
    *("defaults", 0.0, {"float32": 100.0, "bfloat16": 200.0}, 20.0, 25.0),
)


def test_one_layer_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["bench", *TINY, "--settings", "tuned", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    record = read_record(tmp_path / "layers.json")
    assert printed == record.to_dict()
    assert record.command == f"moduli bench {' '.join(TINY)} --settings tuned"
    (row,) = record.layers
    assert (row.case.tokens, row.case.hidden, row.settings) == (16, 16, "tuned")
    assert row.choice is not None
    assert (tmp_path / "layers.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_shapes_that_cannot_be_are_refused_before_anything_runs(
    fails: Callable[..., str],
) -> None:
    assert "do not divide" in fails(2, "bench", "--hidden", "16", "--experts", "7")
    assert "either a set or a model" in fails(2, "bench", "--quick", "--model", "minilm")


@pytest.mark.parametrize(("task", "build"), [("tune", tiny.bert), ("generate", tiny.llama)])
def test_a_model_against_itself_converted(task: Any, build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    sizes = {"batch": 2, "length": 8, "new_tokens": 3}
    case = default_case(str(tmp_path), task, experts=4, top_k=2, **sizes)
    row = measure_model(case, MACHINE, settings="defaults", rounds=1)
    assert [e.name for e in row.entries] == ["dense", "emoe"]
    assert row.text == "random tokens"
    for entry in row.entries:
        assert entry.ms is not None
        assert entry.error is not None
        assert entry.error < 1e-5
    dense, emoe = (row.per_second(name) for name in ("dense", "emoe"))
    assert dense is not None
    assert emoe is not None
    assert row.speedup == pytest.approx(emoe / dense)
    assert row.case.tokens == (16 if task == "tune" else 6)
    assert ModelRow.from_dict(row.to_dict()) == row


def test_a_converted_model_that_is_wrong_gets_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moduli.bench.models as models

    def spoil(model: Any, method: Any) -> None:
        spoiled(model, method)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)

    spoiled = models.convert
    monkeypatch.setattr(models, "convert", spoil)
    tiny.llama().save_pretrained(tmp_path)
    case = default_case(str(tmp_path), "generate", experts=4, top_k=2, length=8, new_tokens=2)
    row = measure_model(case, MACHINE, settings="defaults", rounds=1)
    assert row.per_second("dense") is not None
    assert row.per_second("emoe") is None
    assert row.speedup is None
    assert "deviates" in (row.entries[1].note or "")


def test_more_tokens_than_a_model_takes_are_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    case = default_case(str(tmp_path), "generate", experts=4, top_k=2, new_tokens=10**6)
    with pytest.raises(ConfigError, match="do not fit"):
        measure_model(case, MACHINE, settings="defaults", rounds=1)
