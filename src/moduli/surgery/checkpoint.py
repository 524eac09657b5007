"""Saving and reading: an ordinary checkpoint with a few files of ours beside it.

    config.json, model.safetensors, ...   the merged model, as transformers writes it
    moduli.json                           method, settings, layout, hashes, versions, merge gap
    moduli.safetensors                    tensors of ours (routers, expert biases), if there are any

The ordinary part loads with `AutoModel*.from_pretrained` where moduli is not installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import CheckpointError, ModelError
from moduli.surgery.alignment import align_file, align_parameters
from moduli.surgery.convert import layout_of, recorded_layout, set_layout
from moduli.surgery.files import MARKER, check_readable, new_directory, sha256, weight_files
from moduli.surgery.inputs import probe_batch
from moduli.surgery.layout import Layout
from moduli.surgery.merge import dense_bias, dense_state
from moduli.surgery.modular import is_modular, routed_layers
from moduli.surgery.probe import merge_gap
from moduli.surgery.seam import RoutedActivation
from moduli.version import __version__

OWN = "moduli.safetensors"


@dataclass(frozen=True)
class SaveReport:
    """Where the checkpoint is and how far its ordinary part is from the routed model.

    Attributes:
        directory: what was written.
        exact: whether the ordinary part is the trained weights, only moved.
        gap: |routed - merged| / |merged| of the model's outputs; None if it was not measured.
        measured_on: the inputs of that measurement.
    """

    directory: Path
    exact: bool
    gap: float | None
    measured_on: str

    def __str__(self) -> str:
        text = f"saved {self.directory}; its ordinary part loads with plain transformers"
        if self.gap is None:
            return text
        return f"{text}; merging changes outputs by {self.gap:.2%} ({self.measured_on})"


def save(
    model: Any,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    batch: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Write the model as an ordinary checkpoint plus what `moduli.load` needs.

    Args:
        model: a converted model, a dense one, or a PEFT model on a converted one (its adapter is
            written in the coordinates of the original base).
        directory: created, or replaced if moduli wrote it.
        tokenizer: saved beside the model if given; image processors work too.
        batch: inputs to measure what merging changes; random ones are used if there are none.

    Raises:
        CheckpointError: the directory is not ours, or writing failed (nothing is half-written).
        ModelError: the model is not a transformers model.
    """
    target = Path(directory)
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} has no save_pretrained; moduli saves transformers models"
        )
    modular = is_modular(model)
    layout = recorded_layout(model)[1] if modular else None
    exact = not any(dense_bias(layer)[1] for layer in routed_layers(model).values())
    gap, measured_on = _gap(model, batch) if modular else (None, "")
    with new_directory(target) as folder:
        _save_ordinary(model, folder, modular)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        own = own_tensors(model)
        if own:
            from safetensors.torch import save_file

            save_file({n: t.contiguous() for n, t in own.items()}, folder / OWN)
        files = sorted([*folder.glob("*.safetensors")])
        record = {
            "format": 1,
            "layout": None if layout is None else layout.to_dict(),
            "exact": exact,
            "gap": gap,
            "measured_on": measured_on,
            "sha256": {path.name: sha256(path) for path in files},
            "versions": versions(),
        }
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return SaveReport(target, exact, gap, measured_on)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that the ordinary part has no place for, by their names in the modular model."""
    return {
        f"{_prefix(layer)}{key}": tensor.detach().cpu()
        for layer in routed_layers(model).values()
        for key, tensor in layer.state_dict().items()
    }


def _prefix(layer: RoutedActivation) -> str:
    return f"{layer.ffn.name}.{layer.ffn.family.act}."


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
    model = _load_dense(folder)
    if record is None:
        layout = layout_of(model)
        prefixes = () if layout is None else tuple(f"{x.name}." for x in layout.layers)
        return Stored(model, layout, True, _unexpected(model, files, prefixes))
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
    for name, layer in routed_layers(model).items():
        prefix = _prefix(layer)
        mine = {k.removeprefix(prefix): t for k, t in own.items() if k.startswith(prefix)}
        missing = set(layer.state_dict()) - set(mine)
        if missing:
            raise CheckpointError(f"the checkpoint has no {sorted(missing)} for {name}")
        layer.load_state_dict(mine, strict=True)


def versions() -> dict[str, str]:
    """Versions that decide whether a checkpoint reproduces."""
    import transformers

    return {
        "moduli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _save_ordinary(model: Any, folder: Path, modular: bool) -> None:
    state = dense_state(model) if modular else None
    with _plain_config(model, modular):
        model.save_pretrained(folder, state_dict=state)
    for path in folder.glob("*.safetensors"):
        align_file(path)


@contextmanager
def _plain_config(model: Any, modular: bool) -> Iterator[None]:
    """Hide what plain transformers should not see: our layout, and a GGUF loader's leftovers."""
    host, layout = recorded_layout(model) if modular else (model, None)
    drop_gguf(host)
    if modular:
        set_layout(host, None)
    try:
        yield
    finally:
        if modular:
            set_layout(host, layout)


def drop_gguf(model: Any) -> None:
    """Forget that plain weights once came from a GGUF file.

    Loading a GGUF file leaves its quantiser on the model, which then refuses `save_pretrained`
    although its weights are ordinary tensors.
    """
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if method is None or "gguf" not in str(getattr(method, "value", method)).lower():
        return
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


def _gap(model: Any, batch: Mapping[str, Any] | None) -> tuple[float | None, str]:
    if batch is not None:
        return merge_gap(model, batch), "given inputs"
    probe = probe_batch(model)
    return (None, "") if probe is None else (merge_gap(model, probe[1]), probe[0])


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


def _load_dense(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise CheckpointError(
            f"{folder}/config.json names the architecture {names}, which transformers "
            f"{transformers.__version__} does not have"
        )
    try:
        model = architecture.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    align_parameters(model)
    return model


def _unexpected(
    model: nn.Module, files: list[Path], prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """Tensors in converted layers that the dense model has no place for, by layer name."""
    from safetensors import safe_open

    known = set(model.state_dict())
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                prefix = next((p for p in prefixes if name.startswith(p)), None)
                if prefix is not None and name not in known:
                    found[name] = file.get_tensor(name)
    return found
