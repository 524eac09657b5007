"""Whisper stored for CTranslate2, as a plain directory.

The file `model.bin` is a flat list of named tensors. CTranslate2 stacks the projections that read
the same input: `linear_0` of a self-attention is query, key and value; of a cross-attention
`linear_0` is the query and `linear_1` key and value. transformers has them apart, and gives the
key no bias; CTranslate2 stores zeros there.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moduli.errors import FetchError

if TYPE_CHECKING:
    from torch import Tensor

_BINARY_VERSION = 6
_TYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}
_HEAD_WIDTH = 64

# CTranslate2's modules -> those of transformers, without the projections of the attentions
_RENAMED = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}
# the projections that each stacked tensor holds, in order
_STACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def whisper_ct2_to_pretrained(source: Path, out: Path) -> None:
    """Write an English Whisper of CTranslate2 as a float32 `save_pretrained` directory.

    The result has the model, its generation settings, the tokenizer and the feature extractor, and
    loads with `WhisperForConditionalGeneration` and `WhisperProcessor`. The half precision of the
    file is widened, so that the model can be tuned as it is.

    Args:
        source: directory with `model.bin`, `ct2.json` (CTranslate2's settings: the suppressed
            tokens and the alignment heads) and `tokenizer.json`; other files are copied.
        out: an existing directory.

    Raises:
        FetchError: a file does not hold what an English Whisper has.
    """
    import torch
    import transformers
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tf: Any = transformers  # much of it has no annotations
    tensors = rename(read_ct2(source / "model.bin"))
    settings = json.loads((source / "ct2.json").read_text(encoding="utf-8"))
    raw = tf.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    ids = raw.convert_tokens_to_ids
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
    mels = tensors["model.encoder.conv1.weight"].shape[1]
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        encoder_attention_heads=width // _HEAD_WIDTH,
        decoder_attention_heads=width // _HEAD_WIDTH,
        encoder_ffn_dim=len(tensors["model.encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(tensors["model.decoder.layers.0.fc1.bias"]),
        max_source_positions=len(tensors["model.encoder.embed_positions.weight"]),
        max_target_positions=len(tensors["model.decoder.embed_positions.weight"]),
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
    )
    # how to decode belongs to the generation settings alone
    config.suppress_tokens = config.begin_suppress_tokens = None
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    missing = model.load_state_dict(tensors, strict=False, assign=True)
    if missing.unexpected_keys or missing.missing_keys != ["proj_out.weight"]:
        raise FetchError(f"model.bin does not hold the tensors of a Whisper: {missing}.")
    model.tie_weights()
    model.generation_config = tf.GenerationConfig(
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
        max_initial_timestamp_index=50,
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )
    model.save_pretrained(out)
    tf.WhisperFeatureExtractor(feature_size=mels).save_pretrained(out)
    tokenizer = tf.WhisperTokenizer(
        tokenizer_object=raw.backend_tokenizer,
        pad_token="<|endoftext|>",
        model_max_length=config.max_target_positions,
    )
    tokenizer.save_pretrained(out)
    for path in source.iterdir():
        if path.name not in ("model.bin", "ct2.json", "tokenizer.json"):
            shutil.copyfile(path, out / path.name)


def _layers(tensors: dict[str, Tensor], side: str) -> int:
    prefix = f"model.{side}.layers."
    return 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith(prefix))


def read_ct2(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 `model.bin`, by its own names, in float32.

    Layout (CTranslate2, `python/ctranslate2/specs/model_spec.py`, little-endian): u32 version, str
    name of the specification, u32 its revision, u32 number of tensors; for each str name, u8 rank,
    u32 x rank shape, u8 type, u32 bytes, the values; then aliases, which we have no use for. A str
    is u16 length and as many bytes, the last of them zero.

    Raises:
        FetchError: it is another version, no Whisper, quantised, or cut off.
    """
    import numpy as np
    import torch

    found: dict[str, Tensor] = {}
    with path.open("rb") as file:
        (version,) = _unpack(file, "I")
        kind = _string(file) if version == _BINARY_VERSION else ""
        if kind != "WhisperSpec":
            raise FetchError(
                f"{path.name} should be a WhisperSpec in version {_BINARY_VERSION} of "
                f"CTranslate2's files; it is {kind!r} in version {version}."
            )
        _revision, count = _unpack(file, "II")
        for _ in range(count):
            name = _string(file)
            (rank,) = _unpack(file, "B")
            shape = _unpack(file, f"{rank}I")
            kind_of_value, size = _unpack(file, "BI")
            values = _read(file, size)
            if not shape:
                continue  # settings, such as the number of heads
            if not _TYPES.get(kind_of_value, "").startswith("float"):
                raise FetchError(
                    f"{name} in {path.name} is {_TYPES.get(kind_of_value, 'of no known type')}; "
                    "only float32 and float16 weights are converted."
                )
            array = np.frombuffer(values, dtype=_TYPES[kind_of_value]).reshape(shape)
            found[name] = torch.from_numpy(array.astype(np.float32))
    return found


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's tensors of a Whisper under the names of transformers, stacked ones taken apart.

    Raises:
        FetchError: a key projection has a bias, which transformers' has not.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        side, *path, leaf = name.split("/")
        at = f"model.{side}."
        if path[0].startswith("layer_") and path[0] != "layer_norm":
            at += f"layers.{path.pop(0).removeprefix('layer_')}."
        module, leaf = "/".join(path), _LEAVES.get(leaf, leaf)
        if module not in _STACKED:
            renamed[f"{at}{_RENAMED.get(module, module)}.{leaf}"] = tensor
            continue
        parts = _STACKED[module]
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            if part.endswith("k_proj") and leaf == "bias":
                if rows.any():
                    raise FetchError(f"{name} has a bias for the keys; Whisper has none.")
                continue
            renamed[f"{at}{part}.{leaf}"] = rows.contiguous()
    return renamed


def _read(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise FetchError("model.bin ends before its last tensor: the file is damaged.")
    return content


def _unpack(file: IO[bytes], form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", _read(file, struct.calcsize(f"<{form}")))


def _string(file: IO[bytes]) -> str:
    return _read(file, _unpack(file, "H")[0])[:-1].decode("utf-8", "replace")
