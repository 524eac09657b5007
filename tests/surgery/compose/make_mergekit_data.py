"""Make data/mergekit-*.safetensors: what mergekit-moe composes of the tiny sources.

Run from the root of the repository, in an environment with mergekit:

    python -m tests.surgery.compose.make_mergekit_data

Each file holds the result of mergekit as transformers loads it: all tensors but the gates once
(they do not depend on the gate mode), then gates and logits for each mode. The recipe and the
versions are in the file's metadata.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.surgery.compose.tiny_sources import tiny_source

DATA = Path(__file__).parent / "data"
MODES = ("hidden", "hidden_avg", "cheap_embed")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS: list[dict[str, Any]] = [
    {"positive_prompts": ["w3 w4 w5 w6", "w7 w8"], "residual_scale": 0.5},
    {"positive_prompts": ["w20 w21 w22"], "negative_prompts": ["w3 w30 w31", "w9"]},
    {"positive_prompts": ["w40 w41 w42 w43 w44 w45", "w50 w51", "w52"]},
]
# mergekit 0.1.5 opens the base and the experts only, so the shared expert is one of them.
SHARED = {"source_model": "base", "positive_prompts": ["w10 w11 w12", "w13"]}
TOKENS = torch.arange(3, 61).view(2, 29)


def recipe(family: str, mode: str) -> dict[str, Any]:
    """A recipe of mergekit-moe whose sources are the folders base and source-0 to source-2."""
    made: dict[str, Any] = {
        "base_model": "base",
        "gate_mode": mode,
        "dtype": "float32",
        "experts_per_token": 2,
        "experts": [{"source_model": f"source-{i}", **e} for i, e in enumerate(EXPERTS)],
    }
    if family == "qwen2":
        made["shared_experts"] = [SHARED]
    return made


def make_sources(root: Path, family: str) -> None:
    """The folders that the recipe names."""
    for seed, name in enumerate(("base", "source-0", "source-1", "source-2")):
        tiny_source(root / name, family, seed)


def main() -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    DATA.mkdir(exist_ok=True)
    for family in FAMILIES:
        tensors: dict[str, torch.Tensor] = {}
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            make_sources(root, family)
            for mode in MODES:
                given = recipe(family, mode)
                placed = json.loads(json.dumps(given))
                for entry in [*placed["experts"], *placed.get("shared_experts", [])]:
                    entry["source_model"] = str(root / entry["source_model"])
                placed["base_model"] = str(root / "base")
                out = root / f"out-{mode}"
                config = MoEMergeConfig.model_validate(placed)
                build(config, str(out), MergeOptions(), device="cpu")
                model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                for name, tensor in model.state_dict().items():
                    gate = name.endswith("gate.weight")
                    tensors[f"{mode}/{name}" if gate else name] = tensor.clone()
                with torch.no_grad():
                    tensors[f"{mode}/logits"] = model(TOKENS).logits
        metadata = {"recipe": json.dumps(recipe(family, "MODE"))}
        metadata |= {name: version(name) for name in ("mergekit", "transformers", "torch")}
        save_file(tensors, DATA / f"mergekit-{family}.safetensors", metadata)


if __name__ == "__main__":
    main()
