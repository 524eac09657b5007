"""`moduli compare`: methods times seeds on one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Training, parse_method, parse_with_method


@dataclass(frozen=True, kw_only=True)
class Compare(Training):
    """Methods times seeds on one task: a table with paired intervals, and a report.

    Methods come last, each with its own settings, with a + between them. The first is what the
    others are compared with: moduli compare [options] dense + emoe --num-experts 64 + emoe

    Finished runs are kept under --root and never repeated; after Ctrl-C or a crash the same
    command goes on where it was. Add seeds or methods later: only the new runs are done.

    examples:
      moduli compare --model minilm --data sentiment --train-domain amazon dense + emoe
      moduli compare --model minilm --data csv:r.csv --seeds 0 1 2 3 4 dense + emoe --top-k 8
    """

    root: Path = Path("runs/compare")
    """Directory of the study: one directory per run, and report.html."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed. Three give a wide interval; five or more are better."""
    keep_models: bool = False
    """Keep the tuned models with their runs."""
    retry_failed: bool = False
    """Try again what failed before."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    first, *others = _split(argv)
    args, method = parse_with_method("compare", Compare, first)
    methods = [method, *(parse_method("compare", chunk) for chunk in others)]
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output
    from moduli.cli.tables import difference_table, mean_table
    from moduli.data import load_task
    from moduli.study.compare import compare
    from moduli.study.report import summary_dict, write_report
    from moduli.study.spec import MethodSpec, Plan
    from moduli.study.table import tabulate
    from moduli.study.wording import headline

    output = Output(args.json)
    task = load_task(args.data, on_event=output.note, **args.data_options())
    for note in task.notes:
        output.note(note)
    plan = Plan(
        model=args.model,
        task=args.data,
        data=args.data_options(),
        train_domain=args.train_domain,
        methods=tuple(MethodSpec.of(method) for method in methods),
        seeds=args.seeds,
        settings=args.settings,
    )
    with StudyProgress(output.log, runs=len(methods) * len(args.seeds)) as progress:
        study = compare(
            plan,
            task,
            args.root,
            keep_models=tuple({type(m).name for m in methods}) if args.keep_models else (),
            retry_failed=args.retry_failed,
            checkpoint_every=args.checkpoint_every,
            on_event=progress.show,
        )
    if not study.records:
        output.note("no run finished; --retry-failed tries again")
        return 1
    report = args.root / "report.html"
    write_report(study, report, command=["moduli", "compare", *argv])
    output.data({"report": str(report), **summary_dict(study)})
    result = tabulate(study)
    metric = result.metric
    unit = " in %" if metric.share else "" if metric.higher_is_better else " (lower is better)"
    output.text(f"{metric.title}{unit}, mean and standard deviation over seeds")
    output.text(mean_table(result), "")
    if len(result.rows) > 1:
        points = ", in points" if metric.share else ""
        output.text(f"difference to {result.rows[0].label}{points}, paired by seed")
        output.text(difference_table(result), "")
    output.text(*headline(result), "")
    output.text(f"report: {report}")
    for failure in study.failures:
        name = f"{failure.spec.method.name}, seed {failure.spec.seed}"
        output.note(f"failed: {name}: {failure.message} (--retry-failed tries again)")
    return 1 if study.failures else 0


def _split(argv: Sequence[str]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    for word in argv:
        if word == "+":
            chunks.append([])
        else:
            chunks[-1].append(word)
    return chunks
