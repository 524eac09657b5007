"""The layout: what a checkpoint must say so that its neurons can be read as experts.

It travels in `config.moduli`, so that bare `save_pretrained`, Trainer checkpoints and resumes
carry it. Labels are in the neurons' original order; the order of neurons in a converted model is
their stable sort. Letters: F neurons, E experts.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moduli.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerLayout:
    """One converted FFN: its block's name and the expert of every neuron, in original order.

    `moved` is False where the neurons stayed in that order, since their weights cannot be moved.
    """

    name: str
    labels: Int[Tensor, " F"]
    moved: bool = True

    @property
    def order(self) -> Int[Tensor, " F"]:
        """Original index of the neuron at every position of the converted FFN."""
        return self.labels.argsort(stable=True)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Neurons per expert."""
        return tuple(torch.bincount(self.labels).tolist())


@dataclass(frozen=True, eq=False)
class OwnedLayout:
    """One FFN whose experts are copies: its block's name, and the neurons of every expert.

    `residual` are the neurons that always take part; None for none.
    """

    name: str
    members: tuple[Int[Tensor, " _"], ...]
    residual: Int[Tensor, " _"] | None = None


@dataclass(frozen=True, eq=False)
class CopiesLayout:
    """One FFN that has several copies of every projection: its block's name, and how many."""

    name: str
    copies: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Method, its settings at conversion, the converted layers, and k if it was changed since."""

    method: str
    config: Mapping[str, Any]
    layers: Sequence[LayerLayout | OwnedLayout | CopiesLayout]
    top_k: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; labels are packed (little-endian int32, zlib, base64)."""
        return {
            "format": FORMAT,
            "method": self.method,
            "config": dict(self.config),
            "top_k": self.top_k,
            "layers": [_entry(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: another format, or damaged labels.
        """
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"the layout has format {data.get('format')!r}; this version of moduli reads "
                f"format {FORMAT}"
            )
        try:
            layers = [_layer(entry) for entry in data["layers"]]
            return cls(data["method"], data["config"], layers, data.get("top_k"))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise CheckpointError(f"the layout in the config is damaged: {error!r}") from error


def _entry(layer: LayerLayout | OwnedLayout | CopiesLayout) -> dict[str, Any]:
    if isinstance(layer, CopiesLayout):
        return {"name": layer.name, "copies": layer.copies}
    if isinstance(layer, LayerLayout):
        return {
            "name": layer.name,
            "neurons": layer.labels.numel(),
            "labels": _pack(layer.labels),
            "moved": layer.moved,
        }
    groups = [*layer.members, *([] if layer.residual is None else [layer.residual])]
    return {
        "name": layer.name,
        "sizes": [m.numel() for m in layer.members],
        "residual": None if layer.residual is None else layer.residual.numel(),
        "members": _pack(torch.cat(groups)),
    }


def _layer(entry: Mapping[str, Any]) -> LayerLayout | OwnedLayout | CopiesLayout:
    if "copies" in entry:
        return CopiesLayout(entry["name"], int(entry["copies"]))
    if "labels" in entry:
        labels = _unpack(entry["labels"], entry["neurons"])
        return LayerLayout(entry["name"], labels, entry.get("moved", True))
    sizes = [*entry["sizes"], *([] if entry["residual"] is None else [entry["residual"]])]
    groups = list(_unpack(entry["members"], sum(sizes)).split(sizes))
    residual = None if entry["residual"] is None else groups.pop()
    return OwnedLayout(entry["name"], tuple(groups), residual)


def _pack(labels: Tensor) -> str:
    raw = labels.to(torch.int32).numpy().astype("<i4").tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def _unpack(text: str, count: int) -> Tensor:
    raw = zlib.decompress(base64.b64decode(text, validate=True))
    labels = np.frombuffer(raw, dtype="<i4").astype(np.int64)
    if labels.shape != (count,) or labels.min() < 0:
        raise ValueError(f"{labels.size} labels for {count} neurons")
    return torch.from_numpy(labels)
