"""Whether differences of one seed on several sources go together, from the records of a study.

    python benchmarks/emoe/pairs.py text
    python benchmarks/emoe/pairs.py vision --base LoRA

The intervals of a study count every (source, seed) as a pair of its own. This prints, for every arm
and edit against the first arm (or another one), its mean out-of-domain difference with that
interval, the interval when seeds alone are counted, and the mean correlation between sources.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from plans import PLANS

from moduli.study.records import read_records
from moduli.study.statistics import paired_difference, summarise

RESULTS = Path(__file__).parents[1] / "results" / "emoe"
Scores = dict[tuple[str, int], float]
"""By source and seed."""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(PLANS))
    parser.add_argument("--base", help="label of the arm to compare with")
    args = parser.parse_args()
    study, plan = args.study, PLANS[args.study]()
    base = args.base or plan.labels[0]
    if base not in plan.labels:
        parser.error(f"the arms of {study} are {', '.join(plan.labels)}")
    scores: dict[str, Scores] = {}
    for record in read_records(RESULTS / study):
        spec = record.to_dict()["spec"]
        same = [
            label
            for label, one in zip(plan.labels, plan.arms, strict=True)
            if one.method == record.spec.method
            and one.trains(plan.settings.trains) == record.spec.settings.trains
        ]
        place = (",".join(spec["train_domains"]), record.spec.seed)
        for name, found in {"": record.to_dict(), **record.to_dict()["variants"]}.items():
            label = f"{same[0]} ({name})" if name else same[0]
            scores.setdefault(label, {})[place] = elsewhere(found["scores"], spec["train_domains"])
    for label, found in scores.items():
        if label != base:
            print(line(label, found, scores[base]))


def elsewhere(scores: dict[str, Any], sources: list[str]) -> float:
    """Mean accuracy in percent over the domains that were not trained on."""
    return float(np.mean([100 * s["accuracy"] for d, s in scores.items() if d not in sources]))


def line(
    label: str, found: dict[tuple[str, int], float], base: dict[tuple[str, int], float]
) -> str:
    """One arm against the baseline."""
    sources = sorted({source for source, _ in base})
    seeds = sorted({seed for _, seed in base})
    each = np.array([[found[a, s] - base[a, s] for s in seeds] for a in sources])
    together = np.corrcoef(each)
    pairs = [together[i, j] for i, j in combinations(range(len(sources)), 2)]
    seen = paired_difference(found, base)
    alone = summarise(each.mean(axis=0).tolist())
    assert seen is not None  # both have the runs of the same plan
    return (
        f"{label:30} {seen.mean:+.2f}, by pairs {interval(seen.interval)}, "
        f"by seeds {interval(alone.interval)}, correlation {np.mean(pairs):+.2f}"
    )


def interval(found: tuple[float, float] | None) -> str:
    """A 95 % interval."""
    return "none" if found is None else f"{found[0]:+.2f} to {found[1]:+.2f}"


if __name__ == "__main__":
    main()
