"""`moduli compare`: methods times learning rates times sources times seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moduli.cli.options import Training, groups_of, parse_with_method
from moduli.errors import ConfigError

if TYPE_CHECKING:
    from moduli.study.plan import Arm


@dataclass(frozen=True, kw_only=True)
class Compare(Training):
    """Methods times seeds on a task or more: a table with paired intervals, and a report.

    Methods come last, each with its own settings, with a + between them. The first is what the
    others are compared with: moduli compare [options] dense + emoe --num-experts 64 + emoe
    What a method is to have for itself goes before its name, after the +: what it trains
    (--trains lora, head or last:2), its learning rates, its --label.

    Finished runs are kept under --root and never repeated; after Ctrl-C or a crash the same
    command goes on where it was. Add seeds or methods later: only the new runs are done. The same
    command started twice shares the work.

    examples:
      moduli compare --model minilm --data sentiment --train-domain amazon dense + emoe
      moduli compare --model minilm --data sentiment --train-domain each --seeds 0 1 2 3 4 \\
        dense + --trains head dense + --trains lora --learning-rate 5e-4 dense + emoe --top-k 8
    """

    root: Path = Path("runs/compare")
    """Directory of the study: one directory per run, and report.html."""
    train_domain: tuple[str, ...] = ()
    """The domain to train on; several are trained on in turn (each: every one in turn), those
    with a comma between them together (leave-one-out: all but one, in turn). The others are only
    tested on. Default: the first one; of translations all languages together."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed. Three give a wide interval; five or more are better."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to try for every method; one is chosen by --select. Default:
    --learning-rate."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training rows, for the curve of data efficiency."""
    select: str = "training-domain"
    """How a learning rate is chosen: training-domain (validation rows of the domains trained on),
    leave-one-domain-out (of the other domains but the tested one) or oracle (of the tested one;
    marked as such)."""
    more_data: tuple[str, ...] = ()
    """More tasks of the same kind, read with the same options; scores are averaged over tasks."""
    baselines: bool = False
    """Also compare with a frozen probe and LoRA, at ten times the learning rate, and with the last
    two blocks trained only."""
    pruned: bool = False
    """Test split models also with the experts most used in training for every token: static
    pruning."""
    cross: bool = False
    """Test models tuned without experts also split by the first splitting method that trains the
    same."""
    keep_models: bool = False
    """Keep the tuned models with their runs."""
    retry_failed: bool = False
    """Try again what failed before."""
    report_only: bool = False
    """Run nothing; table and report of what is finished."""


@dataclass(frozen=True, kw_only=True)
class ArmOptions:
    """A method, and what it is to have for itself."""

    trains: str | None = None
    """What is trained: all, head, last:N (blocks, and the head) or lora (and the head)."""
    learning_rate: tuple[float, ...] = ()
    """Its learning rate, or several to choose from."""
    epochs: int | None = None
    """Passes over the training data."""
    lora_rank: int | None = None
    """Rank of the factors."""
    lora_alpha: int | None = None
    """Scale of the factors, over the rank."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the projections that get factors."""
    label: str | None = None
    """What it is called in tables."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    first, *others = _split(argv)
    args, method = parse_with_method("compare", Compare, first)
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output
    from moduli.cli.tables import difference_table, mean_table
    from moduli.data import load_task
    from moduli.study.compare import collect, compare
    from moduli.study.estimate import estimate
    from moduli.study.evidence import run_label
    from moduli.study.plan import Plan, TaskSpec, also_tested, arm, baselines
    from moduli.study.report import summary_dict, write_report
    from moduli.study.table import check_rule, tabulate
    from moduli.study.wording import headline

    output = Output(args.json)
    arms = (arm(method), *(_arm(chunk) for chunk in others))
    if args.baselines:
        arms = (*arms, *baselines(args.settings, args.learning_rates))
    named = tuple(TaskSpec(name, args.data_options()) for name in (args.data, *args.more_data))
    tasks = [load_task(task.name, on_event=output.note, **task.data) for task in named]
    for note in (note for task in tasks for note in task.notes):
        output.note(note)
    plan = Plan(
        model=args.model,
        tasks=named,
        sources=groups_of(args.train_domain),
        arms=also_tested(arms, pruned=args.pruned, cross=args.cross, usual=args.settings.trains),
        seeds=args.seeds,
        settings=args.settings,
        learning_rates=args.learning_rates,
        fractions=args.fractions,
    )
    study = collect(plan, tasks, args.root)
    check_rule(study, tasks, args.select)
    if not args.report_only:
        output.note(estimate(study, tasks, retry_failed=args.retry_failed).sentence)
        with StudyProgress(output.log, study) as progress:
            study = compare(
                plan,
                tasks,
                args.root,
                keep_models=tuple({a.method.name for a in arms}) if args.keep_models else (),
                retry_failed=args.retry_failed,
                checkpoint_every=args.checkpoint_every,
                on_event=progress.show,
            )
    if not study.records:
        if args.report_only:
            raise ConfigError(f"{args.root} has no finished run of this study.")
        output.note("no run finished; --retry-failed tries again")
        return 1
    report = args.root / "report.html"
    command = ["moduli", "compare", *argv]
    write_report(study, report, root=args.root, rule=args.select, command=command)
    output.data({"report": str(report), **summary_dict(study, rule=args.select)})
    result = tabulate(study, rule=args.select)
    metric = result.metric
    unit = " in %" if metric.share else "" if metric.higher_is_better else " (lower is better)"
    output.text(f"{metric.title}{unit}, mean and standard deviation over seeds")
    output.text(mean_table(result), "")
    if len(result.rows) > 1:
        points = ", in points" if metric.share else ""
        output.text(f"difference to {result.rows[0].label}{points}, paired by seed")
        output.text(difference_table(result), "")
    if result.choice.rule.marked and any(len(g.rates) > 1 for g in result.choice.groups.values()):
        output.text(f"learning rates chosen by the {result.choice.rule.label}")
    output.text(*headline(result), "")
    output.text(f"report: {report}")
    for failure in study.failures:
        name = run_label(study, failure.spec)
        output.note(f"failed: {name}: {failure.message} (--retry-failed tries again)")
    return 1 if study.failures else 0


def _arm(argv: Sequence[str]) -> Arm:
    """The second and later methods."""
    options, method = parse_with_method("compare ... +", ArmOptions, argv)
    from moduli.study.plan import arm

    fields = dataclasses.fields(ArmOptions)
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields}
    return arm(method, **{name: value for name, value in given.items() if value not in (None, ())})


def _split(argv: Sequence[str]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    for word in argv:
        if word == "+":
            chunks.append([])
        else:
            chunks[-1].append(word)
    return chunks
