"""Weights at aligned addresses, in memory and in files, so that equal weights give equal bits.

Matrix kernels may sum in another order where a weight does not start at a multiple of a cache
line, and transformers maps weights straight from the file, wherever they lie in it. A model whose
weights came from one file and the same weights in another can then differ in the last bit. Models
that moduli converts, and files that it writes, are aligned; both give the same outputs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

LINE = 64  # bytes


@torch.no_grad()
def align_parameters(model: nn.Module) -> None:
    """Move parameters that lie at odd addresses of the CPU's memory; values stay."""
    for parameter in model.parameters():
        plain = parameter.device.type == "cpu" and type(parameter.data) is torch.Tensor
        if plain and parameter.data_ptr() % LINE:
            parameter.data = parameter.data.clone()


def align_file(path: Path) -> None:
    """Rewrite a safetensors file with its tensors at multiples of `LINE`.

    The header is padded with spaces, and tensors whose size is no multiple of a line (small
    biases) go to the end, since the format allows no gaps between tensors.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None)
    first = {name: entry["data_offsets"][0] for name, entry in header.items()}
    size = {name: entry["data_offsets"][1] - first[name] for name, entry in header.items()}
    order = sorted(header, key=lambda name: (size[name] % LINE != 0, first[name]))
    offset = 0
    for name in order:
        header[name]["data_offsets"] = [offset, offset + size[name]]
        offset += size[name]
    table = {name: header[name] for name in order}
    if metadata is not None:
        table = {"__metadata__": metadata, **table}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    temporary = path.with_name(path.name + ".aligned")
    with path.open("rb") as source, temporary.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            source.seek(8 + length + first[name])
            _copy(source, target, size[name])
    os.replace(temporary, path)


def _copy(source: BinaryIO, target: BinaryIO, count: int, chunk: int = 1 << 24) -> None:
    while count:
        data = source.read(min(count, chunk))
        target.write(data)
        count -= len(data)
