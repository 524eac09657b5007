"""The commands of "In sequence" run one after the other as they stand, but on little data."""

import shlex
from pathlib import Path

import pytest

from moduli.cli import main
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "guide" / "moduleformer.md"
FEW = ["--max-train", "3", "--max-test", "2", "--max-validation", "1"]
SMALL = {
    "pretrain": [*FEW, "--max-steps", "3", "--vocab-size", "300", "--max-length", "32"],
    "generate": ["--max-new-tokens", "3"],
    "extend": [*FEW, "--max-steps", "2"],
    "prune": FEW,
    "inspect": [*FEW, "--max-rows", "2"],
}


def commands() -> list[list[str]]:
    """Words of every command of the section."""
    section = PAGE.read_text(encoding="utf-8").partition("## In sequence")[2].partition("\n## ")[0]
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ moduli ")]


@pytest.mark.slow
@pytest.mark.network
def test_the_sequence_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert [words[0] for words in found] == list(SMALL)
    for words in found:
        assert main([*words, *SMALL[words[0]]]) == 0, capsys.readouterr().err
    assert "old tensors are in it bit for bit" in " ".join(capsys.readouterr().out.split())
