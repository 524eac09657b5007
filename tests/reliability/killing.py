"""Kill a study at given moments, say where each hit it, and compare what came of it."""

from __future__ import annotations

import bisect
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.reliability.small_study import Line, finish, make_task, read_log, start

if TYPE_CHECKING:
    from moduli.study.plan import Plan

PHASES = ("between runs", "in preparing", "in training", "in evaluation", "in writing")
POLL_SECONDS = 0.002
MEASURED = ("seconds", "cpu_seconds", "time", "memory", "peak_memory_bytes", "environment")


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after so many runs were there."""

    runs: int
    seconds: float


def draw_moments(log: Sequence[Line], count: int, seed: int) -> list[Moment]:
    """Moments uniform over the time that an undisturbed study took, earliest first.

    They are told by the progress of that study, so that one that is slower meets them as well.
    """
    done = [log[0].at, *(line.at for line in log if line.is_done)]
    generator = random.Random(seed)
    times = sorted(generator.uniform(done[0], done[-1]) for _ in range(count))
    places = [bisect.bisect_right(done, at) - 1 for at in times]
    return [Moment(i, at - done[i]) for i, at in zip(places, times, strict=True)]


def kill_often(plan: Plan, root: Path, log: Path, moments: Sequence[Moment]) -> Counter[str]:
    """Do the study with a SIGKILL at every moment, then to its end; how often phases were hit."""
    hit: Counter[str] = Counter()
    for moment in moments:
        process = start(plan, root, log)
        while process.exitcode is None and not _is_over(moment, read_log(log), process.pid):
            time.sleep(POLL_SECONDS)
        process.kill()
        process.join()
        if process.exitcode == -9:
            hit[phase(root, read_log(log)[-1])] += 1
        elif process.exitcode != 0:
            raise RuntimeError(f"a process of the study ended with {process.exitcode}")
    finish(start(plan, root, log))
    return hit


def _is_over(moment: Moment, log: Sequence[Line], process: int | None) -> bool:
    own = [line for line in log if line.process == process]
    times: dict[str, float] = {}
    for line in log:
        if line.is_done:
            times.setdefault(line.key, line.at)
    if not own or len(times) < moment.runs:
        return False
    since = sorted(times.values())[moment.runs - 1] if moment.runs else 0.0
    # Its first new run, if it was not there yet when that many runs were.
    begun = next((line.at for line in own if line.stage != "known"), own[-1].at)
    return time.monotonic() - max(since, begun) >= moment.seconds


def phase(root: Path, last: Line) -> str:
    """What a killed process was doing, by what it left on the disk and its last line."""
    partial = root / f".{last.key}.partial"
    result = partial / "result"
    # Files that are written under another name first.
    half = [*result.glob(".*"), *partial.glob(".*")]
    cut = [path for path in partial.glob("checkpoints/checkpoint-*") if not _is_whole(path)]
    if (
        half
        or cut
        or (result / "record.json").exists()
        or (root / last.key).exists() > last.is_done
    ):
        return "in writing"
    if last.is_done:
        return "between runs"
    return {"step": "in training", "evaluating": "in evaluation"}.get(last.stage, "in preparing")


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def resumed(log: Sequence[Line]) -> int:
    """How many runs went on from a checkpoint: they do not begin at step 1."""
    first: dict[tuple[int, str], Line] = {}
    for line in log:
        if line.stage in ("step", "evaluating"):
            first.setdefault((line.process, line.key), line)
    return sum(line.stage == "evaluating" or line.step > 1 for line in first.values())


def differences(plan: Plan, undisturbed: Path, other: Path) -> list[str]:
    """In what two finished studies of one plan are not the same, a line each."""
    from moduli.study.compare import collect
    from moduli.study.report import summary_dict

    task = make_task()
    a, b = (collect(plan, [task], root) for root in (undisturbed, other))
    found = [f"{key}: not finished" for key in [r.spec.key for r in a.runs] if key not in b.records]
    for key, record in a.records.items():
        if key not in b.records:
            continue
        mine, theirs = record.result(), b.records[key].result()
        found += [f"{key}: {name} differs" for name in mine if mine[name] != theirs[name]]
        if _repeatable(record.cost) != _repeatable(b.records[key].cost):
            found.append(f"{key}: cost differs")
        mine, theirs = _files(undisturbed / key), _files(other / key)
        if mine.keys() != theirs.keys():
            found.append(f"{key}: files {sorted(mine)} and {sorted(theirs)}")
        found += [
            f"{key}: {name} differs"
            for name in mine.keys() & theirs.keys() - {"record.json"}
            if mine[name] != theirs[name]
        ]
    for root in (undisturbed, other):
        strangers = set(os.listdir(root)) - a.records.keys()
        found += [f"left over: {root.name}/{name}" for name in sorted(strangers)]
    if not found and _repeatable(summary_dict(a)) != _repeatable(summary_dict(b)):
        found.append("the summaries of the studies differ")
    return found


def _repeatable(data: Any) -> Any:
    """The same without what was measured by clocks and in memory."""
    if isinstance(data, Mapping):
        return {name: _repeatable(value) for name, value in data.items() if name not in MEASURED}
    return [_repeatable(item) for item in data] if isinstance(data, list) else data


def _files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
