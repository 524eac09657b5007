"""The state of an optimiser in a file: what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moduli.errors import CheckpointError, ModelError
from moduli.parallel import load_optimizer, save_optimizer


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def grouped(model: nn.Sequential) -> torch.optim.AdamW:
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": model[1].parameters(), "lr": 1e-3, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.9))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_a_loop_goes_on_as_it_would_have(tmp_path: Path) -> None:
    model = two_layers()
    optimizer, other = grouped(model), two_layers()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(3):
        step(model, optimizer, seed)
        schedule.step()
    save_optimizer(model, optimizer, tmp_path / "state.safetensors")
    other.load_state_dict(model.state_dict())
    again = torch.optim.AdamW(
        [{"params": part.parameters()} for part in other]  # settings come from the file
    )
    load_optimizer(other, again, tmp_path / "state.safetensors")
    step(model, optimizer, 7)
    step(other, again, 7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_parameters_without_a_state_have_none_afterwards(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[1].requires_grad_(False)
    step(model, optimizer, 0)
    save_optimizer(model, optimizer, tmp_path / "state.safetensors")
    again = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    load_optimizer(model, again, tmp_path / "state.safetensors")
    assert set(again.state) == set(model[0].parameters())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = two_layers()
    optimizer, path = grouped(model), tmp_path / "state.safetensors"
    with pytest.raises(ModelError, match="not of this Sequential"):
        save_optimizer(two_layers(), optimizer, path)
    save_optimizer(model, optimizer, path)
    single = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="grouped or ordered otherwise"):
        load_optimizer(model, single, path)
    part = torch.optim.AdamW(model[0].parameters())
    with pytest.raises(CheckpointError, match=r"1\.bias is only in one of them"):
        load_optimizer(model, part, path)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="not written by"):
        load_optimizer(model, optimizer, tmp_path / "weights.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="damaged"):
        load_optimizer(model, optimizer, path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="among the weights"):
        save_optimizer(model, optimizer, path)
