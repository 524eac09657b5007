"""The state of an optimiser on any number of ranks, in one safetensors file.

A model that is spread over ranks is saved whole by `save_pretrained`; this does the same for what
its optimiser remembers, so that a loop goes on where it stopped, on as many ranks as it likes. What
has the shape of its parameter is spread as the parameter is.
"""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from moduli.errors import CheckpointError, ModelError
from moduli.surgery.files import check_readable
from moduli.surgery.processes import gathered, is_shared, is_writer, reshard, unwrapped, write_once
from moduli.surgery.projection import placed_like

_RECORD = "moduli_optimizer"


def save_optimizer(model: nn.Module, optimizer: Optimizer, path: str | os.PathLike[str]) -> None:
    """Write the state of an optimiser; call it on every rank.

    Args:
        model: whose parameters it trains, spread over ranks or not.
        optimizer: of any kind, also what Accelerate has made of it.
        path: of the file; beside the directory of the model, not in it.

    Raises:
        CheckpointError: the file would lie among the weights of a checkpoint, or writing failed.
        ModelError: the optimiser has parameters that are not the model's.
    """
    path, together = Path(path), is_shared(model)
    if (path.parent / "config.json").exists():
        raise CheckpointError(
            f"{path} would lie among the weights of a checkpoint; write it beside {path.parent}"
        )
    names = _names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, parameter in zip(chain(*names), _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else others)[f"{name}/{key}"] = value
    groups = [
        {**group, "params": named}
        for group, named in zip(optimizer.param_groups, names, strict=True)
    ]
    record = json.dumps({"groups": groups, "others": others}, default=float)  # a tensor as lr
    whole = gathered(tensors, keep=is_writer(together))

    def write() -> None:
        unfinished = path.with_name(f".{path.name}.unfinished")
        save_file(whole, unfinished, metadata={_RECORD: record})
        unfinished.replace(path)

    write_once(write, together)


def load_optimizer(model: nn.Module, optimizer: Optimizer, path: str | os.PathLike[str]) -> None:
    """Bring back the state that `save_optimizer` wrote; call it on every rank.

    Args:
        model: with the parameters of the one that was saved, on any number of ranks.
        optimizer: a new one of the same kind, with the same groups of parameters.
        path: of the file.

    Raises:
        CheckpointError: no such file, a damaged one, or one of other parameters.
        ModelError: the optimiser has parameters that are not the model's.
    """
    path = Path(path)
    check_readable(path)
    names = _names(model, optimizer)
    with safe_open(path, framework="pt") as file:
        record = (file.metadata() or {}).get(_RECORD)
        if record is None:
            raise CheckpointError(f"{path} was not written by moduli.parallel.save_optimizer")
        found = json.loads(record)
        _require_same(path, names, [group["params"] for group in found["groups"]])
        values = {key: file.get_tensor(key) for key in file.keys()} | found["others"]  # noqa: SIM118
    index = {name: number for number, name in enumerate(chain(*names))}
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {number: {} for number in index.values()}
    for place, value in values.items():
        name, _, key = place.rpartition("/")
        parameter = parameters[index[name]]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = placed_like(value.to(parameter.device), parameter)
        state[index[name]][key] = value
    groups = [
        {**group, "params": [index[name] for name in group["params"]]} for group in found["groups"]
    ]
    kept = {number: one for number, one in state.items() if one}
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters of every group of an optimiser."""
    bare: nn.Module = unwrapped(model)
    reshard(bare)
    known = {id(parameter): name for name, parameter in bare.named_parameters()}
    if not all(id(parameter) in known for parameter in _parameters(optimizer)):
        raise ModelError(
            f"the optimiser has parameters that are not of this {type(bare).__name__}; make it "
            "from model.parameters() after the model was spread over ranks"
        )
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _require_same(path: Path, names: list[list[str]], saved: list[list[str]]) -> None:
    if names == saved:
        return
    odd = sorted({*chain(*names)} ^ {*chain(*saved)})
    what = f"{odd[0]} is only in one of them" if odd else "they are grouped or ordered otherwise"
    raise CheckpointError(f"{path} is the state of other parameters than the optimiser's: {what}")
