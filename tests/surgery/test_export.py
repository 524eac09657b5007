"""Upcycled decoders as stock MoE checkpoints, loaded by plain transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moduli
from moduli.errors import ModelError
from moduli.methods.base import Method
from tests import families
from tests.surgery.test_owned import scatter

CLASSES = {
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}
GENERATE = """
import sys
sys.modules["moduli"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[5, 9, 7, 11]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
print(*out[0].tolist())
"""


def upcycled(family: str, **changes: Any) -> Any:
    model = families.build(family)
    settings = {"num_experts": 4, "layers": "all", **changes}
    moduli.convert(model, moduli.SparseUpcycling(**settings))
    return scatter(model)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_the_stock_class_computes_the_same(family: str, tmp_path: Path) -> None:
    model, batch = upcycled(family), families.inputs(family)
    for _ in range(2):  # what moduli wrote may be written again
        moduli.export(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == CLASSES[family]
    torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"renormalise": False}, {"top_k": 1}])
def test_plain_probabilities_where_the_class_has_them(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model, batch = upcycled("qwen3", **changes), families.inputs("qwen3")
    moduli.export(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_it_generates_where_moduli_is_not_installed(tmp_path: Path) -> None:
    model = upcycled("llama")
    moduli.export(model, tmp_path / "out")
    ids = torch.tensor([[5, 9, 7, 11]])
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(i) for i in expected[0].tolist()]


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("llama", moduli.SparseUpcycling(layers="last:1"), "1 of its 2 layers have experts"),
        ("llama", moduli.SparseUpcycling(layers="all", top_k=1), "weights experts by 'softmax'"),
        ("llama", moduli.GMoE(layers="all"), "routes by a CosineRouter"),
        ("llama", moduli.EMoE(num_experts=4, top_k=2, layers="all"), "neurons of a dense FFN"),
        ("gpt2", moduli.SparseUpcycling(layers="all"), "no MoE class of transformers"),
    ],
)
def test_refusals_say_which_condition_failed(
    family: str, method: Method, reason: str, tmp_path: Path
) -> None:
    model = families.build(family)
    moduli.convert(model, method)
    with pytest.raises(ModelError, match=reason):
        moduli.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
