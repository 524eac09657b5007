"""Saving: an ordinary checkpoint with a few files of ours beside it.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduli.errors import ModelError
from moduli.surgery.alignment import align_file
from moduli.surgery.convert import recorded_layout, set_layout
from moduli.surgery.files import MARKER, OWN, new_directory, sha256
from moduli.surgery.inputs import probe_batch
from moduli.surgery.merge import dense_state, is_averaged, parted_layers
from moduli.surgery.modular import is_modular, routed_layers
from moduli.surgery.probe import merge_gap
from moduli.surgery.processes import gathered, is_shared, is_writer, unwrapped, write_once
from moduli.surgery.projection import is_sharded, whole
from moduli.surgery.stochastic import stochastic_projections
from moduli.version import __version__


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
            written in the coordinates of the original base). If it is wrapped in
            `DistributedDataParallel` or sharded by FSDP2, every process calls this: process 0
            writes, the others wait for it.
        directory: created, or replaced if moduli wrote it.
        tokenizer: saved beside the model if given; image processors work too.
        batch: inputs to measure what merging changes; random ones are used if there are none.

    Raises:
        CheckpointError: the directory is not ours, or writing failed (nothing is half-written).
        ModelError: the model is not a transformers model.
    """
    target = Path(directory)
    together = is_shared(model)
    model = unwrapped(model)
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} has no save_pretrained; moduli saves transformers models"
        )
    _require_storable(model)
    modular = is_modular(model)
    layout = recorded_layout(model)[1] if modular else None
    exact = not any(is_averaged(layer) for layer in routed_layers(model).values())
    exact = exact and not parted_layers(model)
    gap, measured_on = _gap(model, batch) if modular else (None, "")
    state = _ordinary_state(model, modular, together)
    own = own_tensors(model)

    def write() -> None:
        with new_directory(target) as folder:
            _save_ordinary(model, folder, modular, state)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
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

    write_once(write, together)
    return SaveReport(target, exact, gap, measured_on)


def _require_storable(model: Any) -> None:
    """Raise for weights in a quantiser's own form, unless transformers knows how to write them.

    Of a PEFT model only adapters are written.
    """
    if getattr(model, "hf_quantizer", None) is not None or hasattr(model, "peft_config"):
        return
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor and not is_sharded(parameter):
            raise ModelError(
                f"{name} is a {type(parameter.data).__name__}, which safetensors cannot hold; "
                "transformers writes quantised weights of models that it has quantised itself: "
                "from_pretrained(..., quantization_config=TorchAoConfig(...))"
            )


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that the ordinary part has no place for, by their names in the modular model."""
    parts: dict[str, nn.Module] = {layer.path: layer for layer in routed_layers(model).values()}
    parts |= stochastic_projections(model)
    return {
        f"{path}.{key}": whole(tensor.detach()).cpu()
        for path, part in parts.items()
        for key, tensor in part.state_dict().items()
    }


def versions() -> dict[str, str]:
    """Versions that decide whether a checkpoint reproduces."""
    import transformers

    return {
        "moduli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _ordinary_state(model: Any, modular: bool, together: bool) -> dict[str, Tensor] | None:
    """What `save_pretrained` is to write; None for what it takes from the model itself."""
    if modular:
        return dense_state(model, keep=is_writer(together))
    return gathered(model.state_dict(keep_vars=True), is_writer(together)) if together else None


def _save_ordinary(
    model: Any, folder: Path, modular: bool, state: dict[str, Tensor] | None
) -> None:
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
