"""The same as mergekit-moe 0.1.5: experts and other weights bit for bit, gates and logits closely.

What mergekit composed of the tiny sources is stored in data/ (make_mergekit_data.py made it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moduli.surgery.compose import compose_recipe, read_recipe
from tests.surgery.compose.make_mergekit_data import DATA, FAMILIES, MODES, TOKENS, make_sources

# mergekit reads prompts in bfloat16 (8 bits of mantissa) and counts padding as tokens.
OURS = {"hidden": "hidden", "hidden_avg": "hidden_avg_padded", "cheap_embed": "cheap_embed"}
GATE_TOLERANCE = {"hidden": 0.02, "hidden_avg": 0.02, "cheap_embed": 1e-6}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def sources(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(family)
    make_sources(root, family)
    return root


@pytest.mark.parametrize("mode", MODES)
def test_the_same_as_mergekit(family: str, mode: str, sources: Path, tmp_path: Path) -> None:
    file = DATA / f"mergekit-{family}.safetensors"
    with safe_open(file, "pt") as stored:
        text = stored.metadata()["recipe"].replace("MODE", mode)
        assert stored.metadata()["mergekit"] == "0.1.5"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    given = read_recipe(
        recipe, lambda name: str(sources / name), gate=OURS[mode], gate_dtype="bfloat16"
    )
    compose_recipe(given, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = load_file(file)
    theirs = {n: t for n, t in expected.items() if "/" not in n}
    theirs |= {
        n.removeprefix(f"{mode}/"): t for n, t in expected.items() if n.startswith(f"{mode}/")
    }
    logits = theirs.pop("logits")
    state = model.state_dict()
    assert state.keys() == theirs.keys()
    for name, tensor in state.items():
        if name.endswith("gate.weight"):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=GATE_TOLERANCE[mode])
        else:
            assert torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        if mode == "cheap_embed":
            torch.testing.assert_close(model(TOKENS).logits, logits, rtol=0, atol=2e-5)
        # A gate that differs in its last bit of bfloat16 may choose another expert where two are
        # level; with the other's gates the function is the other's.
        model.load_state_dict(theirs)
        torch.testing.assert_close(model(TOKENS).logits, logits, rtol=0, atol=2e-5)


def test_the_stored_recipe_is_the_one_of_the_script() -> None:
    for family in FAMILIES:
        with safe_open(DATA / f"mergekit-{family}.safetensors", "pt") as stored:
            recipe = json.loads(stored.metadata()["recipe"])
        assert len(recipe["experts"]) == 3
        assert ("shared_experts" in recipe) == (family == "qwen2")
