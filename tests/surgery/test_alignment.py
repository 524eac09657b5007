"""Weights at aligned addresses: same values, valid files, equal bits after any way of loading."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moduli
from moduli.surgery.alignment import LINE, align_file, align_parameters


def test_aligned_file_has_the_same_content(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a.bias": torch.randn(3),
        "b.weight": torch.randn(8, 16),
        "c.half": torch.randn(5, dtype=torch.bfloat16),
        "d.empty": torch.zeros(0, 4),
        "e.weight": torch.randn(32, 16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    align_file(path)
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], t) for n, t in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        weights = [file.get_tensor(n) for n in ("b.weight", "e.weight")]
        assert all(w.data_ptr() % LINE == 0 for w in weights)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_odd_parameters_are_moved_and_keep_their_identity() -> None:
    layer = torch.nn.Linear(16, 16)
    storage = torch.randn(16 * 16 + 1)
    layer.weight.data = storage[1:].view(16, 16)
    parameter, values = layer.weight, layer.weight.detach().clone()
    assert parameter.data_ptr() % LINE
    align_parameters(layer)
    assert parameter.data_ptr() % LINE == 0
    assert layer.weight is parameter
    assert torch.equal(parameter, values)


def test_real_model_gives_equal_bits_after_each_way_of_loading(
    minilm_path: Path, tmp_path: Path
) -> None:
    """The package's own file is not aligned; the model in memory, and what is saved of it, are."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    batch = tokenizer(
        ["It works well.", "It broke after a day, sadly."], padding=True, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(minilm_path).eval()
    moduli.convert(model, moduli.EMoE(num_experts=16, top_k=4))
    with torch.no_grad():
        moduli.save(model, tmp_path / "modular")
        routed = model(**batch).last_hidden_state
        assert torch.equal(moduli.load(tmp_path / "modular")(**batch).last_hidden_state, routed)
        moduli.merge(model)
        merged = model(**batch).last_hidden_state
        plain = AutoModel.from_pretrained(tmp_path / "modular").eval()
        assert torch.equal(plain(**batch).last_hidden_state, merged)
