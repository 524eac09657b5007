"""Hand back a tuned model as an ordinary checkpoint, and prove that it is one.

The routed model is merged and saved; a new process, in which moduli cannot be imported, loads the
directory with plain transformers and computes the outputs of all test data. They have to be the
merged model's, byte for byte. Tokens and pixels for it are made by the processor that plain
transformers loads from the same directory.
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
from moduli.study.spec import Edit
from moduli.training import plain
from moduli.training.evaluate import batches_of, in_order, outputs_of
from moduli.training.kinds.base import Output, TaskKind, get_kind, same_outputs

PROOF = "handback.json"
MERGED = Edit("merged").label


@dataclass(frozen=True)
class HandBack:
    """What was handed back, and what the proof found."""

    directory: str
    run: str
    """Key of the run whose model it is."""
    texts: int
    """Test rows."""
    identical: bool
    """Whether plain transformers computed the merged model's outputs bit for bit."""
    changed: int
    """Test predictions that merging changed, against the routed model."""
    metric: str
    """Name of the metric below: the first of the task's kind."""
    routed: Mapping[str, float]
    """By domain, from the run's record."""
    merged: Mapping[str, float]
    """By domain, of the outputs that the new process computed."""


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
    import moduli

    proof = target.parent / PROOF
    if (known := _read_proof(proof, record, target)) is not None:
        return known
    if MERGED not in record.variants:
        raise ConfigError(f"{record.spec.method.name} has nothing to merge and to compare with.")
    tell = on_event or (lambda line: None)
    kind = get_kind(record.kind)
    metric = kind.primary.name
    length = record.spec.settings.max_length
    tests = {name: s.test for name, s in task.domains.items() if s.test is not None}

    tell("merging, writing the ordinary checkpoint")
    model = moduli.load(run_directory)
    moduli.merge(model)
    moduli.save(model, target, kind.load_processor(str(run_directory)))
    processor = kind.load_processor(str(target))
    tell("the merged model on all test data")
    merged = {
        name: outputs_of(kind, model, processor, rows, max_length=length)
        for name, rows in tests.items()
    }
    tell("the checkpoint on all test data, in a new process without moduli")
    again = {
        name: _in_new_process(target, kind, model, processor, rows, length)
        for name, rows in tests.items()
    }

    result = HandBack(
        directory=str(target),
        run=record.spec.key,
        texts=sum(len(rows) for rows in tests.values()),
        identical=all(same_outputs(again[name], merged[name][1]) for name in tests),
        changed=sum(record.variants[MERGED].changed.values()),
        metric=metric,
        routed={name: float(record.scores[name][metric]) for name in tests},
        merged={
            name: float(kind.score(again[name], merged[name][0], rows).to_dict()[metric])
            for name, rows in tests.items()
        },
    )
    write_json(proof, asdict(result))
    return result


def _in_new_process(
    directory: Path, kind: TaskKind, model: Any, processor: Any, rows: Any, max_length: int
) -> list[Output]:
    """Outputs of the checkpoint in `directory`; `model` is asked for its special tokens only."""
    from safetensors.torch import load_file, save_file

    _, batches = batches_of(kind, model, processor, rows, max_length)
    members: list[list[int]] = []
    names: list[list[str]] = []
    given: dict[str, torch.Tensor] = {}
    for number, (places, batch) in enumerate(batches):
        members.append(places)
        names.append(sorted(batch))
        given |= {f"{number}.{name}": tensor.contiguous() for name, tensor in batch.items()}
    with tempfile.TemporaryDirectory(prefix="moduli-") as scratch:
        job, inputs, out = (Path(scratch) / name for name in ("job.json", "in", "out"))
        save_file(given, inputs)
        data: dict[str, Any] = {
            "model": str(directory.resolve()),
            "auto_class": kind.auto_class,
            "reduction": kind.reduction,
            "batches": str(inputs),
            "names": names,
            "threads": torch.get_num_threads(),
            "device": str(model.device),
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
                f"{directory} did not load with plain transformers in a new process: {last[0]}"
            )
        found = load_file(out)
    outputs: list[dict[int, Output]] = [{} for _ in members]
    for key, tensor in found.items():
        place, i, name = key.split(".")
        outputs[int(place)].setdefault(int(i), {})[name] = tensor
    return in_order(
        [(m, [o[i] for i in range(len(m))]) for m, o in zip(members, outputs, strict=True)]
    )


def _read_proof(proof: Path, record: RunRecord, target: Path) -> HandBack | None:
    try:
        known = HandBack(**json.loads(proof.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = known.run == record.spec.key and known.directory == str(target)
    return known if same and (target / "model.safetensors").is_file() else None
