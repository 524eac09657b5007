"""Fenced code blocks of a Markdown page, with what is written about them on the lines around."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(?P<language>\w+)(?P<attributes>.*)\n(?P<code>(?:.*\n)*?)```$", re.M)
_TITLE = re.compile(r'title="([^"]+)"')
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the page it stands on, relative to the repository.
        line: number of its first line of code.
        language: the word after the fence.
        title: the file it is the content of, if its fence names one.
        code: its text.
        run: False under a line `<!-- not run: reason -->`.
    """

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    run: bool


def pages() -> list[Path]:
    """Every page a user reads."""
    top = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of `page`, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match["attributes"])
        found.append(
            Block(
                page=page.relative_to(ROOT),
                line=text.count("\n", 0, match.start("code")) + 1,
                language=match["language"],
                title=title and title[1],
                code=match["code"],
                run=not _NOT_RUN.search(text[: match.start()]),
            )
        )
    return found
