"""Put the tables on ModuleFormer's claims into the page that quotes them.

    python benchmarks/moduleformer/tables.py            writes what is between the markers
    python benchmarks/moduleformer/tables.py --check    exits 1 if something there is not up to date

A place is `<!-- moduleformer:CLAIM -->` ... `<!-- /moduleformer -->`; its content is made from the
records in benchmarks/results/moduleformer/CLAIM/, which study.py writes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this file is run as a script

from benchmarks.shared.tables import (  # noqa: E402
    average,
    check_option,
    difference,
    lines_of,
    spread,
    write_places,
)

RESULTS = ROOT / "benchmarks" / "results" / "moduleformer"
PAGES = ("docs/methods/moduleformer.md",)
PLACE = re.compile(r"(<!-- moduleformer:([\w-]+) -->\n).*?(<!-- /moduleformer -->)", re.DOTALL)

Records = dict[str, dict[int, dict[str, Any]]]
"""By arm, in the order of the plan, and seed."""


def main() -> int:
    """Run the command."""
    parser = check_option(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=RESULTS, help="print the tables of these")
    args = parser.parse_args()
    if args.root != RESULTS:
        for claim in TABLES:
            print(markdown(claim, args.root))
        return 0
    command = "python benchmarks/moduleformer/tables.py"
    return write_places(PAGES, filled, check=args.check, command=command)


def filled(text: str) -> str:
    """The text with every place filled anew."""
    return PLACE.sub(lambda place: f"{place[1]}{markdown(place[2], RESULTS)}{place[3]}", text)


def markdown(claim: str, root: Path) -> str:
    """The table of a claim, and the command."""
    found = read(root / claim)
    command = f"`python benchmarks/moduleformer/study.py {claim}`"
    if not found:
        return f"No run is finished yet; {command} does them.\n"
    rows, note = TABLES[claim](found, root)
    seeds = max(map(len, found.values()))
    ends = "One seed" if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds"
    ends += ", paired difference with its 95 % interval" if seeds > 1 else ""
    return "\n".join([*lines_of(rows), "", f"{note} {ends}. {command}", ""])


def read(directory: Path) -> Records:
    """The records of a claim, arms in the order of the plan."""
    found: Records = {}
    paths = [path for path in directory.glob("*.json") if path.name != "speed.json"]
    for path in sorted(paths):
        data = json.loads(path.read_text(encoding="utf-8"))
        run = data["run"]
        found.setdefault(run["arm"]["label"], {})[run["seed"]] = data["found"]
    return {label: found[label] for label in sorted(found, key=_place(directory.name))}


def efficiency(found: Records, root: Path) -> tuple[list[list[str]], str]:
    """Bits per byte over all genres, parameters, and speeds."""
    path = root / "efficiency" / "speed.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    speed = measured.get("found", {})
    bits = {
        label: {seed: pooled(record["scores"]) for seed, record in runs.items()}
        for label, runs in found.items()
    }
    first, *others = bits
    rows = [["model", "parameters", "active", "bits per byte", "difference", "training", "reading"]]
    for label, values in bits.items():
        one = next(iter(found[label].values()))
        times = [f"{speed[label][k]:.2f}" if speed else "" for k in ("training", "reading")]
        rows.append(
            [
                label,
                f"{one['parameters'] / 1e6:.2f} M",
                f"{one['active_parameters'] / 1e6:.2f} M",
                spread(values),
                "" if label == first else difference(values, bits[first]),
                *times,
            ]
        )
    nearest = min(others, key=lambda name: abs(average(bits[name]) - average(bits[first])))
    return rows, (
        f"Of the dense models the one whose loss is nearest to that of the {first} is: {nearest}. "
        "Active: parameters of the blocks that a token uses. Training and reading: tokens per "
        f"second over those of the {first}{_measured_on(measured)}. Difference: to the {first}; "
        "lower is better."
    )


def _measured_on(speed: Mapping[str, Any]) -> str:
    """The machine of a record of speeds, if there is one."""
    if not speed:
        return ""
    machine, torch = speed["run"]["machine"], speed["run"]["versions"]["torch"]
    numbers = "bfloat16" if speed["run"]["pretraining"]["bf16"] else "float32"
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f", of steps with AdamW in {numbers} and of forward passes in float32, measured on "
        f"{machine['name']} ({threads}, torch {torch})"
    )


def extension(found: Records, root: Path) -> tuple[list[list[str]], str]:
    """Change of bits per byte on the new and the old language."""
    learned = {
        label: {seed: change(record, _learns(label)) for seed, record in runs.items()}
        for label, runs in found.items()
    }
    first = next(iter(found))
    rows = [
        [
            "model", "trained parameters", "new language", "after", "old language",
            f"difference to {first}, new", "old",
        ]
    ]  # fmt: skip
    for label, runs in found.items():
        new, after, old = ({s: v[i] for s, v in learned[label].items()} for i in range(3))
        against = ["", ""]
        if label != first:
            base = learned[first]
            # how well the new language is known after, and how much of the old one was lost
            against = [
                difference(after, {s: v[1] for s, v in base.items()}),
                difference(old, {s: v[2] for s, v in base.items()}),
            ]
        trainable = next(iter(runs.values()))["trainable"]
        cells = [spread(new, signed=True), spread(after), spread(old, signed=True)]
        rows.append([label, f"{trainable / 1e6:.2f} M", *cells, *against])
    return rows, (
        "Bits per byte: change on the new language, its level after, and change on the old one; "
        "lower is better, and more than 0 on the old language is forgetting."
    )


def specialisation(found: Records, root: Path) -> tuple[list[list[str]], str]:
    """Bits per byte on the genre by the share of experts that is kept."""
    first = next(iter(found))
    keeps = list(next(iter(found[first].values()))["kept"])

    def bits(label: str, keep: str, *, elsewhere: bool = False) -> dict[int, float]:
        genre = _learns(label)
        return {
            seed: pooled(
                {
                    name: score
                    for name, score in record["kept"][keep]["scores"].items()
                    if (name == genre) != elsewhere
                }
            )
            for seed, record in found[label].items()
        }

    rows = [
        [
            "tuned with", "experts kept", "bits per byte", f"difference to {first}",
            "other genres", "dropped",
        ]
    ]  # fmt: skip
    for label, runs in found.items():
        for keep in keeps:
            dropped = average({s: record["kept"][keep]["dropped"] for s, record in runs.items()})
            against = "" if label == first else difference(bits(label, keep), bits(first, keep))
            rows.append(
                [
                    label,
                    f"{100 * float(keep):.0f} %",
                    spread(bits(label, keep)),
                    against,
                    spread(bits(label, keep, elsewhere=True)),
                    f"{100 * dropped:.1f} %",
                ]
            )
    return rows, (
        "Bits per byte on held-out text of the genre, and of all others. Dropped: probability of "
        "the experts that are gone, before they went, mean over routers."
    )


TABLES = {"efficiency": efficiency, "extension": extension, "specialisation": specialisation}


def pooled(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Bits per byte over the texts of all domains."""
    nats = math.fsum(s["loss"] * s["n"] for s in scores.values())
    count = math.fsum(
        s["loss"] * s["n"] / math.log(2) / s["bits_per_byte"] for s in scores.values()
    )
    return nats / math.log(2) / count


def change(record: Mapping[str, Any], new: str) -> tuple[float, float, float]:
    """Change of bits per byte on the new language, the level after, and the change on the old."""
    before, after = record["before"], record["kept"]["1.0"]["scores"]
    (old,) = set(after) - {new}
    level = after[new]["bits_per_byte"]
    return (
        level - before[new]["bits_per_byte"],
        level,
        after[old]["bits_per_byte"] - before[old]["bits_per_byte"],
    )


def _arms(claim: str) -> dict[str, Any]:
    import importlib

    plans = importlib.import_module(f"{__package__}.plans" if __package__ else "plans")
    return {arm.label: arm for arm in plans.CLAIMS[claim]}


def _place(claim: str) -> Any:
    order = list(_arms(claim))
    return lambda label: order.index(label)


def _learns(label: str) -> str:
    for claim in ("extension", "specialisation"):
        if label in (arms := _arms(claim)):
            return str(arms[label].learns)
    raise KeyError(label)


if __name__ == "__main__":
    sys.exit(main())
