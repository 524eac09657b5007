"""What is wrong on the disk is never taken for a run, and said with its path."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moduli.data.task import Task
from moduli.errors import CheckpointError
from moduli.study import run as module
from moduli.study.compare import collect, compare
from moduli.study.plan import Plan
from moduli.study.records import RECORD, read_record, read_records, write_json
from moduli.study.run import execute
from moduli.study.spec import RunSpec
from moduli.version import __version__
from tests.reliability.pretended import Pretended, made_record, pretended_plan
from tests.reliability.small_study import make_plan, make_task, shorter, write_model


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return pretended_plan(tmp_path / "model")


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "study"


class FullDisk:
    """From the write number `room` on, none succeeds until there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        for name in ("mkdir", "replace", "rename"):
            monkeypatch.setattr(os, name, self._limited(getattr(os, name), _always))
        monkeypatch.setattr(os, "open", self._limited(os.open, _creates))
        for where in (builtins, io):
            monkeypatch.setattr(where, "open", self._limited(io.open, _writes))
        # torch writes in C++, which says it in its own way (seen on a full file system).
        said = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        monkeypatch.setattr(torch, "save", self._limited(torch.save, _always, said))
        said = Exception("I/O error: No space left on device (os error 28)")
        from transformers import modeling_utils

        save = self._limited(modeling_utils.safe_save_file, _always, said)
        monkeypatch.setattr(modeling_utils, "safe_save_file", save)

    def _limited(
        self, function: Any, is_write: Callable[..., Any], said: Exception | None = None
    ) -> Any:
        def limited(*args: Any, **kwargs: Any) -> Any:
            if is_write(*args, **kwargs):
                self.room -= 1
                if self.room < 0:
                    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
                    raise said or full
            return function(*args, **kwargs)

        return limited


def _always(*_: object, **__: object) -> bool:
    return True


def _creates(_: object, flags: int = 0, *__: object, **___: object) -> bool:
    return bool(flags & os.O_CREAT)


def _writes(_: object, mode: str = "r", *__: object, **___: object) -> bool:
    return any(letter in mode for letter in "wax+")


def one_after_the_other(
    disk: FullDisk, spec: RunSpec, task: Task, root: Path
) -> list[tuple[CheckpointError, bool]]:
    """Errors of the run on a disk with room for 0, 1, 2 ... writes; whether it was there then."""
    found: list[tuple[CheckpointError, bool]] = []
    while True:
        target = root / str(len(found)) / spec.key
        disk.room = len(found)
        error = None
        try:
            execute(spec, task, target, checkpoint_every=1)
        except CheckpointError as caught:
            error = caught
        disk.room = float("inf")
        if error is None:
            return found
        found.append((error, target.exists()))
        again = execute(spec, task, target, checkpoint_every=1)
        assert read_record(target) == again
        assert os.listdir(target.parent) == [spec.key]


