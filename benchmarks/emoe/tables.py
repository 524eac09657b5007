"""Put the tables of the studies into the README and the pages that quote them.

    python benchmarks/emoe/tables.py            writes what is between the markers
    python benchmarks/emoe/tables.py --check    exits 1 if something there is not up to date

A place is `<!-- emoe:NAME -->` ... `<!-- /emoe -->`; its content is made from
benchmarks/results/emoe/NAME.json, which study.py writes. `<!-- emoe:NAME short -->` leaves out
models that were edited before the test, and costs; `<!-- emoe:NAME tried -->` lists every setting
of a search with every learning rate.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this file is run as a script

from benchmarks.shared.tables import check_option, write_places  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "emoe"
PAGES = ("README.md", "docs/methods/emoe.md", "docs/evidence.md")
PLACE = re.compile(r"(<!-- emoe:([\w-]+)( short| tried)? -->\n).*?(<!-- /emoe -->)", re.DOTALL)


def main() -> int:
    """Run the command."""
    check = check_option(__doc__.splitlines()[0]).parse_args().check
    return write_places(PAGES, filled, check=check, command="python benchmarks/emoe/tables.py")


def filled(text: str) -> str:
    """The text with every place filled anew."""

    def content(place: re.Match[str]) -> str:
        summary = json.loads((RESULTS / f"{place[2]}.json").read_text(encoding="utf-8"))
        if place[3] == " tried":
            table = settings_tried(place[2], summary)
        else:
            table = markdown(place[2], summary, short=place[3] == " short")
        return f"{place[1]}{table}{place[4]}"

    return PLACE.sub(content, text)


def markdown(name: str, summary: dict[str, Any], *, short: bool = False) -> str:
    """The main table of a study, what it can resolve, and the command."""
    table = summary["tables"][0]
    share = table["share"]
    shown = [c for c in table["rows"][0]["cells"] if c["kind"] != "one domain"]
    places = [table["rows"][0]["cells"].index(c) for c in shown]
    costs = {cost["label"]: cost for cost in summary["costs"]}
    titles = {"in-domain": "in-domain", "out-of-domain": "out of domain"}
    head = ["method", *(titles[c["kind"]] for c in shown)]
    head += [f"difference {titles[c['kind']]}" for c in shown]
    head += [] if short else ["training time"]
    lines = [
        f"| {' | '.join(head)} |",
        f"|---|{'--:|' * (len(head) - 1)}",
    ]
    for row in table["rows"]:
        if short and row["edit"]:
            continue
        cells = [row["cells"][place] for place in places]
        means = [mean(c, share) for c in cells]
        differences = [difference(c["difference"], share) for c in cells]
        ratio = costs.get(row["label"], {}).get("time")
        time = "" if ratio is None or row["edit"] else f"{ratio:.2f}"
        each = [row["label"], *means, *differences, *([] if short else [time])]
        lines.append(f"| {' | '.join(each)} |")
    runs = summary["finished"]
    unit = " in percent, differences in points" if share else ", lower is better"
    base = table["rows"][0]["label"]
    cost = "" if short else f"; training time in processor time over that of {base}"
    lines += [
        "",
        f"{table['title'].capitalize()}{unit}; mean ± standard deviation over seeds, paired "
        f"difference to {base} with its 95 % interval{cost}. {runs} of {summary['planned']} runs. "
        f"{' '.join(summary['power'])} "
        f"`python benchmarks/emoe/study.py {name}`",
        "",
    ]
    return "\n".join(lines)


def settings_tried(name: str, summary: dict[str, Any]) -> str:
    """Every setting of a search, with what it reached on validation rows."""
    main = summary["tables"][0]
    lines = [
        "| setting | learning rate | trained domains | other domains | runs |",
        "|---|--:|--:|--:|--:|",
    ]
    for tried in summary["tried"]:
        cells = [
            "" if tried[place] is None else score(tried[place], main["share"])
            for place in ("inside", "outside")
        ]
        runs = len(tried["runs"])
        lines.append(f"| {tried['label']} | {tried['rate']:g} | {' | '.join(cells)} | {runs} |")
    unit = " in percent" if main["share"] else " (lower is better)"
    lines += [
        "",
        f"{main['title'].capitalize()} on validation rows{unit}; means over runs. "
        f"{summary['finished']} of {summary['planned']} runs. "
        f"`python benchmarks/emoe/study.py {name}`",
        "",
    ]
    return "\n".join(lines)


def mean(cell: dict[str, Any], share: bool) -> str:
    """A mean with its standard deviation, if there is one."""
    spread = "" if cell["sd"] is None else f" ± {score(cell['sd'], share)}"
    return f"{score(cell['mean'], share)}{spread}"


def score(value: float, share: bool) -> str:
    """A share in percent, anything else as it is."""
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


def difference(found: dict[str, Any] | None, share: bool) -> str:
    """A difference with its interval."""
    if found is None:
        return ""

    def signed(value: float) -> str:
        return (f"{100 * value:+.1f}" if share else f"{value:+.3f}").replace("-", "−")

    interval = found["interval_95_paired_t"]
    return signed(found["mean"]) + (
        "" if interval is None else f" ({signed(interval[0])} to {signed(interval[1])})"
    )


if __name__ == "__main__":
    sys.exit(main())
