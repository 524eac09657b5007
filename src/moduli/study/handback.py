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
from moduli.errors import CheckpointError, ConfigError
from moduli.study.records import RunRecord, write_json
from moduli.training import plain
from moduli.training.batches import texts_of
from moduli.training.finetune import labels_of, predict
from moduli.training.metrics import score

PROOF = "handback.json"


@dataclass(frozen=True)
class HandBack:
    """What was handed back, and what the proof found."""

    directory: str
    run: str
    """Key of the run whose model it is."""
    texts: int
    identical: bool
    """Whether plain transformers computed the merged model's logits bit for bit."""
    changed: int
    """Test predictions that merging changed, against the routed model."""
    routed_accuracy: Mapping[str, float]
    """By domain, from the run's record."""
    merged_accuracy: Mapping[str, float]
    """By domain, of the logits that the new process computed."""


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
        ConfigError: the run's method has nothing to merge.
    """
    from transformers import AutoTokenizer

    import moduli

    proof = target.parent / PROOF
    if (known := _read_proof(proof, record, target)) is not None:
        return known
    if record.changed is None:
        raise ConfigError(f"{record.spec.method.name} has nothing to merge and to compare with.")
    tell = on_event or (lambda line: None)
    length = record.spec.settings.max_length
    tests = {name: s.test for name, s in task.domains.items() if s.test is not None}

    tell("merging, writing the ordinary checkpoint")
    model = moduli.load(run_directory)
    tokenizer = AutoTokenizer.from_pretrained(run_directory)
    moduli.merge(model)
    moduli.save(model, target, tokenizer)
    tell("the merged model on all test texts")
    merged = {
        name: predict(model, tokenizer, rows, max_length=length) for name, rows in tests.items()
    }
    tell("the checkpoint on all test texts, in a new process without moduli")
    again = _in_new_process(target, tests, length, str(model.device))

    result = HandBack(
        directory=str(target),
        run=record.spec.key,
        texts=sum(len(rows) for rows in tests.values()),
        identical=all(
            again[name].numpy().tobytes() == merged[name].numpy().tobytes() for name in tests
        ),
        changed=sum(record.changed.values()),
        routed_accuracy={name: float(record.scores[name]["accuracy"]) for name in tests},
        merged_accuracy={
            name: score(again[name], labels_of(rows)).accuracy for name, rows in tests.items()
        },
    )
    write_json(proof, asdict(result))
    return result


def _in_new_process(
    model: Path, tests: Mapping[str, Any], max_length: int, device: str
) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    given = {}
    for name, rows in tests.items():
        texts, pairs = texts_of(rows)
        given[name] = {"texts": texts, "pairs": pairs}
    with tempfile.TemporaryDirectory(prefix="moduli-") as scratch:
        job = Path(scratch) / "job.json"
        out = Path(scratch) / "logits.safetensors"
        data: dict[str, Any] = {
            "model": str(model.resolve()),
            "tests": given,
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
        return dict(load_file(out))


def _read_proof(proof: Path, record: RunRecord, target: Path) -> HandBack | None:
    try:
        known = HandBack(**json.loads(proof.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = known.run == record.spec.key and known.directory == str(target)
    return known if same and (target / "model.safetensors").is_file() else None
