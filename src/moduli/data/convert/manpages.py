"""Manual pages in several languages as a table of plain text, set by groff."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path
from typing import Any

from moduli.data.convert.tables import write_table
from moduli.errors import FetchError

# UTF-8 in; tables; any of the manual's macro packages; out as text without overstriking or
# colours; lines as long as their paragraph, not hyphenated and not justified
_GROFF = ["groff", "-Kutf8", "-t", "-mandoc", "-Tutf8", "-P-c", "-P-b", "-P-o", "-P-u"]
_GROFF += ["-rLL=2000n", "-rHY=0", "-dAD=l"]

_RULES = re.compile("[─━═┌┐└┘├┤┬┴┼]{3,}")  # lines of tables, as long as the page is wide
_GAPS = re.compile(r"(?<=\S) {3,}(?=\S)")  # between columns, or after an item's label


def manpages_to_table(source: Path, out: Path) -> None:
    """Write manual pages to `manpages.parquet`, a row for every page.

    Columns: `text` (as `man` shows it on a page so wide that a paragraph is one line, without the
    page's header and footer), `language` ("de", ...), `page` ("cat") and `section` ("1"). Rows are
    in order of language, page and section. Pages that are only other names of a page (links) are
    not repeated. A later groff may set details differently.

    Args:
        source: a directory per language with its pages, `NAME.SECTION.gz`, and with the
            package's `copyright` in `LANGUAGE.copyright`, which is copied.
        out: an existing directory.

    Raises:
        FetchError: groff fails on a page.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("text", "language", "page", "section")}
    for directory in sorted(path for path in source.iterdir() if path.is_dir()):
        for path in sorted(directory.iterdir()):
            page, _, section = path.name.removesuffix(".gz").rpartition(".")
            values = (plain_text(gzip.decompress(path.read_bytes())), directory.name, page, section)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    write_table(out / "manpages.parquet", columns)
    for path in source.glob("*.copyright"):
        (out / path.name).write_bytes(path.read_bytes())


def plain_text(page: bytes) -> str:
    """A manual page's source as plain text without its header and footer.

    Raises:
        FetchError: groff fails.
    """
    done = subprocess.run(_GROFF, input=page, capture_output=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"groff failed: {done.stderr.decode(errors='replace').strip()}")
    lines = [
        _GAPS.sub("  ", _RULES.sub("", line)).rstrip() for line in done.stdout.decode().splitlines()
    ]
    filled = [number for number, line in enumerate(lines) if line]
    if len(filled) < 3:
        raise FetchError("groff makes nothing but a header and a footer of a page.")
    # the first line is the header of the page and the last its footer
    body = lines[filled[0] + 1 : filled[-1]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(body)).strip("\n") + "\n"
