"""`moduli compose`: several fine-tunes of one base as one MoE checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from moduli.cli.options import Common, parse
from moduli.surgery.compose.recipe import GateMode, Others, Vocab
from moduli.surgery.stock import StockRule

Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class Compose(Common):
    """Make one MoE checkpoint of several fine-tunes of one base model.

    Each fine-tune gives the FFNs of one expert. The result is a stock class of transformers
    (Mixtral, Qwen2-MoE, Qwen3-MoE, FlexOlmo) and loads without moduli. Look first with --dry-run.

    examples:
      moduli compose --base base --expert coder --prompts "def f(x):" "import os" \\
          --expert writer --prompts "Once upon a time" --out runs/both
      moduli compose --recipe mergekit.yaml --out runs/both
    """

    base: str | None = None
    """The model all experts are fine-tunes of: a directory, or a name that `moduli fetch` knows."""
    expert: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A fine-tune; give the option once per expert."""
    prompts: Texts = ()
    """Texts that should go to an expert; once per --expert, in the same order."""
    negative_prompts: Texts = ()
    """Texts that should not; once per --expert, in the same order."""
    shared: str | None = None
    """A fine-tune whose FFNs run for every token; the result is then a Qwen2-MoE."""
    recipe: Path | None = None
    """Read everything from a YAML or JSON file, in the keys of mergekit-moe; options given here
    replace what it says."""
    out: Path | None = None
    """Directory to write."""
    dry_run: bool = False
    """Write nothing; show every tensor of the result, its shape and where it would come from."""
    top_k: int | None = None
    """Experts per token. Default: 2."""
    gate: GateMode | None = None
    """How routers start: from the base's hidden states on the prompts (hidden, hidden_last: last
    token; hidden_avg: average; hidden_avg_padded: with padding, as mergekit-moe; ffn_input: what
    the router will see), cheap_embed (token embeddings), random or uniform_random. Default:
    hidden."""
    gate_dtype: str | None = None
    """In which the base reads the prompts. Default: float32."""
    others: Others | None = None
    """Attention, norms and embeddings: of the base, or the average of the experts' sources.
    Default: base."""
    vocab: Vocab | None = None
    """Sources with another vocabulary: refused (same), or allowed, rows averaged over those that
    have them (pad) or with zeros for the others (zero_pad). Default: same."""
    rule: StockRule | None = None
    """Weights of the chosen experts: summing to 1, or their softmax over all. Default:
    renormalised."""
    target: str | None = None
    """Model type of the result (mixtral, qwen2_moe, ...). Default: the one that fits."""
    dtype: str | None = None
    """Of the weights written. Default: that of the base."""
    seed: int | None = None
    """Of random gates and noise. Default: 0."""
    force: bool = False
    """Compose equal sources or equal prompts all the same."""
    warm_up: Path | None = None
    """Then train the routers, and nothing else, on the text of this file."""
    warm_up_steps: int = 100
    """Steps of that training."""
    device: str = "cpu"
    """On which the base reads the prompts."""
    max_shard_size: str = "5GB"
    """Of a weight file."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("compose", Compose, argv)
    from moduli.cli.output import Output
    from moduli.errors import ConfigError
    from moduli.surgery.compose import compose_recipe, plan
    from moduli.surgery.files import check_target

    output = Output(args.json)
    if not args.dry_run:
        if args.out is None:
            raise ConfigError("Say where to write with --out DIR, or only look with --dry-run.")
        check_target(args.out)
    recipe = _recipe(args, output.note)
    if args.dry_run:
        layout = plan(recipe)
        output.data(layout.to_dict())
        output.text(str(layout))
        return 0
    assert args.out is not None
    texts = None if args.warm_up is None else _paragraphs(args.warm_up)
    report = compose_recipe(
        recipe,
        args.out,
        device=args.device,
        max_shard_size=args.max_shard_size,
        on_event=output.note,
    )
    losses: tuple[float, ...] = ()
    if texts is not None:
        from moduli.training.router_warmup import warm_up_checkpoint

        output.note(f"training the routers for {args.warm_up_steps} steps")
        losses = warm_up_checkpoint(args.out, texts, steps=args.warm_up_steps).losses
    output.data(report.to_dict() | {"warm_up_losses": losses})
    output.text(str(report))
    if losses:
        output.text(f"routers trained: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return 0


def _paragraphs(path: Path) -> list[str]:
    from moduli.errors import DataError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    return [part for part in text.split("\n\n") if part.strip()]


def _recipe(args: Compose, note: Any) -> Any:
    from moduli.data import resolve_model
    from moduli.errors import ConfigError
    from moduli.surgery.compose import Recipe, Source, read_recipe

    def resolve(name: str) -> str:
        return resolve_model(name, on_event=note)

    names = {f.name for f in fields(Recipe)} - {"base", "experts", "shared"}
    given = {n: getattr(args, n) for n in names if getattr(args, n) not in (None, False)}
    if args.recipe is not None:
        if args.base or args.expert or args.prompts or args.negative_prompts or args.shared:
            raise ConfigError("--recipe names base, experts and prompts; leave those options out.")
        return read_recipe(args.recipe, resolve, **given)
    if args.base is None or not args.expert:
        raise ConfigError("Give --base and at least two --expert, or a --recipe.")
    for name in ("prompts", "negative_prompts"):
        if getattr(args, name) and len(getattr(args, name)) != len(args.expert):
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} is given {len(getattr(args, name))} times for {len(args.expert)} "
                "experts; give it once per --expert."
            )
    none: tuple[tuple[str, ...], ...] = ((),) * len(args.expert)
    experts = tuple(
        Source(model=resolve(model), positive_prompts=positive, negative_prompts=negative)
        for model, positive, negative in zip(
            args.expert, args.prompts or none, args.negative_prompts or none, strict=True
        )
    )
    shared = None if args.shared is None else Source(model=resolve(args.shared))
    return Recipe(base=resolve(args.base), experts=experts, shared=shared, **given)
