"""Writing tensors to safetensors files one at a time, in shards, with an index.

Names, shapes and dtypes are known beforehand, so the header can be written first and each tensor
as it comes: no more than one is ever in memory. (`safetensors.save_file` wants a whole file's.)
Tensors start at multiples of a cache line where the format allows it, as in every file of moduli.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduli.errors import CheckpointError, ConfigError
from moduli.surgery.alignment import LINE
from moduli.surgery.files import check_readable, weight_files

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, slots: Sequence[Slot], make: Callable[[Slot], Tensor], max_shard_bytes: int
) -> list[str]:
    """Write a checkpoint's weights as transformers names and splits them.

    Args:
        folder: an existing directory.
        slots: what to write, in order.
        make: gives the tensor of a slot; it is dropped before the next is asked for.
        max_shard_bytes: of a file; a larger tensor gets a file of its own.

    Returns:
        Names of the files.
    """
    shards = _split(slots, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], make)
        return ["model.safetensors"]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, make)
    index = {
        "metadata": {"total_size": sum(slot.bytes for slot in slots)},
        "weight_map": {
            slot.name: file for file, shard in zip(files, shards, strict=True) for slot in shard
        },
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return files


def replace_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put other values in place of tensors of a checkpoint; each file changes as a whole.

    Args:
        folder: a directory with safetensors.
        tensors: new values by name, in the stored shapes; they get the stored dtypes.

    Raises:
        CheckpointError: a tensor is not there in this shape, or a file cannot be written.
    """
    left = dict(tensors)
    for path in weight_files(folder):
        check_readable(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        mine = [name for name in left if name in header]
        if not mine:
            continue
        temporary = path.with_name(path.name + ".new")
        try:
            shutil.copyfile(path, temporary)
            with temporary.open("r+b") as file:
                for name in mine:
                    file.seek(8 + length + header[name]["data_offsets"][0])
                    file.write(_stored(name, left.pop(name), header[name]))
            os.replace(temporary, path)
        except OSError as error:
            raise CheckpointError(f"could not write {path}: {error}; it is as it was") from error
        finally:
            temporary.unlink(missing_ok=True)
    if left:
        raise CheckpointError(f"{folder} has no tensor {sorted(left)[0]}")


def _stored(name: str, tensor: Tensor, entry: Mapping[str, Any]) -> memoryview:
    if list(tensor.shape) != entry["shape"]:
        raise CheckpointError(f"{name} is stored as {entry['shape']}, not {list(tensor.shape)}")
    dtype = next((d for d, code in _CODES.items() if code == entry["dtype"]), None)
    if dtype is None:
        raise CheckpointError(
            f"{name} is stored as {entry['dtype']}, not as a number format we set"
        )
    return _bytes(tensor.detach().cpu().to(dtype))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def size_in_bytes(text: str) -> int:
    """ "5GB" as a number of bytes, in powers of ten as transformers reads it.

    Raises:
        ConfigError: it is no positive size.
    """
    match = re.fullmatch(r"(\d+) ?(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"a shard size of {text!r} was given; write it as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2]]


def _split(slots: Sequence[Slot], max_bytes: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.bytes
    return shards


def _write_file(path: Path, slots: Sequence[Slot], make: Callable[[Slot], Tensor]) -> None:
    # The format allows no gaps, so that tensors that are no multiple of a line go last.
    order = sorted(slots, key=lambda slot: slot.bytes % LINE != 0)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in order:
        header[slot.name] = {
            "dtype": _CODES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.bytes],
        }
        offset += slot.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in order:
            tensor = make(slot).to(slot.dtype)
            assert tuple(tensor.shape) == slot.shape, f"{slot.name} is {tuple(tensor.shape)}"
            file.write(_bytes(tensor))
            del tensor
