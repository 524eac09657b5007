"""Saving and loading: bit-equal in a new process, ordinary for transformers, never half-done."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moduli
from moduli.errors import CheckpointError, ModelError
from moduli.surgery.modular import routed_layers
from tests.surgery.test_roundtrip import VARIANTS, emoe, inputs, make
from tests.tiny import MODELS

SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
{setup}
batch = load_file(sys.argv[2])
with torch.no_grad():
    save_file({{"logits": model(**batch).logits.contiguous()}}, sys.argv[3])
"""
WITH_MODULI = "import moduli; model = moduli.load(sys.argv[1])"
WITHOUT = """
sys.modules["moduli"] = None  # importing it would raise
import json, transformers
name = json.load(open(sys.argv[1] + "/config.json"))["architectures"][0]
model, info = getattr(transformers, name).from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
model.eval()
"""


def in_new_process(setup: str, folder: Path, example: dict[str, Any], tmp: Path) -> torch.Tensor:
    save_file(example, tmp / "batch.safetensors")
    out = tmp / "logits.safetensors"
    command = [sys.executable, "-c", SCRIPT.format(setup=setup)]
    command += [str(folder), str(tmp / "batch.safetensors"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)["logits"]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "bert" else pytest.mark.slow) for f in MODELS]
)
def test_saved_model_is_bit_equal_in_a_new_process(family: str, tmp_path: Path) -> None:
    model, example = make(family), inputs(family)
    moduli.convert(model, emoe())
    with torch.no_grad():
        for layer in routed_layers(model).values():  # as if trained
            layer.ffn.keys().add_(0.01 * torch.randn_like(layer.ffn.keys()))
        expected = model(**example).logits
        with moduli.dense(model):
            merged = model(**example).logits
    report = moduli.save(model, tmp_path / "out")
    assert report.gap is not None
    assert report.gap > 0
    with torch.no_grad():
        after = model(**example).logits
    assert torch.equal(after, expected), "saving changed the model"
    assert torch.equal(in_new_process(WITH_MODULI, tmp_path / "out", example, tmp_path), expected)
    plain = in_new_process(WITHOUT, tmp_path / "out", example, tmp_path)
    torch.testing.assert_close(plain, merged, rtol=1e-5, atol=1e-5)
    moduli.merge(model)
    assert torch.equal(plain, model(**example).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_bit_equal(variant: str, tmp_path: Path) -> None:
    model, example = make("bert"), inputs("bert")
    moduli.convert(model, emoe(**VARIANTS[variant]))
    model.train()
    model(**example)  # a kept gate is due for an update
    model.eval()
    expected = model(**example).logits
    moduli.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "bare")
    for folder in ("ours", "bare"):
        loaded = moduli.load(tmp_path / folder)
        assert moduli.is_modular(loaded)
        assert torch.equal(loaded(**example).logits, expected), folder
        assert loaded.config.moduli == model.config.moduli


def test_changed_top_k_survives_saving(tmp_path: Path) -> None:
    model, example = make("llama"), inputs("llama")
    moduli.convert(model, emoe())
    moduli.set_top_k(model, 4)
    moduli.save(model, tmp_path / "out")
    assert torch.equal(moduli.load(tmp_path / "out")(**example).logits, model(**example).logits)


def test_bare_checkpoint_is_an_ordinary_dense_one(tmp_path: Path) -> None:
    """Trainer checkpoints load with plain transformers: neurons permuted, function the same."""
    model, example = make("bert"), inputs("bert")
    original = model(**example).logits
    moduli.convert(model, emoe())
    model.save_pretrained(tmp_path / "bare")
    plain = in_new_process(WITHOUT, tmp_path / "bare", example, tmp_path)
    torch.testing.assert_close(plain, original, rtol=1e-5, atol=1e-5)
    loaded = type(model).from_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"moduli\.load"):
        moduli.convert(loaded, emoe())


def test_dense_models_save_and_load_too(tmp_path: Path) -> None:
    model, example = make("vit"), inputs("vit")
    moduli.save(model, tmp_path / "out")
    loaded = moduli.load(tmp_path / "out")
    assert not moduli.is_modular(loaded)
    assert torch.equal(loaded(**example).logits, model(**example).logits)


# --- what can be wrong with a checkpoint --------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make("bert")
    moduli.convert(model, emoe(gate="linear"))
    moduli.save(model, tmp_path / "out")
    return tmp_path / "out"


def test_changed_weights_are_noticed(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not what moduli wrote: sha256"):
        moduli.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "moduli.safetensors"])
def test_truncated_weights(saved: Path, name: str) -> None:
    file = saved / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated|not what moduli wrote"):
        moduli.load(saved)


def test_lost_file(saved: Path) -> None:
    (saved / "moduli.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lost moduli\.safetensors"):
        moduli.load(saved)


def test_pickle_only_weights_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle only"):
        moduli.load(saved)


def test_missing_directory_and_damaged_records(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        moduli.load(tmp_path / "nowhere")
    (saved / "moduli.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"moduli\.json is damaged"):
        moduli.load(saved)


def test_method_that_is_not_there(saved: Path) -> None:
    record = json.loads((saved / "moduli.json").read_text())
    record["layout"]["method"] = "emeo"
    (saved / "moduli.json").write_text(json.dumps(record))
    with pytest.raises(moduli.ModuliError, match="emoe"):
        moduli.load(saved)


def test_damaged_labels(saved: Path) -> None:
    record = json.loads((saved / "moduli.json").read_text())
    record["layout"]["layers"][0]["neurons"] = 7
    (saved / "moduli.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="layout in the config is damaged"):
        moduli.load(saved)


# --- writing ------------------------------------------------------------------------------------


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="was not written by moduli"):
        moduli.save(make("bert"), target)
    assert [p.name for p in target.iterdir()] == ["chapter1.tex"]
    with pytest.raises(CheckpointError, match="not a directory"):
        moduli.save(make("bert"), target / "chapter1.tex")


def test_our_own_directory_is_replaced_whole(saved: Path) -> None:
    assert (saved / "moduli.safetensors").exists()
    moduli.save(make("bert"), saved)
    assert not (saved / "moduli.safetensors").exists()
    assert sorted(p.name for p in saved.parent.iterdir()) == ["out"]


def test_disk_full_leaves_nothing_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old checkpoint is still there, whole, and no temporary files are."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        moduli.save(make("bert"), saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a POSIX feature")
def test_a_real_write_error_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit of the operating system, hit in the middle of the weights."""
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import moduli
from tests.tiny import build
model = build("bert")
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    moduli.save(model, {str(tmp_path / "out")!r})
except moduli.ModuliError as error:
    sys.exit(7)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, timeout=120
    )
    assert done.returncode == 7, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_permutation_are_noticed(tmp_path: Path) -> None:
    from moduli.surgery.convert import require_same_layout

    model = make("bert")
    moduli.convert(model, emoe())
    model.save_pretrained(tmp_path / "checkpoint")
    require_same_layout(model, tmp_path / "checkpoint")
    moduli.merge(model)
    with pytest.raises(CheckpointError, match="another order"):
        require_same_layout(model, tmp_path / "checkpoint")
    moduli.convert(model, emoe(split="random", seed=5))
    with pytest.raises(CheckpointError, match="another order"):
        require_same_layout(model, tmp_path / "checkpoint")
