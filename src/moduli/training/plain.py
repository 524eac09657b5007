"""Logits of a classifier, with nothing but torch and transformers.

`moduli.training.finetune.predict` is this function. Run as a script in a new process
(`python -I plain.py JOB.json`) the file proves that a checkpoint needs nothing of ours: it makes
`import moduli` impossible first, then loads the checkpoint with plain transformers and computes
the same logits. It therefore imports nothing from moduli.

    N texts, C classes
"""

import json
import sys
from typing import Any

BATCH_SIZE = 32


def plain_logits(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """Logits `[N, C]` (float32, on the CPU) of the texts, in their order.

    Texts are batched by length, so that little is padding. The batches depend on the texts alone,
    so that equal weights give equal bits.
    """
    import torch

    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    rows: list[Any] = [None] * len(texts)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = tokenizer(
                    [texts[i] for i in chosen],
                    None if pairs is None else [pairs[i] for i in chosen],
                    padding=True,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                )
                logits = model(**batch.to(model.device)).logits.float().cpu()
                for i, row in zip(chosen, logits, strict=True):
                    rows[i] = row
    finally:
        model.train(training)
    return torch.stack(rows)


def main(job_file: str) -> None:
    """Read the job, compute the logits of every set of texts, write them."""
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
    logits = {
        name: plain_logits(model, tokenizer, given["texts"], given["pairs"], job["max_length"])
        for name, given in job["tests"].items()
    }
    save_file(logits, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