def test_a_full_disk_stops_the_study_and_leaves_nothing_half_written(
    plan: Plan, task: Task, root: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = plan.runs([task])[0].spec
    found = one_after_the_other(FullDisk(monkeypatch), spec, task, root)
    # Two directories and the lock, the partial directory, the spec, the result, its record, the
    # final name; a file is opened and then renamed.
    assert len(found) >= 8
    for i, (error, there) in enumerate(found):
        assert str(root / str(i) / spec.key) in str(error)
        assert "space left" in str(error)
        assert not there
    assert max(pretended.done.values()) <= 2 * len(found) + 1


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_in_a_real_run_changes_nothing(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a checkpoint, from or before which the run then goes on."""
    write_model(tmp_path / "model")
    plan = shorter(make_plan(tmp_path / "model", 1))
    spec = plan.runs([task])[0].spec
    spec = dataclasses.replace(spec, settings=dataclasses.replace(spec.settings, max_steps=2))
    wanted = execute(spec, task, tmp_path / "wanted").result()
    found = one_after_the_other(FullDisk(monkeypatch), spec, task, tmp_path / "study")
    assert len(found) > 15
    for i, (error, there) in enumerate(found):
        target = tmp_path / "study" / str(i) / spec.key
        assert str(target) in str(error)
        assert not there
        assert read_record(target).result() == wanted


def test_a_full_disk_is_no_failure_of_the_run(
    plan: Plan, task: Task, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done the next time without being asked to try again; a real failure is not."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/optimizer.pt")

    def wrong(*_: object) -> None:
        raise ValueError("loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_work", full)
        with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
            compare(plan, [task], root)
        assert collect(plan, [task], root).failures == ()
        patch.setattr(module, "_work", wrong)
        assert len(compare(plan, [task], root).failures) == 10
    Pretended(monkeypatch)
    assert len(compare(plan, [task], root).failures) == 10
    assert len(compare(plan, [task], root, retry_failed=True).records) == 10


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR])
def test_what_may_not_be_read_or_written_elsewhere_is_the_fault_of_the_run(
    plan: Plan, task: Task, root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study goes on; at the run's own paths the same error stops it."""

    def refused(path: str) -> Any:
        def work(spec: RunSpec, task: Task, partial: Path, *_: object) -> None:
            where = path.format(partial=partial)
            try:
                raise OSError(code, os.strerror(code), where)
            except OSError as error:
                raise CheckpointError(f"could not use {where}") from error

        return work

    with monkeypatch.context() as patch:
        patch.setattr(module, "_work", refused("{partial}/checkpoints/optimizer.pt"))
        with pytest.raises(CheckpointError, match=r"disk stopped the run .*optimizer\.pt"):
            compare(plan, [task], root)
    assert collect(plan, [task], root).failures == ()
    for elsewhere in ("/data/rows.csv", str(root / "rows.csv"), "{partial}.csv"):
        monkeypatch.setattr(module, "_work", refused(elsewhere))
        study = compare(plan, [task], root, retry_failed=True)
        assert [failure.error for failure in study.failures] == ["CheckpointError"] * 10


@pytest.mark.usefixtures("pretended")
def test_a_root_that_cannot_be_written_to_is_named(
    plan: Plan, task: Task, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match=str(root)):
        compare(plan, [task], root)
    assert collect(plan, [task], root).records == {}
    root.unlink()
    study = compare(plan, [task], root)

    def refuse(path: Any, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    assert compare(plan, [task], root).records == study.records  # there is nothing to write
    with pytest.raises(CheckpointError, match="Read-only file system"):
        compare(dataclasses.replace(plan, seeds=(0, 1)), [task], root)


@pytest.mark.parametrize("length", [0, 1, 200, -2])
@pytest.mark.usefixtures("pretended")
def test_a_record_cut_short_is_not_a_finished_run(
    plan: Plan, task: Task, root: Path, length: int
) -> None:
    key = compare(plan, [task], root).runs[3].spec.key
    path = root / key / RECORD
    path.write_text(path.read_text()[:length])
    for use in (compare, collect):
        with pytest.raises(CheckpointError, match=r"is damaged .* delete its directory") as caught:
            use(plan, [task], root)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"spec": 3}', "\ud800"])
def test_json_that_is_no_record_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_record(tmp_path)


def old_layout(spec: RunSpec, code: str) -> dict[str, Any]:
    """A record as it was when a run had one domain to train on."""
    data = made_record(spec).to_dict()
    data["spec"]["train_domain"] = data["spec"].pop("train_domains")[0]
    data["spec"]["code"] = code
    return data


@pytest.mark.usefixtures("pretended")
def test_a_record_of_another_version_says_so_and_disturbs_no_other_study(
    plan: Plan, task: Task, root: Path
) -> None:
    spec = plan.runs([task])[0].spec
    old = root / "0123456789ab"
    old.mkdir(parents=True)
    write_json(old / RECORD, old_layout(spec, "0.0.7"))
    (root / "notes").mkdir()
    (root / "notes" / "thesis.txt").write_text("mine")
    (root / ".ba9876543210.partial").mkdir()
    before = set(os.listdir(root))
    study = compare(plan, [task], root)
    assert len(study.records) == 10
    assert set(os.listdir(root)) == before | study.records.keys()
    with pytest.raises(CheckpointError) as caught:
        read_records(root)
    for part in (str(old), "moduli 0.0.7", f"moduli {__version__}", "train_domain", "delete"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("pretended")
def test_a_run_of_another_version_in_the_same_place_is_refused(
    plan: Plan, task: Task, root: Path
) -> None:
    spec = plan.runs([task])[0].spec
    execute(dataclasses.replace(spec, code="0.0.7"), task, root)
    with pytest.raises(CheckpointError, match=r"of moduli 0\.0\.7; this is"):
        execute(spec, task, root)


def test_a_damaged_note_of_a_failure_does_not_stop_the_run(
    plan: Plan, task: Task, root: Path, pretended: Pretended
) -> None:
    spec = plan.runs([task])[0].spec
    partial = root / f".{spec.key}.partial"
    partial.mkdir(parents=True)
    (partial / "failed.json").write_text(json.dumps({"error": "ValueError", "message": "x"})[:9])
    assert len(compare(plan, [task], root).records) == 10
    assert pretended.done[spec.key] == 1
    assert not partial.exists()
