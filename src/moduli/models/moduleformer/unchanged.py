"""Proof that growing left every old tensor as it was, from the files that were written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moduli.models.moduleformer.naming import RENAMED
from moduli.surgery.files import weight_files

Fingerprints = dict[str, tuple[int, str]]
"""By name, how many rows a tensor has and the SHA-256 of its bytes."""


def fingerprints(model: Any) -> Fingerprints:
    """Of every tensor of a model."""
    return {name: (len(t), _digest(t)) for name, t in model.state_dict().items()}


def changed_tensors(before: Fingerprints, directory: Path) -> list[str]:
    """Names of tensors that do not begin with what they were, or are not in the files at all.

    Args:
        before: of the model before it grew.
        directory: with safetensors, in the published names. Of tied tensors one is enough.
    """
    found: dict[str, bool] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a mapping
                name = stored
                for theirs, ours in RENAMED.items():
                    name = re.sub(theirs, ours, name)
                if name in before:
                    rows, digest = before[name]
                    found[name] = _digest(file.get_tensor(stored)[:rows]) == digest
    intact = {before[name] for name, same in found.items() if same}
    return sorted(name for name, mark in before.items() if not found.get(name, mark in intact))


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()
