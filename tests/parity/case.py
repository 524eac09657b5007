"""A stored case, and the record of comparing ours with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """`case.json` with its tensors.

    Attributes:
        folder: where it lies.
        data: the JSON.
        tensors: of its safetensors file, if it has one.
    """

    folder: Path
    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Case:
        from safetensors.torch import load_file

        data = json.loads(path.read_text(encoding="utf-8"))
        file = data.get("file")
        return cls(path.parent, data, load_file(path.parent / file) if file else {})

    @property
    def system(self) -> str:
        return str(self.data["system"])

    @property
    def kind(self) -> str:
        return str(self.data["kind"])

    @property
    def title(self) -> str:
        return f"{self.system}/{self.data['case']}"

    @property
    def config(self) -> Mapping[str, Any]:
        return self.data.get("config", {})

    @property
    def atol(self) -> float:
        return float(self.data.get("tolerance", {}).get("atol", 1e-5))

    @property
    def rtol(self) -> float:
        return float(self.data.get("tolerance", {}).get("rtol", 1e-5))

    def given(self, name: str) -> Tensor:
        """An input tensor."""
        return self.tensors[self.data["inputs"][name]["tensor"]]

    def has_input(self, name: str) -> bool:
        return name in self.data.get("inputs", {})

    def expected(self, name: str) -> Any:
        """An expected output: a tensor, or a number that stands in the JSON."""
        entry = self.data["expected"][name]
        return self.tensors[entry["tensor"]] if isinstance(entry, Mapping) else entry

    def expects(self, name: str) -> bool:
        return name in self.data.get("expected", {})


@dataclass
class Check:
    """Collects comparisons of one case.

    Attributes:
        case: what is compared with.
        largest: largest absolute error of any float comparison.
        problems: one line per comparison that failed.
        seen: expected outputs that were compared.
    """

    case: Case
    largest: float = 0.0
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def close(self, name: str, got: Tensor | float, label: str | None = None) -> None:
        """Compare with expected output `name` to the case's tolerance."""
        if not self.case.expects(name):
            return
        want = torch.as_tensor(self.case.expected(name), dtype=torch.float64)
        have = torch.as_tensor(got).detach().double()
        self.seen.add(name)
        label = label or name
        if have.shape != want.shape:
            self.problems.append(f"{label}: shape {tuple(have.shape)}, not {tuple(want.shape)}")
            return
        error = (have - want).abs()
        self.largest = max([self.largest, *error.flatten().tolist()])
        if not bool((error <= self.case.atol + self.case.rtol * want.abs()).all()):
            self.problems.append(f"{label}: off by {float(error.max()):.3g}")

    def same(self, name: str, got: Any, label: str | None = None) -> None:
        """Compare with expected output `name` exactly."""
        if not self.case.expects(name):
            return
        want, have = torch.as_tensor(self.case.expected(name)), torch.as_tensor(got)
        self.seen.add(name)
        label = label or name
        if have.shape != want.shape:
            self.problems.append(f"{label}: shape {tuple(have.shape)}, not {tuple(want.shape)}")
        elif not torch.equal(have.to(want.dtype), want):
            count = int((have.to(want.dtype) != want).sum())
            self.problems.append(f"{label}: {count} of {want.numel()} values differ")

    def true(self, fact: bool, problem: str) -> None:
        """Note `problem` unless `fact`."""
        if not fact:
            self.problems.append(problem)

    def finish(self) -> None:
        """Note expected outputs that nobody compared: an adapter may not pass by looking away."""
        left = sorted(set(self.case.data.get("expected", {})) - self.seen)
        if left:
            self.problems.append(f"not compared: {', '.join(left)}")
