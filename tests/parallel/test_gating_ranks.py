"""Gating dropout on real gloo ranks: what they compute, what they send, how they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moduli
from moduli.parallel import GatingDropout, load_optimizer
from tests.parallel.gating_ranks import (
    CONFIGS,
    MODELS,
    build,
    copies,
    in_one_process,
    steps_of_copies,
    tokens,
)

ROOT = Path(__file__).parents[2]
# One exchange is: how many rows, the rows, the results; and the last two again backwards.
PER_LAYER, LAYERS = 5, 2


def _slow(group: str) -> Any:
    return pytest.param(group, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["2", _slow("2 --full"), _slow("4 --full")])
def group(request: pytest.FixtureRequest) -> list[str]:
    """How many ranks, and whether they do everything."""
    return str(request.param).split()


@pytest.fixture(scope="module")
def ranks(group: list[str]) -> int:
    return int(group[0])


@pytest.fixture(scope="module")
def folder(group: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all groups of ranks wrote."""
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.gating_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(path), *group],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def said(folder: Path, rank: int) -> Any:
    """What a rank returned; a failure shows its error."""
    failed = folder / f"{rank}.txt"
    assert not failed.exists(), failed.read_text()
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.fixture(scope="module")
def tensors(folder: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    for rank in range(ranks):
        said(folder / "saved", rank)
    return [load_file(folder / "saved" / f"{rank}.safetensors") for rank in range(ranks)]


@pytest.mark.parametrize("family", MODELS)
def test_real_ranks_compute_what_virtual_ones_do(
    family: str, tensors: list[dict[str, torch.Tensor]], ranks: int
) -> None:
    if f"{family}.exchange.logits" not in tensors[0]:
        pytest.skip("with --full")
    for name, (logits, gradients) in in_one_process(build(family), ranks).items():
        key = f"{family}.{name}"
        found = torch.cat([each[f"{key}.logits"] for each in tensors])
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-5, msg=key)
        for each in tensors:
            start = f"{key}.grad."
            seen = {n.removeprefix(start): g for n, g in each.items() if n.startswith(start)}
            assert seen.keys() == gradients.keys(), key
            largest = max(float(grad.abs().max()) for grad in gradients.values())
            for path, grad in gradients.items():
                # Data parallelism takes the mean over ranks, one process the sum over rows. A bias
                # of keys has only rounding errors for a gradient.
                near = 1e-5 * float(grad.abs().max()) + 1e-7 * largest
                difference = (seen[path] - grad / ranks).abs().max()
                assert float(difference) <= near, f"{key} {path}"


def test_copies_that_every_rank_holds_learn_as_on_virtual_ranks(folder: Path, ranks: int) -> None:
    expected = {
        f"{name}.{key}": grad
        for name, grads in steps_of_copies(copies(), tokens(), ranks).items()
        for key, grad in grads.items()
    }
    assert len({key.split(".")[0] for key in expected}) == 3
    for rank in range(ranks):
        assert "its copies are sharded" in said(folder / "copies", rank)["sharded"]
        found = load_file(folder / "copies" / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6, msg=key)


def test_a_run_resumes_with_its_optimiser(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        assert said(folder / "resumed", rank) == {"differ": []}
    model = moduli.load(folder / "resumed" / "half")  # in one process as well
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    load_optimizer(model, optimizer, folder / "resumed" / "half.safetensors")
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        sublayer = "mlp" in name or "post_attention" in name  # of which both steps had nothing
        assert (state is None) == sublayer, name
        if state is not None:
            assert state["step"] == 2
            assert state["exp_avg_sq"].shape == parameter.shape


def test_a_step_that_drops_sends_nothing(folder: Path, tensors: Any) -> None:
    counts = said(folder / "saved", 0)["exchanges"]
    for family in {key.split(".")[0] for key in counts}:
        assert counts.pop(f"{family}.exchange") == PER_LAYER * LAYERS
        assert counts.pop(f"{family}.eval") == 3 * LAYERS  # never dropped, whatever p is
        assert {counts.pop(f"{family}.{name}") for name in list(CONFIGS)[1:]} == {0}
    assert not counts


def test_ranks_agree_whatever_their_own_random_state(folder: Path, ranks: int) -> None:
    each = [said(folder / "agree", rank)["broadcast"] for rank in range(ranks)]
    expected = [GatingDropout(p=0.5).decisions(step, 1)[0] for step in range(12)]
    assert each == [expected] * ranks
    assert 0 < sum(expected) < 12


def test_ranks_that_disagree_are_named(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        found = said(folder / "agree", rank)
        assert "rank 1 is at step 101, and rank 0 at step 100" in found["step"]
        assert "rank 1 has other settings" in found["seed"]
        assert f"over {ranks} real ranks" in found["ranks"]


def test_empty_ranks_and_unused_experts(folder: Path, ranks: int) -> None:
    found = [said(folder / "agree", rank)["load"] for rank in range(ranks)]
    assert found[0]["exchange"] > 0
    assert found[-1]["exchange"] == found[-1]["paper"] == 0
    assert all(each["gate_expert_drop"] == 0 for each in found)


@pytest.mark.parametrize("where", ["forward", "backward", "late"])
def test_a_lost_rank_ends_the_others(where: str, folder: Path, ranks: int) -> None:
    if not (folder / where).exists():
        pytest.skip("with --full")
    for rank in range(ranks - 1):
        error = (folder / where / f"{rank}.txt").read_text()
        layer = 1 if where == "backward" else 0
        assert error.startswith(f"TrainingError: model.layers.{layer}.mlp.experts: rank {rank} ")
        assert f"no sign of rank {ranks - 1}." in error


def test_a_checkpoint_of_some_ranks_is_loaded_by_any_number(
    folder: Path, ranks: int, tensors: Any
) -> None:
    stock, ours = folder / "saved" / "saved-mixtral", folder / "saved" / "saved-llama"
    from transformers import MixtralForCausalLM

    others = sorted((folder / "continued").glob("*.safetensors"))
    assert len(others) in (0, 6 - ranks)  # 4 ranks after 2, and 2 after 4
    found = [load_file(path) for path in others]
    for name, model in (
        ("mixtral", MixtralForCausalLM.from_pretrained(stock)),
        ("llama", moduli.load(ours)),
    ):
        whole = build(name).eval()
        with torch.no_grad():
            expected, here = whole(input_ids=tokens()).logits, model(input_ids=tokens()).logits
        assert torch.equal(here, expected)
        if found:
            there = torch.cat([each[name] for each in found])
            torch.testing.assert_close(there, expected, rtol=1e-6, atol=1e-5)
