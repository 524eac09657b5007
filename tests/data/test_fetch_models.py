"""Converters of models on small random ones: what they read, what they write, what they refuse."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduli.data.convert import CONVERTERS
from moduli.data.convert.vit_onnx import fold, read_dinov2
from moduli.data.convert.whisper_ct2 import read_ct2, rename
from moduli.errors import FetchError


def tiny_dinov2() -> Any:
    """A random DINOv2 whose LayerScale is far from 1, on a grid of 5 x 5 patches."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        mlp_ratio=2,
        image_size=70,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name or "position" in name or "bias" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def write_onnx(model: Any, path: Path) -> None:
    """What exporters make of it: linear weights transposed and nameless, positions in two parts."""
    import onnx
    from onnx import helper, numpy_helper
    from safetensors.torch import load_file

    model.save_pretrained(path.parent / "checkpoint")
    tensors = load_file(path.parent / "checkpoint" / "model.safetensors")
    shutil.rmtree(path.parent / "checkpoint")
    initializers, nodes = [], []

    def add(name: str, tensor: Tensor) -> None:
        initializers.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))

    for number, (name, tensor) in enumerate(tensors.items()):
        if name == "embeddings.position_embeddings":
            add("onnx::Concat_1", tensor[:, :1])
            add("onnx::Reshape_2", tensor[:, 1:])
        elif name.endswith(".weight") and ".layer." in name and tensor.ndim == 2:
            add(f"onnx::MatMul_{1000 + number}", tensor.T)
            node = "/backbone/" + name.removesuffix(".weight").replace("encoder.layer.", "@")
            node = node.replace(".", "/").replace("@", "encoder/layer.") + "/MatMul"
            inputs = ["x", f"onnx::MatMul_{1000 + number}"]
            nodes.append(helper.make_node("MatMul", inputs, [f"y{number}"], name=node))
        elif name != "embeddings.mask_token":
            add(f"backbone.{name}", tensor)
    add("decoder.final_conv.bias", torch.zeros(1))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], initializers)), str(path))


def test_a_vit_computes_what_the_dinov2_in_the_onnx_file_does(places: tuple[Path, Path]) -> None:
    from transformers import AutoModel

    source, out = places
    model = tiny_dinov2()
    write_onnx(model, source / "model.onnx")
    (source / "METADATA").write_text("origin")
    CONVERTERS["vit_onnx"](source, out)
    vit = AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    assert vit.config.model_type == "vit"
    assert (out / "METADATA").read_text() == "origin"
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        got = vit(images).last_hidden_state
    assert got.shape == (2, 1 + 16 * 16, 64)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_folding_at_the_trained_size_leaves_the_positions_alone(tmp_path: Path) -> None:
    write_onnx(tiny_dinov2(), tmp_path / "model.onnx")
    tensors = read_dinov2(tmp_path / "model.onnx")
    folded = fold(tensors, 70)
    name = "embeddings.position_embeddings"
    assert torch.equal(folded[name], tensors[name])
    assert not any("layer_scale" in key for key in folded)


