"""Importing moduli is light, touches no network and changes nothing in other libraries."""

from __future__ import annotations

import subprocess
import sys


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_import_pulls_in_nothing_heavy() -> None:
    script = (
        "import sys, moduli; "
        "print([m for m in ('transformers', 'datasets', 'peft', 'sklearn', 'scipy', 'matplotlib', "
        "'rich', 'tyro') if m in sys.modules])"
    )
    assert run(script).strip() == "[]"


def test_converting_a_model_without_auxiliary_loss_leaves_the_trainer_alone() -> None:
    script = """
from transformers import Trainer
original = Trainer.training_step
import moduli
from moduli.surgery.convert import split_ffns
from transformers import BertConfig, BertForSequenceClassification
config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=16)
model = BertForSequenceClassification(config)
moduli.convert(model, moduli.EMoE(num_experts=4, top_k=2))
print(Trainer.training_step is original)
moduli.merge(model)
moduli.convert(model, moduli.EMoE(num_experts=4, top_k=2, gate="linear", aux="switch"))
print(Trainer.training_step is original)
"""
    assert run(script).split() == ["True", "False"]


def test_public_names() -> None:
    script = "import moduli; print(all(getattr(moduli, n) is not None for n in moduli.__all__))"
    assert run(script).strip() == "True"
