"""Images of another size than a model was trained with.

A vision transformer has a position embedding for every patch. They are interpolated once, so that
the model that is tuned and saved is an ordinary one of the new size, and loads without a flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moduli.errors import ConfigError


def scale_images(model: nn.Module, processor: Any, pixels: int) -> None:
    """Make an image processor scale to a square of so many pixels, and a model expect it.

    Args:
        model: changed in place if it has a position embedding per patch (ViT, DeiT, ...); models
            without, such as convolutional ones, take any size as they are.
        processor: of the model.
        pixels: side of the square.

    Raises:
        ConfigError: the processor reads no images, or the size is no multiple of the patches.
    """
    if not hasattr(processor, "crop_size") and not hasattr(processor, "size"):
        raise ConfigError(
            f"image_size is {pixels}, but {type(processor).__name__} reads no images; leave it out."
        )
    for module in model.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Parameter) and hasattr(
            module, "interpolate_pos_encoding"
        ):
            _scale_positions(module, pixels)
            model.config.image_size = pixels  # type: ignore[union-attr]
    for name in ("size", "crop_size"):
        if getattr(processor, name, None):
            setattr(processor, name, {"height": pixels, "width": pixels})


@torch.no_grad()
def _scale_positions(embeddings: Any, pixels: int) -> None:
    """Interpolate the positions of patches, as the module itself would in every pass."""
    patches = embeddings.patch_embeddings
    size = patches.patch_size
    side = int(size if isinstance(size, int) else size[0])
    if pixels % side:
        near = max(side, round(pixels / side) * side)
        raise ConfigError(
            f"image_size is {pixels}; the model cuts images into patches of {side} pixels, so that "
            f"it is a multiple of {side}, such as {near}."
        )
    old = embeddings.position_embeddings
    extra = old.shape[1] - patches.num_patches  # the class token, and others
    count = (pixels // side) ** 2
    unfilled = old.new_empty(1, extra + count, old.shape[2])
    new = embeddings.interpolate_pos_encoding(unfilled, pixels, pixels)
    embeddings.position_embeddings = nn.Parameter(new.clone(), requires_grad=old.requires_grad)
    patches.num_patches = count
    for holder in (embeddings, patches):
        if hasattr(holder, "image_size"):
            plain = isinstance(holder.image_size, int)
            holder.image_size = pixels if plain else (pixels, pixels)
