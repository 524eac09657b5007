"""Inputs of a model: those that a caller gives, and random ones to measure changes on.

Random ones only tell the order of magnitude; pass real ones where there are some. Letters: B
batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TEXTS, LENGTH, IMAGES, CHOICES = 4, 32, 2, 2

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward."""
Batches = Batch | Sequence[Batch]
"""One batch, or several."""


def as_list(batch: Batches | None) -> list[Batch]:
    """The batches that were given, none or one or several, as a list."""
    if batch is None:
        return []
    return [batch] if isinstance(batch, Mapping) else list(batch)


def probe_batch(model: nn.Module) -> tuple[str, dict[str, Tensor]] | None:
    """A seeded batch for the model's forward, and its description; None for unknown inputs."""
    config: Any = getattr(model, "config", None)
    make = _MAKERS.get(getattr(model, "main_input_name", ""))
    if config is None or make is None:
        return None
    made = make(config, torch.Generator().manual_seed(0))
    if made is None:
        return None
    text, batch = made
    if _chooses(model):
        batch = {name: ids.unflatten(0, (-1, CHOICES)) for name, ids in batch.items()}
    weight = next(model.parameters())
    return text, {
        name: tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }


def _chooses(model: nn.Module) -> bool:
    """Whether a model tells which of several texts is right, and reads [B, choices, S]."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()


_Made = tuple[str, dict[str, Tensor]] | None


def _tokens(config: Any, generator: torch.Generator) -> _Made:
    text = getattr(config, "text_config", config)
    if not getattr(text, "vocab_size", None):
        return None
    shape = (TEXTS, LENGTH)
    batch = {"input_ids": torch.randint(text.vocab_size, shape, generator=generator)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(text.vocab_size, shape, generator=generator)
    vision = getattr(config, "vision_config", None)
    images = None if vision is None else _pixels(vision, generator)
    if images is not None:  # two towers, such as CLIP's
        return f"{TEXTS * LENGTH} random tokens and {images[0]}", {**batch, **images[1]}
    return f"{TEXTS * LENGTH} random tokens", batch


def _pixels(config: Any, generator: torch.Generator) -> _Made:
    size = getattr(config, "image_size", None)
    if size is None:  # timm's wrapper keeps what its model expects
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", (0, None))[1]
    if not isinstance(size, int):
        return None
    shape = (IMAGES, getattr(config, "num_channels", 3), size, size)
    return f"{IMAGES} random images", {"pixel_values": torch.randn(shape, generator=generator)}


def _spectrum(config: Any, generator: torch.Generator) -> _Made:
    """Whisper: log-mel features [B, bins, frames], two frames per encoder position."""
    bins, positions = (getattr(config, k, None) for k in ("num_mel_bins", "max_source_positions"))
    if bins is None or positions is None:
        return None
    features = torch.randn(1, bins, 2 * positions, generator=generator)
    ids = torch.randint(config.vocab_size, (1, LENGTH // 2), generator=generator)
    return "random audio of full length", {"input_features": features, "decoder_input_ids": ids}


def _patches(config: Any, generator: torch.Generator) -> _Made:
    """AST: a spectrogram [B, frames, bins]."""
    frames, bins = (getattr(config, k, None) for k in ("max_length", "num_mel_bins"))
    if frames is None or bins is None:
        return None
    values = torch.randn(1, frames, bins, generator=generator)
    return "a random spectrogram", {"input_values": values}


_MAKERS = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _patches,
}
