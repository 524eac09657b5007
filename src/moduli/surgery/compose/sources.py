"""Checkpoints as lazily read tables of tensors, and whether they can be experts of one model.

Nothing is loaded here but headers, configs and one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moduli.errors import CheckpointError, ModelError
from moduli.surgery.files import weight_files

# What has to agree, since an expert computes on the hidden states of the composed model.
_SAME = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
)


class Checkpoint:
    """One dense checkpoint in safetensors, tensor by tensor.

    Args:
        directory: with config.json and weights.
        role: what it is for ("base", "expert 0", ...); errors name it.

    Raises:
        CheckpointError: missing, damaged, pickle only, or an adapter.
    """

    def __init__(self, directory: str | Path, role: str) -> None:
        self.directory = Path(directory)
        self.name = self.directory.resolve().name
        self.role = f"{role} ({self.name})"
        if (self.directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{self.role} is a PEFT adapter; merge it into its base and save that first "
                "(merge_and_unload, save_pretrained)"
            )
        if not (self.directory / "config.json").is_file():
            raise CheckpointError(f"{self.role} is not a checkpoint: it has no config.json")
        self._files = _tensor_files(self.directory)
        self._open: dict[Path, Any] = {}

    @cached_property
    def config(self) -> Any:
        """The transformers config; no code of the checkpoint is run."""
        import transformers

        try:
            return transformers.AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the config of {self.role} does not load: {error}") from error

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Token -> id of its tokenizer; None if it has none."""
        tokenizer = self.tokenizer
        return None if tokenizer is None else tokenizer.get_vocab()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        import transformers

        if not any(self.directory.glob("tokenizer*")):
            return None
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the tokenizer of {self.role} does not load: {error}") from error

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Stored dtype of a tensor in safetensors' terms ("F32", "BF16", ...), from the header."""
        stored: str = self._file(name).get_slice(name).get_dtype()
        return stored

    def read(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless the tensor is there with this shape.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.role} has no tensor {name}")
        if (found := self.shape(name)) != shape:
            raise CheckpointError(f"{self.role} has {name} as {list(found)}, not {list(shape)}")

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def check_fits(source: Checkpoint, base: Checkpoint, *, same_vocab: bool) -> None:
    """Raise unless `source` can be an expert beside `base`.

    Raises:
        ModelError: names every setting in which they differ.
    """
    mine, other = source.config, base.config
    differ = [
        f"{name} is {_shown(mine, name)}, the base has {_shown(other, name)}"
        for name in _SAME
        if getattr(mine, name, None) != getattr(other, name, None)
    ]
    if same_vocab and mine.vocab_size != other.vocab_size:
        differ.append(f"vocab_size is {mine.vocab_size}, the base has {other.vocab_size}")
    if differ:
        only_vocab = differ[0].startswith("vocab_size")
        hint = "; vocab='pad' allows another vocabulary" if only_vocab else ""
        raise ModelError(f"{source.role} does not fit the base: {'; '.join(differ)}{hint}")
    _check_tokens(source, base, same_vocab)


def _check_tokens(source: Checkpoint, base: Checkpoint, same_vocab: bool) -> None:
    mine, other = source.vocabulary, base.vocabulary
    if mine is None or other is None:
        return  # plain copies of weights often come without; there is nothing to compare
    moved = sorted(t for t in mine.keys() & other.keys() if mine[t] != other[t])
    if moved:
        raise ModelError(
            f"{source.role} has another tokenizer than the base: {len(moved)} tokens have "
            f"another id, for example {moved[0]!r} ({mine[moved[0]]}, not {other[moved[0]]})"
        )
    lone = sorted(mine.keys() ^ other.keys())
    if same_vocab and lone:
        raise ModelError(
            f"{source.role} has another tokenizer than the base: {len(lone)} tokens are in one "
            f"only, for example {lone[0]!r}; vocab='pad' allows that"
        )
    if taken := sorted(
        {mine[t] for t in lone if t in mine} & {other[t] for t in lone if t in other}
    ):
        raise ModelError(
            f"{source.role} has another tokenizer than the base: id {taken[0]} is another token"
        )


def _shown(config: Any, name: str) -> str:
    return repr(getattr(config, name, None))


def _tensor_files(directory: Path) -> dict[str, Path]:
    """File of every tensor: what the index names, or the one file, or all there are."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from error
        return {name: directory / file for name, file in table.items()}
    single = directory / "model.safetensors"
    paths = [single] if single.is_file() else weight_files(directory)
    return {name: path for path in paths for name in _opened(path).keys()}  # noqa: SIM118


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, truncated or damaged: {error}") from error
