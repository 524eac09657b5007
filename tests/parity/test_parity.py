"""Every stored case passes, and the runner cannot be fooled."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.runner import find_cases, run_case, titles

DATA = Path(__file__).parent / "data"
CASES = find_cases([DATA])
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", CASES, ids=titles(CASES))
def test_case(path: Path) -> None:
    outcome = run_case(path)
    assert outcome.passed, str(outcome)


def copy_case(name: str, to: Path) -> Path:
    folder = to / "renamed"  # names of folders must not matter
    shutil.copytree(DATA / "emoe" / name, folder)
    return folder / "case.json"


@pytest.mark.parametrize("output", ["out.y", "out.kept", "out.grad_expert_b1"])
def test_a_changed_output_fails(tmp_path: Path, output: str) -> None:
    path = copy_case("mlp_bert_avgk_train_noise_grads", tmp_path)
    file = path.parent / "tensors.safetensors"
    tensors = load_file(file)
    flat = tensors[output].reshape(-1)
    flat[3] = ~flat[3] if flat.dtype == torch.bool else flat[3] + 1e-3
    save_file(tensors, file)
    outcome = run_case(path)
    assert not outcome.passed
    assert output.removeprefix("out.") in " ".join(outcome.problems)


def test_an_output_that_nobody_compares_fails(tmp_path: Path) -> None:
    path = copy_case("gate_update_plain", tmp_path)
    data = json.loads(path.read_text())
    data["expected"]["surprise"] = 3
    path.write_text(json.dumps(data))
    assert "surprise" in " ".join(run_case(path).problems)


def run_module(*folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.parity", *map(str, folders)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_command_line_counts_and_exits_by_the_outcome(tmp_path: Path) -> None:
    copy_case("gate_update_plain", tmp_path)
    good = run_module(tmp_path)
    assert good.returncode == 0
    assert good.stdout.splitlines()[0].startswith("emoe/gate_update_plain PASS")
    assert good.stdout.splitlines()[-1] == "1 passed, 0 failed"

    unknown = tmp_path / "second"
    shutil.copytree(DATA / "emoe" / "gate_update_plain", unknown)
    text = (unknown / "case.json").read_text().replace('"gate_update"', '"no_such_kind"')
    (unknown / "case.json").write_text(text)
    bad = run_module(tmp_path)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1] == "1 passed, 1 failed"
    assert "no_such_kind" in bad.stdout


def test_no_cases_is_not_success(tmp_path: Path) -> None:
    assert run_module(tmp_path).returncode == 1
