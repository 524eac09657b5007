"""Put the tables on THOR into the pages that quote them.

    python -m benchmarks.thor.tables            writes what is between the markers
    python -m benchmarks.thor.tables --check    exits 1 if something there is not up to date

A place is `<!-- thor:NAME -->` ... `<!-- /thor -->`; its content is made from the records in
benchmarks/results/thor/runs/. NAME is a study ("headline", "arms", "wesnoth"), or

    languages    the scores of "arms" by language
    modes        what THOR's experts are to one another, in all studies

`<!-- thor:NAME short -->` leaves out BLEU and the hard rows of a study.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared.tables import (
    average,
    check_option,
    difference,
    lines_of,
    number,
    spread,
    write_places,
)
from benchmarks.thor.modes import RECORD
from benchmarks.thor.plans import DENSE, PLANS, costs
from benchmarks.thor.study import RESULTS
from moduli.data.translation import HARD
from moduli.study.plan import Arm, Plan
from moduli.study.records import RunRecord, read_records
from moduli.study.spec import MethodSpec, plain
from moduli.training.settings import FinetuneSettings

PAGES = ("README.md", "docs/methods/thor.md")
PLACE = re.compile(r"(<!-- thor:(\w+)( short)? -->\n).*?(<!-- /thor -->)", re.DOTALL)
SHORT = 6
"""Columns of a short comparison."""
Runs = dict[str, dict[int, RunRecord]]
"""Finished runs by the label of their arm, in the order of the plan, and seed."""
Rows = list[list[str]]


def main() -> int:
    """Run the command."""
    parser = check_option(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=RESULTS, help="print the tables of these")
    args = parser.parse_args()
    if args.root != RESULTS:
        for name in TABLES:
            print(f"{name}\n\n{markdown(name, args.root)}")
        return 0
    command = "python -m benchmarks.thor.tables"
    return write_places(PAGES, filled, check=args.check, command=command)


def filled(text: str) -> str:
    """The text with every place filled anew."""

    def content(place: re.Match[str]) -> str:
        return f"{place[1]}{markdown(place[2], RESULTS, short=bool(place[3]))}{place[4]}"

    return PLACE.sub(content, text)


def markdown(name: str, root: Path, *, short: bool = False) -> str:
    """A table, how many runs it is made from, and the command."""
    studies = tuple(PLANS) if name == "modes" else ("arms",) if name == "languages" else (name,)
    plans = {study: PLANS[study]() for study in studies}
    found = {study: finished(plan, root / "runs") for study, plan in plans.items()}
    command = f"`{' '.join(['python -m benchmarks.thor.study', *studies[: name != 'modes']])}`"
    keys = {
        r.spec.key for runs in found.values() for seeds in runs.values() for r in seeds.values()
    }
    count = f"{len(keys)} of {planned(plans.values())} runs"
    rows, note = TABLES[name](found, root / "runs") if keys else ([], "")
    if len(rows) < 2:
        return f"Not run yet: {count}. {command}\n"
    rows = [row[:SHORT] for row in rows] if short else rows
    return "\n".join([*lines_of(rows), "", f"{note} {count}. {command}", ""])


def planned(plans: Any) -> int:
    """How many runs studies have together, of which they share some."""
    return len(
        {(_place(plan, a), seed) for plan in plans for a in plan.arms for seed in plan.seeds}
    )


def _place(plan: Plan, arm: Arm) -> str:
    """What tells an arm from all others."""
    (task,), (rate,) = plan.tasks, plan.rates(arm)
    return _told(plan.model, task.name, task.data, arm.method, plan.settings_of(arm, rate))


def _told(
    model: str, task: str, data: Mapping[str, Any], method: MethodSpec, settings: FinetuneSettings
) -> str:
    told = [model, task, data, method.name, method.config, settings.to_dict()]
    return json.dumps(plain(told), sort_keys=True)


def finished(plan: Plan, runs: Path) -> Runs:
    """The records of a study, in the order of its arms; arms without any are left out."""
    found: Runs = {arm.label or "": {} for arm in plan.arms}
    labels = {_place(plan, arm): arm.label or "" for arm in plan.arms}
    for record in read_records(runs):
        spec = record.spec
        told = _told(spec.model, spec.task, spec.data, spec.method, spec.settings)
        label = labels.get(told)
        if label is not None and spec.seed in plan.seeds:
            found[label][spec.seed] = record
    return {label: seeds for label, seeds in found.items() if seeds}


def score(record: RunRecord, metric: str) -> float:
    """The mean over the languages of a run, each counting once."""
    names = record.spec.train_domains
    return sum(float(record.scores[name][metric]) for name in names) / len(names)


def comparison(found: Mapping[str, Runs], runs: Path) -> tuple[Rows, str]:
    """All arms of a study, over all languages and on the hard rows of their tests."""
    (study,) = found.values()
    records = [record for seeds in study.values() for record in seeds.values()]
    hard = all(f"{HARD}_loss" in r.scores[n] for r in records for n in r.spec.train_domains)
    rows = [["method", "updates", "loss per token", "difference", "chrF", "difference"]]
    rows[0] += ["BLEU", "BLEU, 4 beams", *["loss, hard rows", "chrF, hard rows"] * hard]
    for label, seeds in study.items():
        row = [label, f"{next(iter(seeds.values())).spec.settings.max_steps:,}"]
        for metric, digits in (("loss", 3), ("chrf", 1)):
            values, base = (_scores(each, metric) for each in (seeds, study.get(DENSE, {})))
            row.append(spread(values, digits=digits))
            row.append("" if label == DENSE else difference(values, base, digits=digits))
        row += [spread(_scores(seeds, name), digits=1) for name in ("bleu", "beam_bleu")]
        for metric, digits in (("loss", 3), ("chrf", 1)) if hard else ():
            row.append(spread(_scores(seeds, f"{HARD}_{metric}"), digits=digits))
        rows.append(row)
    count = max(map(len, study.values()))
    ends = "one seed"
    if count > 1:
        ends = f"mean ± standard deviation over {count} seeds"
        ends += ", paired difference with its 95 % interval"
    return rows, (
        "Means over the tests of all languages, each counting once; the loss in nats, lower is "
        f"better; BLEU and chrF by sacreBLEU, of greedy search where nothing else is said; {ends}. "
        "THOR is used with the mean of its experts."
    )


def _scores(seeds: Mapping[int, RunRecord], metric: str) -> dict[int, float]:
    return {seed: score(record, metric) for seed, record in seeds.items()}


def languages(found: Mapping[str, Runs], runs: Path) -> tuple[Rows, str]:
    """Loss and chrF of all arms by language."""
    study = found["arms"]
    names = next(iter(next(iter(study.values())).values())).spec.train_domains
    rows = [["method", *names]]
    for label, seeds in study.items():
        cells = []
        for name in names:
            loss, chrf = (
                average({seed: float(r.scores[name][m]) for seed, r in seeds.items()})
                for m in ("loss", "chrf")
            )
            cells.append(f"{number(loss)}, {number(chrf, digits=1)}")
        rows.append([label, *cells])
    return rows, "Loss per token and chrF, one seed."


def modes(found: Mapping[str, Runs], runs: Path) -> tuple[Rows, str]:
    """What experts of THOR are to one another: a column per arm, means over its seeds."""
    columns = [["", "seeds", "processor time of a training step, dense is 1", *MEASURES]]
    for study, arms in found.items():
        for label, seeds in arms.items():
            if study == "arms" and label in found["headline"]:
                continue  # which has more seeds of it
            read = ((r, _modes_of(runs / r.spec.key)) for r in seeds.values())
            each = [_measures(record, measured) for record, measured in read if measured]
            if not each:
                continue
            means = [sum(column) / len(column) for column in zip(*each, strict=True)]
            cells = [
                number(mean, digits=digits)
                for mean, digits in zip(means, MEASURES.values(), strict=True)
            ]
            title = f"{label} (Wesnoth)" if study == "wesnoth" else label
            cost = number(costs()[label.split(";")[0]], digits=2)
            columns.append([title, str(len(each)), cost, *cells])
    rows = [list(row) for row in zip(*columns, strict=True)] if len(columns) > 1 else []
    return rows, (
        "Losses are over the tokens of all tests together, chrF is a mean over languages, and both "
        "are means over seeds."
    )


MEASURES = {
    "loss of one expert used everywhere, mean": 3,
    "worst minus best": 3,
    "loss of the mean of the weights": 3,
    "loss of the ensemble, a pass for each expert": 3,
    "gain of the ensemble over one expert": 4,
    "what the mean of the weights loses to it": 4,
    "chrF of one expert, mean": 1,
    "best minus worst": 1,
    "chrF of the mean of the weights": 1,
    "chrF of the ensemble": 1,
    "half the symmetric KL divergence between experts, nats per token": 4,
    "cosine between the weights of two experts": 3,
}
"""What `_measures` returns, and its digits."""


def _measures(record: RunRecord, modes: Mapping[str, Any]) -> tuple[float, ...]:
    report, losses = modes["report"], modes["report"]["losses"]
    fixed = [loss for mode, loss in losses.items() if mode.startswith("fixed:")]
    chrf = {
        mode: sum(scores["chrf"] for scores in by_language.values()) / len(by_language)
        for mode, by_language in modes["languages"].items()
    }
    single = [value for mode, value in chrf.items() if mode.startswith("fixed:")]
    similarity = report["similarity"].values()
    return (
        sum(fixed) / len(fixed),
        report["spread"],
        losses["average"],
        losses["ensemble_prob"],
        report["ensemble_gain"],
        report["collapse_gap"],
        sum(single) / len(single),
        max(single) - min(single),
        score(record, "chrf"),
        chrf["ensemble_prob"],
        report["disagreement"],
        sum(similarity) / len(similarity),
    )


def _modes_of(run: Path) -> dict[str, Any] | None:
    path = run / RECORD
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


TABLES: dict[str, Callable[[Mapping[str, Runs], Path], tuple[Rows, str]]] = {
    **dict.fromkeys(PLANS, comparison),
    "languages": languages,
    "modes": modes,
}


if __name__ == "__main__":
    sys.exit(main())
