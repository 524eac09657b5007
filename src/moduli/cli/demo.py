"""`moduli demo`: the main job, end to end, on a real model and real data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduli.cli.options import Common, parse


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job on a real pretrained encoder (MiniLM) and real sentences, in a few minutes.

    Fine-tunes on product reviews, dense against EMoE, and tests there and on three other
    domains; prints means, spreads and paired differences; writes a report; hands back the best
    EMoE model (by validation) as an ordinary checkpoint and checks it in a new process that has
    no moduli. What is finished is kept: after Ctrl-C the same command goes on where it was.
    """

    root: Path = Path("runs/demo")
    """Directory of the demo."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pair of runs for each."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("demo", Demo, argv)
    from moduli.cli.live import StudyProgress
    from moduli.cli.output import Output
    from moduli.cli.tables import accuracy_table, difference_table, mean_table
    from moduli.data import load_task, resolve_model
    from moduli.study.compare import collect
    from moduli.study.demo import demo_plan, run_demo
    from moduli.study.report import summary_dict
    from moduli.study.table import tabulate
    from moduli.study.wording import headline, percent

    output = Output(args.json)
    plan = demo_plan(args.seeds)
    resolve_model(plan.model, on_event=output.note)
    (named,) = plan.tasks
    task = load_task(named.name, on_event=output.note, **named.data)
    dense, emoe = (one.method for one in plan.arms)
    output.text(
        f"MiniLM fine-tuned on {named.data['max_train']} {plan.sources[0][0]} sentences, "
        f"{plan.settings.epochs} epochs, seeds {' '.join(map(str, plan.seeds))}",
        f"{dense.name}: every neuron for every token",
        f"{emoe.name}: in the last two layers {emoe.config['num_experts']} experts, "
        f"{emoe.config['top_k']} of them per token",
        "",
    )
    with StudyProgress(output.log, collect(plan, [task], args.root)) as progress:
        done = run_demo(
            plan,
            task,
            args.root,
            command=["moduli", "demo", *argv],
            on_event=progress.show,
            on_line=progress.say,
        )
    back = done.handed_back
    output.data(
        {
            "report": str(done.report),
            "hand_back": vars(back),
            **summary_dict(done.study),
        }
    )
    result = tabulate(done.study)
    output.text("", "accuracy in %, mean ± standard deviation over seeds")
    output.text(mean_table(result), "")
    output.text(f"difference to {dense.name} in points, paired by seed")
    output.text(difference_table(result), "", *headline(result), "")
    validation = done.chosen.validation[done.chosen.spec.trained_on]
    output.text(
        f"Handed back: {back.directory}, an ordinary checkpoint "
        f"({emoe.name} seed {done.chosen.spec.seed}, merged; best on validation, "
        f"{percent(validation['accuracy'])} %).",
        f"Loaded by plain transformers in a new process without moduli: logits of {back.texts} "
        f"texts {'equal' if back.identical else 'DIFFER from'} the merged model's"
        f"{', bit for bit' if back.identical else ''}.",
        f"Merging changed {back.changed} of {back.texts} predictions of the routed model:",
        "",
        accuracy_table({"routed": back.routed, "merged": back.merged}),
        "",
        f"Report: {done.report}",
    )
    for failure in done.study.failures:
        output.note(
            f"failed: {failure.spec.method.name}, seed {failure.spec.seed}: {failure.message}"
        )
    return 0 if back.identical and not done.study.failures else 1
