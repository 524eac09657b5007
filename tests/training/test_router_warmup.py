"""Warming up routers trains them alone, towards the experts that predict the text best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moduli
from moduli.errors import CheckpointError, ConfigError, DataError, ModelError
from moduli.surgery.compose.write import replace_tensors
from moduli.training.router_warmup import find_routers, warm_up_checkpoint, warm_up_routers
from tests.surgery.compose.tiny_sources import tiny_model, tiny_source, tiny_tokenizer

NAME = "model.safetensors"
TEXTS = ["w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"] * 20 + ["w40 w41 w42 w43 w44 w45 w46"] * 20


def fit(model: Any, tokenizer: Any, text: str) -> Any:
    """A fine-tune that knows one text by heart; only its FFNs change."""
    ids = torch.tensor([[*tokenizer(text)["input_ids"], 2] * 3])
    trained = [p for n, p in model.named_parameters() if ".mlp." in n]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def composed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes, each of one text, with random routers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("composed")
    base = tiny_source(root / "base", request.param, 0)
    for name, text in (("a", TEXTS[0]), ("b", TEXTS[-1])):
        fit(tiny_model(request.param, 0), tiny_tokenizer(), text).save_pretrained(root / name)
    moduli.compose(base, [root / "a", root / "b"], root / "out", gate="uniform_random", top_k=1)
    return root / "out"


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def loss(model: Any) -> float:
    tokenizer = tiny_tokenizer()
    rows = [torch.tensor([[*tokenizer(t)["input_ids"], 2] * 2]) for t in (TEXTS[0], TEXTS[-1])]
    return sum(float(model(ids, labels=ids).loss) for ids in rows) / 2


def test_routers_learn_and_nothing_else_moves(composed: Path) -> None:
    model, tokenizer = load(composed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    at_first = loss(model)
    result = warm_up_routers(model, tokenizer, TEXTS, steps=60, block=20)
    assert result.steps == len(result.losses) == 60
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    assert loss(model) < at_first
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith("mlp.gate.weight"), name
    assert model.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert {router.top_k for router in find_routers(model).values()} == {1}
    assert set(result.trained) == set(find_routers(model))


def test_the_same_seed_trains_the_same_routers(composed: Path) -> None:
    trained = []
    for seed in (0, 0, 1):
        model, tokenizer = load(composed)
        warm_up_routers(model, tokenizer, TEXTS, steps=3, block=20, seed=seed)
        trained.append(torch.stack([r.weight for r in find_routers(model).values()]))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_a_model_in_bfloat16_stays_in_it(composed: Path) -> None:
    # The grouped kernel wants rows of a multiple of 16 bytes, which these tiny FFNs have not.
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    model, tokenizer = load(composed, **options)
    before = [router.weight.clone() for router in find_routers(model).values()]
    warm_up_routers(model, tokenizer, TEXTS, steps=5, block=20)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = [router.weight for router in find_routers(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_directory_gets_the_trained_routers_and_nothing_else(
    composed: Path, tmp_path: Path
) -> None:
    shutil.copytree(composed, tmp_path / "out")
    result = warm_up_checkpoint(tmp_path / "out", TEXTS, steps=20, block=20)
    before, after = load_file(composed / NAME), load_file(tmp_path / "out" / NAME)
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(result.trained)
    trained, tokenizer = load(composed)
    warm_up_routers(trained, tokenizer, TEXTS, steps=20, block=20)
    stored, _ = load(tmp_path / "out")
    with torch.no_grad():
        tokens = torch.arange(3, 33)[None]
        assert torch.equal(stored(tokens).logits, trained(tokens).logits)
    record = json.loads((tmp_path / "out/moduli_compose.json").read_text())
    assert record["warm_up"] == {"steps": 20, "losses": list(result.losses)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in composed.iterdir()
    }


def test_replacing_what_is_not_there(composed: Path, tmp_path: Path) -> None:
    shutil.copytree(composed, tmp_path / "out")
    before = (tmp_path / "out" / NAME).read_bytes()
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        replace_tensors(tmp_path / "out", {"nonsense": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"stored as \[61, 16\], not \[2\]"):
        replace_tensors(tmp_path / "out", {"model.embed_tokens.weight": torch.zeros(2)})
    assert (tmp_path / "out" / NAME).read_bytes() == before


def test_what_cannot_be_warmed_up(composed: Path) -> None:
    model, tokenizer = load(composed)
    with pytest.raises(DataError, match="too few for one block of 128"):
        warm_up_routers(model, tokenizer, ["w3"])
    with pytest.raises(ConfigError, match="steps 0"):
        warm_up_routers(model, tokenizer, TEXTS, steps=0)
    with pytest.raises(ModelError, match="no stock MoE class"):
        warm_up_routers(tiny_model("llama", 0), tokenizer, TEXTS)
    with pytest.raises(ModelError, match="float16"):
        warm_up_routers(model.half(), tokenizer, TEXTS, block=20)
