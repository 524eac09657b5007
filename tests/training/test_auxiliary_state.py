"""What routed layers keep between passes gets in nobody's way: copies, threads, resumed runs."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import moduli
from moduli.errors import ModelError
from moduli.surgery.modular import routed_layers
from tests import tiny
from tests.training.ddp_worker import InOrder, arguments

SETTINGS: dict[str, Any] = {"num_experts": 6, "top_k": 2, "layers": "all"}
WAYS: dict[str, dict[str, Any]] = {
    "aux": {"gate": "cosine", "aux": "switch"},
    "paper": {"preset": "paper", "aux_weight": 0.3},
    "normalized": {"normalize_gate": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_after_training_are_independent(way: str) -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.EMoE(**SETTINGS, **WAYS[way]))
    inputs = tiny.batch(tiny.rows("bert"))
    model.train()(**inputs).loss.backward()  # leaves tensors with a graph in the layers
    twin = copy.deepcopy(model)
    assert pickle.loads(pickle.dumps(model.bert.encoder.layer[0])) is not None
    expected = model.eval()(**inputs).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.eval()(**inputs).logits, expected)
    assert all(
        twin.get_submodule(name) is layer.ffn.block for name, layer in routed_layers(twin).items()
    )


def test_threads_of_data_parallel_are_refused() -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.EMoE(**SETTINGS))
    replica = model._replicate_for_data_parallel()  # as nn.DataParallel makes them
    with pytest.raises(ModelError, match="torchrun"):
        replica(**tiny.batch(tiny.rows("bert")))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.7])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    momentum: float | None, tmp_path: Path
) -> None:
    rows = tiny.rows("bert", 12)

    def trained(folder: Path, steps: int, resume: str | None = None) -> Any:
        model = tiny.build("bert")
        settings = {**SETTINGS, "aux": "switch", "gate_momentum": momentum}
        moduli.convert(model, moduli.EMoE(**settings))
        changes = {"max_steps": steps, "learning_rate": 0.1, "save_strategy": "steps"}
        trainer = InOrder(
            model=model,
            args=arguments(folder, save_steps=3, **changes),
            train_dataset=rows,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained(tmp_path / "whole", 6).state_dict()
    resumed = trained(tmp_path / "whole", 6, str(tmp_path / "whole" / "checkpoint-3")).state_dict()
    start = tiny.build("bert")
    moduli.convert(start, moduli.EMoE(**SETTINGS, aux="switch", gate_momentum=momentum))
    moved = [n for n, t in start.state_dict().items() if not torch.equal(whole[n], t)]
    assert any("intermediate.dense.weight" in name for name in moved)
    assert any(name.endswith("router.gate") for name in moved) == (momentum is not None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_forwards_before_one_backward() -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.EMoE(**SETTINGS, aux="switch", gate_momentum=0.5))
    inputs = tiny.batch(tiny.rows("bert"))
    model.train()
    (model(**inputs).loss + model(**inputs).loss).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
