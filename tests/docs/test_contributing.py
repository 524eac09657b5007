"""CONTRIBUTING adds a method in four steps; here somebody follows them, word for word.

The files in it are written to where their titles say, under a temporary folder that stands for a
checkout, or for a package of its own, and used by a new process.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks

FILES = {b.title: b.code for b in blocks(ROOT / "CONTRIBUTING.md") if b.title}
METHODS = "src/moduli/methods/"
# What a checkout with the new folder in it would have: one more place to look for methods.
IN_CHECKOUT = """
import moduli.methods
moduli.methods.__path__.append({methods!r})
"""


def run(code: list[str], path: Path) -> str:
    """Run Python in a new process with `path` importable; its output, or a failure."""
    done = subprocess.run(
        [sys.executable, *code],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for title, code in FILES.items():
        file = tmp_path / title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    added = IN_CHECKOUT.format(methods=str(tmp_path / METHODS))
    (tmp_path / "conftest.py").write_text(added)
    (tmp_path / "in_checkout.py").write_text(added)
    return tmp_path


def test_the_tests_of_the_new_method_pass(checkout: Path) -> None:
    assert " passed" in run(["-m", "pytest", "-q", "--no-header", "tests"], checkout)


def test_a_new_folder_is_found_by_name_and_by_class(checkout: Path) -> None:
    out = run(
        [
            "-c",
            "import in_checkout, moduli; from moduli.methods.registry import *; "
            "print(method_names(), get_method('norm-split') is moduli.NormSplit)",
        ],
        checkout,
    )
    assert "'norm-split'" in out
    assert "True" in out


def test_the_command_line_picks_it_up(checkout: Path) -> None:
    main = "import sys, in_checkout; from moduli.cli import main; sys.argv[0] = 'moduli'; main()"
    assert "norm-split" in run(["-c", main, "methods"], checkout)
    assert "--top-k" in run(["-c", main, "tune", "norm-split", "--help"], checkout)


def test_a_package_of_its_own_is_found_by_its_entry_point(tmp_path: Path) -> None:
    package = tmp_path / "norm_split"
    package.mkdir()
    for title, code in FILES.items():
        if title.startswith(METHODS):
            (package / Path(title).name).write_text(
                code.replace("moduli.methods.norm_split", "norm_split")
            )
    (group,) = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"].items()
    info = tmp_path / "norm_split-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-split\nVersion: 1.0\n")
    lines = [f"[{group[0]}]", *(f"{name} = {value}" for name, value in group[1].items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    out = run(
        [
            "-c",
            "import moduli; from moduli.methods.registry import *; "
            "print(method_names(), get_method('norm-split') is moduli.NormSplit)",
        ],
        tmp_path,
    )
    assert "'norm-split'" in out
    assert "True" in out


def test_the_example_is_written_as_the_guide_asks(checkout: Path) -> None:
    settings = ["--config", str(ROOT / "pyproject.toml")]
    # The checkout of this test lacks the rest of moduli, from which ruff would know the name.
    settings += ["--config", "lint.isort.known-first-party=['moduli']"]
    for command in (["check"], ["format", "--check"]):
        run(["-m", "ruff", *command, *settings, "src", "tests"], checkout)
