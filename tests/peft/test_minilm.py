"""The real encoder: LoRA trained on its converted form serves the original one, without moduli."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

import moduli
from tests.training.ddp_worker import arguments

SERVE = """
import sys
sys.modules["moduli"] = None  # importing it would fail
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
base, adapter, folder = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
for tensor in model.parameters():  # aligned memory, so that sums come out the same
    tensor.data = tensor.data.clone()
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    logits = model(**load_file(folder + "/inputs.safetensors")).logits
save_file({"logits": logits}, folder + "/logits.safetensors")
"""


def test_lora_trained_on_the_routed_model_serves_the_original(
    minilm_path: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        minilm_path, num_labels=2, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    moduli.convert(base, moduli.EMoE(num_experts=16, top_k=4, layers="last:2", split="random"))
    targets = r".*layer\.(4|5)\.(intermediate|output)\.dense"
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets)
    model = get_peft_model(base, config)
    texts = ["The film is a delight.", "A dreadful, boring plot.", "It works.", "It is broken."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    rows = [
        {**{k: v[i] for k, v in encoded.items()}, "labels": torch.tensor(i % 2)} for i in range(4)
    ] * 4
    changes = {"learning_rate": 1e-2, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    Trainer(model=model, args=arguments(tmp_path / "run", **changes), train_dataset=rows).train()
    moduli.save(model, tmp_path / "adapter")
    with torch.no_grad():
        routed = model.eval()(**encoded).logits
        moduli.merge(model)
        merged = model(**encoded).logits
    assert float((routed - merged).abs().max()) > 1e-3

    save_file(dict(encoded), tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", SERVE, str(minilm_path), str(tmp_path / "adapter")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    served = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(served, merged)
