"""Stopping: Ctrl-C in a real process, a loss that is no longer finite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import FAST


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moduli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_leaves_nothing_half_written_and_the_same_command_goes_on(
    task_options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    arguments = ["tune", "--model", "minilm", "--out", str(out), "--json", *task_options]
    arguments += [*FAST, "--max-steps", "24", "--checkpoint-every", "2", "dense"]
    process = start(arguments)
    checkpoints = tmp_path / ".model.partial" / "checkpoints"
    wait_for(checkpoints / "checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert printed == ""
    assert not out.exists()
    (line,) = [line for line in errors.splitlines() if line.startswith("moduli: ")]
    assert "interrupted; saved" in line
    assert "same command goes on" in line
    (saved,) = checkpoints.glob("checkpoint-*")
    assert str(saved) in line

    process = start(arguments)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(printed)["steps"] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ctrl_c_before_training_is_130_too(task_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = start(["tune", "--model", "minilm", "--out", str(out), *task_options, *FAST, "dense"])
    wait_for(tmp_path / ".model.partial", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_a_diverging_run_stops_with_status_7_and_says_where(
    task_options: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "model"
    settings = [*FAST, "--learning-rate", "1e30", "--warmup", "0.0", "dense"]
    line = fails(7, "tune", "--model", "minilm", "--out", str(out), *task_options, *settings)
    assert "step 2 of 4" in line
    assert "learning rate" in line
    kept = tmp_path / ".model.partial" / "checkpoints" / "last-good"
    assert str(kept) in line
    assert (kept / "model.safetensors").is_file()
    assert not out.exists()


def test_the_reader_of_the_output_may_go_away() -> None:
    command = f"{sys.executable} -m moduli methods emoe | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
