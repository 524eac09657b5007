"""Hand back a tuned model as an ordinary checkpoint, and prove that it is one.

The routed model is merged and saved; a new process, in which moduli cannot be imported, loads the
directory with plain transformers and computes the logits of every test text. They have to be the
merged model's, byte for byte.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moduli.data.task import Task
from moduli.errors import CheckpointError
from moduli.study import plain
from moduli.study.records import RunRecord, write_json

PROOF = "handback.json"


@dataclass(frozen=True)
class HandBack:
    """What was handed back, and what the proof found. Accuracies are over all test texts."""

    directory: str
    run: str
    """Key of the run whose model it is."""
    texts: int
    identical: bool
    """Whether plain transformers computed the merged model's logits bit for bit."""
    changed: int
    """Predictions that differ between the routed and the merged model."""
    routed_accuracy: Mapping[str, float]
    merged_accuracy: Mapping[str, float]


def hand_back(
    record: RunRecord,
    run_directory: Path,
    task: Task,
    target: Path,
    *,
    on_event: Callable[[str], None] | None = None,
) -> HandBack:
    """Merge the model kept in `run_directory`, write it to `target`, check it in a new process.

    A proof for the same run that lies beside `target` already is returned as it is.

    Args:
        record: the run.
        run_directory: its directory, with the model in it.
        task: its task.
        target: where the ordinary checkpoint goes; replaced if moduli wrote it.
        on_event: called with one line for every step.

    Raises:
        CheckpointError: `target` is not ours, or the new process failed.
    """
    from transformers import AutoTokenizer

    import moduli

    proof = target.parent / PROOF
    if (known := _read_proof(proof, record, target)) is not None:
        return known
    tell = on_event or (lambda line: None)
    length = record.spec.settings.max_length
    tests = {name: s.test for name, s in task.domains.items() if s.test is not None}
    texts = [str(text) for rows in tests.values() for text in rows["text"]]

    model = moduli.load(run_directory)
    tokenizer = AutoTokenizer.from_pretrained(run_directory)
    tell("routed model on all test texts")
    routed = plain.plain_logits(model, tokenizer, texts, length)
    tell("merge, write the ordinary checkpoint")
    moduli.merge(model)
    moduli.save(model, target, tokenizer)
    tell("merged model on all test texts")
    merged = plain.plain_logits(model, tokenizer, texts, length)
    tell("the checkpoint in a new process, with plain transformers and without moduli")
    again = _in_new_process(target, texts, length, str(model.device))

    routed_accuracy: dict[str, float] = {}
    merged_accuracy: dict[str, float] = {}
    start = 0
    for name, rows in tests.items():
        labels = torch.tensor(rows["label"])
        part = slice(start, start := start + len(labels))
        for logits, accuracy in ((routed, routed_accuracy), (merged, merged_accuracy)):
            accuracy[name] = float((logits[part].argmax(-1) == labels).double().mean())
    result = HandBack(
        directory=str(target),
        run=record.spec.key,
        texts=len(texts),
        identical=again.numpy().tobytes() == merged.numpy().tobytes(),
        changed=int((routed.argmax(-1) != merged.argmax(-1)).sum()),
        routed_accuracy=routed_accuracy,
        merged_accuracy=merged_accuracy,
    )
    write_json(proof, asdict(result))
    return result


def _in_new_process(model: Path, texts: list[str], max_length: int, device: str) -> torch.Tensor:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="moduli-") as scratch:
        job = Path(scratch) / "job.json"
        out = Path(scratch) / "logits.safetensors"
        data: dict[str, Any] = {
            "model": str(model.resolve()),
            "texts": texts,
            "max_length": max_length,
            "threads": torch.get_num_threads(),
            "device": device,
            "out": str(out),
        }
        job.write_text(json.dumps(data), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-I", str(Path(plain.__file__).resolve()), str(job)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CheckpointError(
                f"{model} did not load with plain transformers in a new process: {last[0]}"
            )
        return load_file(out)["logits"]


def _read_proof(proof: Path, record: RunRecord, target: Path) -> HandBack | None:
    try:
        known = HandBack(**json.loads(proof.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = known.run == record.spec.key and known.directory == str(target)
    return known if same and (target / "model.safetensors").is_file() else None
