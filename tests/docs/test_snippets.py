"""Whatever the README and the docs show, works: Python blocks run, commands and options exist."""

import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from moduli.cli import main
from moduli.methods.registry import method_names
from tests.docs.blocks import ROOT, Block, blocks, pages


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _scripts(page: Path) -> list[Block]:
    """Python blocks that stand on their own; those with a title are files, not scripts."""
    return [b for b in blocks(page) if b.language == "python" and b.run and b.title is None]


@pytest.mark.parametrize("page", [p for p in pages() if _scripts(p)], ids=_id)
def test_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in _scripts(page):
        # Blank lines in front, so that a traceback shows the line number in the page.
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(ROOT / block.page), "exec"), namespace)


def _commands() -> list[tuple[str, list[str]]]:
    """Every `moduli ...` line of a console block, continuation lines joined."""
    found = []
    for page in pages():
        for block in blocks(page):
            if block.language != "console":
                continue
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.startswith("$ moduli"):
                    found.append((f"{block.page}: {line}", shlex.split(line[2:], comments=True)))
    return found


@cache
def _help(*command: str) -> str:
    """What `moduli COMMAND --help` prints; fails where it does not exit with 0."""
    with redirect_stdout(StringIO()) as said:
        assert main([*command, "--help"]) == 0, shlex.join(command)
    return said.getvalue()


@pytest.mark.parametrize(("where", "words"), [pytest.param(w, c, id=w) for w, c in _commands()])
def test_commands_and_their_options_exist(where: str, words: list[str]) -> None:
    names = [w for w in words[1:2] if not w.startswith("-")]
    text = _help(*names)
    # `moduli tune ... emoe --top-k 4`: what follows a method's name is an option of the method.
    for word in words[2:]:
        if word in method_names():
            text += _help(*names, word)
    for option in (w.split("=")[0] for w in words[1:] if w.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", text), f"{where}: {option} is not in --help"
