"""Tables of options in the docs list every option there is, with its real default."""

import dataclasses
import re
from pathlib import Path

import pytest

from moduli import errors
from moduli.cli import COMMANDS
from moduli.data.task import DataOptions
from moduli.methods.registry import get_method, method_names
from tests.docs.blocks import ROOT

ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| `([^`]+)`", re.M)


def documented(page: Path) -> dict[str, str]:
    """Default as written, by option, from the table `| option | default | ... |` of a page."""
    _, _, rest = page.read_text(encoding="utf-8").partition("| option | default |")
    table = rest.partition("\n\n")[0]
    return {
        option: default
        for names, default in ROW.findall(table)
        for option in re.findall(r"`(\w+)`", names)
    }


def real(cls: type) -> dict[str, str]:
    return {f.name: repr(f.default).replace("'", '"') for f in dataclasses.fields(cls)}


def test_data_options() -> None:
    assert documented(ROOT / "docs/guide/data.md") == real(DataOptions)


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_page_with_its_options(name: str) -> None:
    if not dataclasses.fields(get_method(name)):
        pages = ROOT / "docs/methods/index.md"
        assert f"`{name}`" in pages.read_text(encoding="utf-8")
        return
    assert documented(ROOT / f"docs/methods/{name}.md") == real(get_method(name))


def test_every_error_stands_beside_its_exit_status() -> None:
    page = (ROOT / "docs/guide/command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]+\| (.*) \|$", page, re.M)
    written = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    classes = [c for c in vars(errors).values() if getattr(c, "exit_code", None) is not None]
    assert written == {c.__name__: c.exit_code for c in classes}


@pytest.mark.parametrize("page", ["README.md", "docs/guide/command-line.md"])
def test_tables_of_commands_are_complete(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `moduli (\w+)` \|", text, re.M)) == set(COMMANDS)