def test_an_onnx_file_with_another_network_is_refused(places: tuple[Path, Path]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    source, out = places
    weight = numpy_helper.from_array(np.zeros((3, 3), np.float32), "backbone.embeddings.cls_token")
    graph = helper.make_graph([], "g", [], [], [weight])
    onnx.save(helper.make_model(graph), str(source / "model.onnx"))
    with pytest.raises(FetchError, match="square grid of patch positions"):
        CONVERTERS["vit_onnx"](source, out)


def ct2(tensors: dict[str, np.ndarray], version: int = 6, kind: str = "WhisperSpec") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    types = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    out = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", types[str(array.dtype)], array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def ct2_of(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a Whisper as CTranslate2 has them, in half precision."""
    whole = {
        "self_attn_layer_norm": "self_attention/layer_norm",
        "encoder_attn_layer_norm": "attention/layer_norm",
        "final_layer_norm": "ffn/layer_norm",
        "fc1": "ffn/linear_0",
        "fc2": "ffn/linear_1",
        "self_attn.out_proj": "self_attention/linear_1",
        "encoder_attn.q_proj": "attention/linear_0",
        "encoder_attn.out_proj": "attention/linear_2",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] != "model":
            continue
        leaf, module, at = parts[-1], ".".join(parts[2:-1]), f"{parts[1]}/"
        if parts[2] == "layers":
            module, at = ".".join(parts[4:-1]), f"{at}layer_{parts[3]}/"
        if module.endswith("layer_norm"):
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        if module == "embed_positions":
            found[f"{at}position_encodings/encodings"] = tensor
        elif module == "embed_tokens":
            found[f"{at}embeddings/weight"] = tensor
        elif module in whole:
            found[f"{at}{whole[module]}/{leaf}"] = tensor
        elif "." not in module:
            found[f"{at}{module}/{leaf}"] = tensor
    for name, tensor in state.items():
        head, _, leaf = name.rpartition(".v_proj.")
        if not head:
            continue
        side, layer = name.split(".")[1], name.split(".")[3]
        key = state.get(f"{head}.k_proj.{leaf}", torch.zeros_like(tensor))
        query = state[f"{head}.q_proj.{leaf}"]
        if head.endswith("encoder_attn"):
            stacked, at = torch.cat((key, tensor)), "attention/linear_1"
        else:
            stacked, at = torch.cat((query, key, tensor)), "self_attention/linear_0"
        found[f"{side}/layer_{layer}/{at}/{leaf}"] = stacked
    arrays = {name: tensor.numpy().astype(np.float16) for name, tensor in found.items()}
    return arrays | {"encoder/num_heads": np.array(1, np.int16)}


def tiny_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=12,
        d_model=64,
        num_mel_bins=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        max_source_positions=20,
        max_target_positions=16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 4),
        decoder_start_token_id=5,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    return model


@pytest.fixture
def whisper_files(places: tuple[Path, Path]) -> Any:
    from tokenizers import Tokenizer, models

    source, _ = places
    model = tiny_whisper()
    (source / "model.bin").write_bytes(ct2(ct2_of(model.state_dict())))
    settings = {"suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[0, 0]]}
    (source / "ct2.json").write_text(json.dumps(settings | {"lang_ids": [3]}))
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate("abcd")}, []))
    names = ("endoftext", "startoftranscript", "startofprev", "notimestamps")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    tokenizer.save(str(source / "tokenizer.json"))
    return model


def test_a_whisper_comes_out_of_ctranslate2_tensor_by_tensor(
    places: tuple[Path, Path], whisper_files: Any
) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    source, out = places
    CONVERTERS["whisper_ct2"](source, out)
    model, info = WhisperForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    expected = whisper_files.state_dict()
    got = model.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert model.dtype == torch.float32
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.generation_config.suppress_tokens == [1]
    assert model.generation_config.no_timestamps_token_id == 7
    processor = WhisperProcessor.from_pretrained(out)
    assert processor.feature_extractor.feature_size == 8
    assert processor.tokenizer("abba", add_special_tokens=False).input_ids == [0, 1, 1, 0]
    assert processor.tokenizer.pad_token_id == 4
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ct2({}, version=5), "version 5"),
        (ct2({}, kind="TransformerSpec"), "TransformerSpec"),
        (ct2({"encoder/conv1/weight": np.zeros((2, 2), np.int8)}), "int8"),
        (ct2({"encoder/conv1/weight": np.zeros((2, 2), np.float32)})[:-9], "ends before"),
    ],
)
def test_other_ctranslate2_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(FetchError, match=message):
        read_ct2(path)


def test_a_bias_of_the_keys_is_not_lost_silently() -> None:
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # q | k | v, each of width 2
    with pytest.raises(FetchError, match="bias for the keys"):
        rename({"encoder/layer_0/self_attention/linear_0/bias": bias})


def test_a_whisper_with_a_tensor_missing_is_refused(
    places: tuple[Path, Path], whisper_files: Any
) -> None:
    source, out = places
    arrays = ct2_of(whisper_files.state_dict())
    del arrays["encoder/layer_1/ffn/linear_1/weight"]
    (source / "model.bin").write_bytes(ct2(arrays))
    with pytest.raises(FetchError, match=r"encoder\.layers\.1\.fc2\.weight"):
        CONVERTERS["whisper_ct2"](source, out)
