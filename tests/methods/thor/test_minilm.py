"""THOR on a real encoder: nothing changes at conversion, two steps train it, and it comes home."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import moduli
from moduli.methods.thor import last_step

TEXTS = ["a camera that takes splendid pictures", "it broke after two days", "neither good nor bad"]


@pytest.mark.slow  # the page's own code trains it, too
def test_minilm(minilm_path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=2).eval()
    batch = dict(AutoTokenizer.from_pretrained(minilm_path)(TEXTS, padding=True,
                                                            return_tensors="pt"))  # fmt: skip
    with torch.no_grad():
        before = model(**batch).logits
        report = moduli.convert(model, moduli.THOR(num_experts=2, alpha=5.0, pair="distinct"))
        assert report is not None
        assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["0", "2", "4"]
        for mode in ("average", "fixed:1", "random_sentence"):
            moduli.set_inference(model, mode)
            torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([1, 0, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    record = last_step(model)
    assert record is not None
    assert float(record.disagreement) > 0  # dropout, and experts that have parted
    moduli.set_inference(model.eval(), "average")
    moduli.save(model, tmp_path / "saved", batch=batch)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, model(**batch).logits)
