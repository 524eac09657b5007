"""Outputs of a model, with nothing but torch and transformers.

`moduli.training.evaluate` uses `outputs_of_batch`. Run as a script in a new process
(`python -I plain.py JOB.json`) the file proves that a checkpoint needs nothing of ours: it makes
`import moduli` impossible first, then loads the checkpoint with plain transformers and computes
the same outputs of the same batches. It therefore imports nothing from moduli.

    B batch, C classes, M scored positions, S sequence
"""

import json
import sys
from typing import Any

BATCH_SIZE = 32


def _whole(logits: Any, labels: Any) -> dict[str, Any]:
    """One example's logits [C] as they are."""
    return {"logits": logits}


def _tokens(logits: Any, labels: Any) -> dict[str, Any]:
    """[S, C] and [S] to the negative log-likelihood and the best class where there is a label.

    The logits of a large vocabulary would not fit in memory for a whole data set.
    """
    import torch

    scored = labels != -100
    logits, target = logits[scored], labels[scored]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return {"nll": nll, "predicted": logits.argmax(-1), "target": target}


def _next_tokens(logits: Any, labels: Any) -> dict[str, Any]:
    """The same where position s is to say what stands at s + 1."""
    return _tokens(logits[:-1], labels[1:])


TOKENS_AND_TEXT = "tokens and text"
"""The same as "tokens", and the ids of what the model writes: "greedy" and "beam"."""
BEAMS = 4

REDUCTIONS = {
    "whole": _whole,
    "tokens": _tokens,
    "next tokens": _next_tokens,
    TOKENS_AND_TEXT: _tokens,
}


def _written(model: Any, inputs: dict[str, Any], beams: int) -> list[Any]:
    """Ids that a model with encoder and decoder writes, by greedy search or along beams.

    They may be twice as many as those of the longest source, and some more.
    """
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    longest = 2 * given["input_ids"].shape[1] + 10
    positions = getattr(model.config, "max_position_embeddings", None)
    ids = model.generate(
        **given,
        do_sample=False,
        num_beams=beams,
        max_new_tokens=longest if positions is None else min(longest, positions - 1),
    )
    return [row[row != model.config.pad_token_id] for row in ids.cpu()]


def outputs_of_batch(model: Any, batch: dict[str, Any], reduction: str) -> list[dict[str, Any]]:
    """What the model says to each example of a batch (on the CPU); labels are not shown to it."""
    import torch

    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**inputs).logits.float().cpu()
            written = {}
            if reduction == TOKENS_AND_TEXT:
                written = {
                    n: _written(model, inputs, b) for n, b in (("greedy", 1), ("beam", BEAMS))
                }
    finally:
        for module, training in modes.items():
            module.training = training
    labels = batch.get("labels", [None] * len(logits))
    found = [REDUCTIONS[reduction](*pair) for pair in zip(logits, labels, strict=True)]
    for name, texts in written.items():
        for output, ids in zip(found, texts, strict=True):
            output[name] = ids
    return found


def main(job_file: str) -> None:
    """Read the job, compute the outputs of every batch, write them."""
    sys.modules["moduli"] = None  # type: ignore[assignment]  # `import moduli` raises from here
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file

    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    auto_class = getattr(transformers, job["auto_class"])
    model = auto_class.from_pretrained(job["model"], dtype=torch.float32)
    model.to(job["device"])
    found = {}
    with safe_open(job["batches"], framework="pt") as given:
        for number, names in enumerate(job["names"]):
            batch = {name: given.get_tensor(f"{number}.{name}") for name in names}
            for i, output in enumerate(outputs_of_batch(model, batch, job["reduction"])):
                for name, tensor in output.items():
                    found[f"{number}.{i}.{name}"] = tensor.contiguous().clone()
    save_file(found, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
