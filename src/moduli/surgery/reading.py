"""Reading what `moduli.surgery.checkpoint` or bare `save_pretrained` has written.

Whatever comes from disk is checked before it is used: hashes, layouts, tensors that are missing.
"""

from __future__ import annotations

import json
import logging as stdlib_logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import CheckpointError
from moduli.surgery.alignment import align_parameters
from moduli.surgery.convert import layout_of
from moduli.surgery.files import MARKER, OWN, check_readable, sha256, weight_files
from moduli.surgery.layout import LayerLayout, Layout
from moduli.surgery.modular import routed_layers
from moduli.surgery.stochastic import stochastic_projections


@dataclass(frozen=True)
class Stored:
    """A checkpoint as read from disk: a dense model and what to make of it.

    Attributes:
        model: the dense model; its neurons are in expert order if `permuted`.
        layout: how to split it; None for a dense checkpoint.
        permuted: written by bare `save_pretrained` of a modular model.
        own: tensors of ours, by layer name.
    """

    model: Any
    layout: Layout | None
    permuted: bool
    own: Mapping[str, Tensor] = field(default_factory=dict)


def read(directory: str | Path) -> Stored:
    """Read a directory written by `save`, or by `save_pretrained` of a modular model.

    Raises:
        CheckpointError: missing, truncated, pickle only, or changed since it was written.
    """
    folder = Path(directory)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a PEFT adapter; it fits the original base model: "
            "PeftModel.from_pretrained(base, directory)"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    files = weight_files(folder)
    for path in files:
        check_readable(path)
    record = _read_record(folder)
    model, unexpected = _load_dense(folder)
    if record is None:
        layout = layout_of(model)
        prefixes = () if layout is None else tuple(f"{x.name}." for x in layout.layers)
        ours = [name for name in unexpected if name.startswith(prefixes)]
        return Stored(model, layout, True, _tensors(model, files, ours))
    layout = None if record["layout"] is None else Layout.from_dict(record["layout"])
    own: dict[str, Tensor] = {}
    if (folder / OWN).exists():
        from safetensors.torch import load_file

        own = load_file(folder / OWN)
    return Stored(model, layout, False, own)


def load_own(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Put tensors read from a checkpoint into the routed layers.

    Raises:
        CheckpointError: some are missing, or have no place.
    """
    parts: dict[str, nn.Module] = {layer.path: layer for layer in routed_layers(model).values()}
    parts |= stochastic_projections(model)
    for path, part in parts.items():
        prefix = f"{path}."
        mine = {k.removeprefix(prefix): t for k, t in own.items() if k.startswith(prefix)}
        missing = set(part.state_dict()) - set(mine)
        if missing:
            raise CheckpointError(f"the checkpoint has no {sorted(missing)} for {path}")
        part.load_state_dict(mine, strict=True)


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        hashes = record["sha256"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    for name, expected in hashes.items():
        file = folder / name
        if not file.exists():
            raise CheckpointError(f"{folder} has lost {name}, which its {MARKER} names")
        found = sha256(file)
        if found != expected:
            raise CheckpointError(
                f"{file} is not what moduli wrote: sha256 {found[:12]}..., expected "
                f"{expected[:12]}... To use it as it is, load it with plain transformers and "
                "convert it again"
            )
    return record


def _load_dense(folder: Path) -> tuple[Any, Collection[str]]:
    """The dense model, and the names of tensors that it has no place for."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    architecture = _class_named(names[0], config) if names else None
    if architecture is None:
        raise CheckpointError(
            f"{folder}/config.json names the architecture {names}, which transformers "
            f"{transformers.__version__} does not have"
        )
    modular = (folder / MARKER).exists() or hasattr(config, "moduli")
    try:
        with _quiet(modular):  # tensors of ours are expected to be unexpected
            model, found = architecture.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    layout = layout_of(model)
    layers = layout.layers if layout else []
    owned = [x.name for x in layers if not isinstance(x, LayerLayout)]
    lost = sorted(
        key
        for key in found["missing_keys"]
        if modular and not any(key.startswith(f"{name}.") for name in owned)
    )
    if lost:
        raise CheckpointError(
            f"{folder} has no {lost[0]}{f' and {len(lost) - 1} others' if lost[1:] else ''}, which "
            f"a {names[0]} has. If the saved model had modules of its own in their place, its "
            "class has to be built by its own code"
        )
    align_parameters(model)
    return model, found["unexpected_keys"]


def _class_named(name: str, config: Any) -> Any | None:
    """A model class of transformers, or one that was registered with its Auto classes."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    autos = (getattr(transformers, auto, None) for auto in dir(transformers) if "AutoModel" in auto)
    registered = (
        found
        for auto in autos
        if (found := getattr(auto, "_model_mapping", {}).get(type(config), None)) is not None
    )
    return next((found for found in registered if found.__name__ == name), None)


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    if active:
        logging.set_verbosity(stdlib_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _tensors(model: nn.Module, files: list[Path], names: Collection[str]) -> dict[str, Tensor]:
    """Tensors by the names that they would have in the model."""
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    # Some classes have other names in files than in memory.
    stored: dict[str, str] = {}
    for name in names:
        (in_file,) = revert_weight_conversion(model, {name: torch.empty(0)})  # type: ignore[arg-type]
        stored |= {name: name, in_file: name}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in stored:
                    found[stored[name]] = file.get_tensor(name)
    return found
