"""The performance page of the documentation, made from records and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moduli.bench.figures import floor_plot
from moduli.bench.records import Part, Record
from moduli.bench.targets import met
from moduli.bench.wording import Cells, compiled, machine_line, model_table, summary

INTRODUCTION = """\
<!-- Made by benchmarks/page.py from the records in benchmarks/results/bench. -->

# Performance

A layer that uses K of its E experts should cost K/E of the dense layer. That is the *floor* of the
tables below: K/E of the fastest form of the dense layer, in the same process, under the same
settings. For one token the floor is the time of reading the weights of its experts.

## How it is measured

`moduli bench` does it, on your machine and your shapes:

```console
$ moduli bench --quick
$ moduli bench --tokens 4096 --hidden 768 --experts 64 --top-k 8 --mode forward train --details
$ moduli bench --set acceptance --out runs/bench
$ moduli bench --model minilm --task tune
$ moduli bench --model smollm2 --task generate
```

- All candidates run in one process on the same tensors: every kernel of ours, the one that is
  chosen automatically ("auto"), forms of the dense layer, and the experts backends of transformers
  without biases that our experts do not have.
- Each is first checked against the reference, outputs and gradients. Whoever deviates by more than
  rounding gets no number.
- Two runs to warm up, samples of at least 30 ms, five rounds or more in an order that is shuffled
  every round; the tables show medians. One thread is timed by CPU time of the process, more by the
  wall, leaving out samples in which other processes used over a tenth of the interval. A `~` marks
  figures that rest on fewer than three clean samples.
- Everything is measured twice, in processes of their own: *tuned*, where the dense layer and
  transformers' backends get our allocator and float32 settings too, and with *defaults*.
- Only ratios are shown, since times are of one machine; the records hold both.

Columns: *floor*, time over floor; *peer*, times as fast as the best of transformers' backends and
dense (for experts of their own, of the backends), which *best peer* names; *dense*, time over the
fastest dense form; *best*, time over our best kernel when forced; *peak*, share of the rate of a
large matrix product; *saved*, bytes kept for backward beyond weights and tokens over S·e·b (rows,
neurons of an expert, bytes of a number; for gated experts over twice that); *router*, gate and
top-k as a share of the layer. Where there is a target, it stands beside the ratio.
"""

NOTHING = """
## Results

There is no record in this checkout.
`moduli bench --set acceptance --out benchmarks/results/bench` makes one, and
`python benchmarks/page.py` this page.
"""

TITLES = {
    "acceptance": "Shapes with a target",
    "grid": "The automatic choice, over a grid of shapes",
    "families": "Layers of known checkpoints",
    "accelerator": "Shapes for a GPU",
    "quick": "The quick set",
    "layers": "Other layers",
}


def render_page(records: Sequence[Record]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    if not records:
        parts.append(NOTHING)
    parts += [_section(record) for record in sorted(records, key=_order)]
    return "\n".join(parts)


def render_figures(records: Iterable[Record]) -> dict[str, str]:
    """The figures of the page, by file name."""
    found = {}
    for record in records:
        rows = [row for row in record.layers if row.settings == record.layers[0].settings]
        if rows:
            found[figure_name(record)] = floor_plot(rows)
    return found


def figure_name(record: Record) -> str:
    """The file of a record's figure, beside the page."""
    return f"performance-{record.name}.svg"


def _section(record: Record) -> str:
    lines = [f"## {_title(record)}", "", f"Measured on {record.date} by `{record.command}`."]
    reached, of = met(record.layers)
    if of:
        lines[-1] += f" Targets met: {reached} of {of}."
    for part in record.parts:
        lines += ["", *_part(part)]
    if record.layers:
        lines += ["", f"![Time over floor, by shape]({figure_name(record)})"]
    return "\n".join([*lines, ""])


def _part(part: Part) -> list[str]:
    lines = [f"### {_heading(part.machine)}", "", f"{machine_line(part.machine)}."]
    if part.layers:
        lines += ["", *_markdown(*summary(part.layers, wide=True), text=2)]
        columns, body = compiled(part.layers)
        if body:
            lines += ["", "Time over floor with the compiled kernel and without:", ""]
            lines += _markdown(columns, body)
    if part.models:
        lines += ["", *_markdown(*model_table(part.models, rates=False), text=2)]
    return lines


def _heading(machine: Mapping[str, object]) -> str:
    threads = machine["threads"]
    return f"{machine['settings']}, {threads} thread{'' if threads == 1 else 's'}".capitalize()


def _title(record: Record) -> str:
    name, _, device = record.name.partition("-")
    if record.models:
        case = record.models[0].case
        return f"{case.model}: {'tuning' if case.task == 'tune' else 'generation'}"
    return TITLES.get(name, name) + (f" ({device})" if device else "")


def _order(record: Record) -> tuple[int, str]:
    name = record.name.partition("-")[0]
    known = list(TITLES)
    return (known.index(name) if name in known else len(known), record.name)


def _markdown(columns: Cells, body: Sequence[Cells], *, text: int = 1) -> list[str]:
    rule = ["---" if i < text else "--:" for i in range(len(columns))]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *body)]
