"""What is to be done on an import is done once the module is there, whatever is imported first."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from moduli import on_import as hook
from moduli.on_import import on_import

NAME = "a_module_to_wait_for"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the source of the module, which nobody has imported yet."""
    monkeypatch.syspath_prepend(tmp_path)
    # Without our own finder, which other tests and the import of moduli left there.
    others = [f for f in sys.meta_path if not isinstance(f, hook._ThenOnImport)]
    monkeypatch.setattr(sys, "meta_path", others)

    def write(source: str) -> None:
        (tmp_path / f"{NAME}.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, NAME, raising=False)

    return write


def test_it_is_done_after_the_import_and_leaves_no_trace(write: Callable[[str], None]) -> None:
    write("there = []\n")
    done: list[str] = []

    def first(module: ModuleType) -> None:
        done.append(f"first {module.there}")

    def second(module: ModuleType) -> None:
        done.append("second")

    for then in (first, first, second):
        on_import(NAME, then)
    assert done == []
    module = importlib.import_module(NAME)
    assert done == ["first []", "second"]
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__) is type(importlib.__loader__)  # that of an ordinary file
    assert inspect.getsource(module) == "there = []\n"
    on_import(NAME, second)  # there already
    assert done == ["first []", "second", "second"]


def test_it_is_done_again_when_the_module_is_imported_anew(write: Callable[[str], None]) -> None:
    seen: list[ModuleType] = []
    write("")
    on_import(NAME, seen.append)
    one = importlib.import_module(NAME)
    write("")
    two = importlib.import_module(NAME)
    assert seen == [one, two]


def test_a_module_that_is_being_imported_is_waited_for(write: Callable[[str], None]) -> None:
    """As if moduli were imported in the middle of an import of transformers."""
    write(
        f"from moduli.on_import import on_import\n"
        f"done = []\n"
        f"on_import({NAME!r}, lambda module: module.done.append(module.late))\n"
        f"assert not done\n"
        f"late = 1\n"
    )
    on_import(NAME, lambda module: None)  # so that the finder is there when it starts
    assert importlib.import_module(NAME).done == [1]


def test_two_copies_of_the_finder_do_not_meet(write: Callable[[str], None]) -> None:
    write("")
    seen: list[ModuleType] = []
    on_import(NAME, seen.append)
    other = hook._ThenOnImport()
    other.waiting[NAME] = [seen.append]
    sys.meta_path.insert(0, other)
    module = importlib.import_module(NAME)
    assert seen == [module, module]


def test_errors_are_those_of_the_import(write: Callable[[str], None]) -> None:
    seen: list[ModuleType] = []
    write("1 / 0")
    on_import(NAME, seen.append)
    on_import(f"{NAME}_of_nobody", seen.append)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(NAME)
    with pytest.raises(ModuleNotFoundError, match="of_nobody"):
        importlib.import_module(f"{NAME}_of_nobody")
    assert seen == []
