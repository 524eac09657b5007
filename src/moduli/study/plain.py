"""Logits of an ordinary checkpoint with plain transformers, moduli out of reach.

Run as a script in a new process (`python -I plain.py JOB.json`) it proves that a checkpoint needs
nothing of ours: `import moduli` is made impossible first. Imported, it gives the same function to
the process that compares. It therefore imports nothing from moduli.

    N texts, C classes
"""

import json
import sys
from typing import Any

BATCH_SIZE = 50


def plain_logits(model: Any, tokenizer: Any, texts: list[str], max_length: int) -> Any:
    """Logits `[N, C]` in the order of the texts, from batches of `BATCH_SIZE` by length."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    rows: list[Any] = [None] * len(texts)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            logits = model(**batch.to(model.device)).logits.float().cpu()
            for i, row in zip(chosen, logits, strict=True):
                rows[i] = row
    return torch.stack(rows)


def main(job_file: str) -> None:
    """Read the job, compute, write the logits and what was imported."""
    sys.modules["moduli"] = None  # type: ignore[assignment]  # `import moduli` raises from here
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32)
    model.to(job["device"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    logits = plain_logits(model, tokenizer, job["texts"], job["max_length"])
    save_file({"logits": logits}, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
