"""The documentation site builds without a warning and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT

# Elements a browser fetches by itself; an ordinary link is not one of them.
FETCHED = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)"
)


def test_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert not FETCHED.findall(page.read_text(encoding="utf-8")), page
    for sheet in tmp_path.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8"), sheet
