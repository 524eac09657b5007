"""A language model stored as GGUF, as a plain directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def gguf_to_pretrained(source: Path, out: Path) -> None:
    """Write a causal language model stored as GGUF as a plain bfloat16 `save_pretrained` directory.

    transformers de-quantises GGUF while loading but keeps calling the model quantised, so its
    `save_pretrained` refuses ("quantized with gguf and is not serializable"). The weights are
    therefore moved into a model built from the configuration without its `quantization_config`.
    The result depends on the file alone: no random number is drawn.

    Args:
        source: directory with `model.gguf`; every other file in it is copied to `out`.
        out: an existing directory.
    """
    import shutil

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "model.gguf"
    # releases that can keep GGUF blocks packed must be told not to
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, local_files_only=True, **options
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    build: Callable[..., Any] = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        plain = build(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    # how this copy was loaded is not a property of the tokenizer
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(out)
    for path in source.iterdir():
        if path.name != name:
            shutil.copyfile(path, out / path.name)
