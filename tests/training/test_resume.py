"""A stock Trainer resumes a modular model into its own neuron order and into no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import moduli
from moduli.errors import CheckpointError
from moduli.training.resume import guard_trainer_resume
from tests import tiny

ROWS = tiny.rows("bert", 8)


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is on for the test and gone after it."""
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", Trainer._load_from_checkpoint)
    guard_trainer_resume()


def model(seed: int | None) -> Any:
    built = tiny.build("bert")
    if seed is not None:
        moduli.convert(built, moduli.EMoE(num_experts=4, top_k=2, split="random", seed=seed))
    return built


def train(model: Any, out: Path, steps: int, resume: Path | None = None) -> Any:
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(model(0), out, 2)
    return out / "checkpoint-2"


def test_the_same_order_is_resumed(checkpoint: Path, tmp_path: Path) -> None:
    resumed = train(model(0), tmp_path, 4, checkpoint)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("seed", [1, None], ids=["another permutation", "a dense model"])
def test_another_order_is_refused_before_a_weight_changes(
    seed: int | None, checkpoint: Path, tmp_path: Path
) -> None:
    other = model(seed)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another order"):
        train(other, tmp_path, 4, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_dense_models_resume_as_ever(tmp_path: Path) -> None:
    train(model(None), tmp_path, 2)
    assert train(model(None), tmp_path, 4, tmp_path / "checkpoint-2").state.global_step == 4


def test_the_guard_is_put_in_once_and_not_at_import() -> None:
    once = Trainer._load_from_checkpoint
    guard_trainer_resume()
    assert Trainer._load_from_checkpoint is once
    code = (
        "import moduli.training.resume, transformers; "
        "assert not hasattr(transformers.Trainer._load_from_checkpoint, '_moduli_guards_resume')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
