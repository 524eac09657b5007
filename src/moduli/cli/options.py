"""What commands share: options, methods as typed subcommands, and parsing with tyro."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, TypeVar, Union

import tyro

from moduli.data.task import DataOptions
from moduli.errors import UnknownNameError, nearest
from moduli.training.settings import FinetuneSettings
from moduli.training.translator import SETTINGS as FROM_SCRATCH
from moduli.training.translator import size_of

Settings = tyro.conf.OmitArgPrefixes[FinetuneSettings]
Args = TypeVar("Args")

CONFIG = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    json: bool = False
    """Print the result as one JSON document on stdout; everything else goes to stderr."""


@dataclass(frozen=True, kw_only=True)
class Data(Common):
    """Options of commands that read a task."""

    data: str
    """The task: sentiment, emoji, brown, brown-pos, debian-descriptions, debian-sentences or
    wesnoth; csv:PATH, jsonl:PATH, parquet:PATH; or a name that datasets.load_dataset knows."""
    kind: str | None = None
    """What is to be learnt: classification, multilabel, regression, token-classification,
    language-modeling, seq2seq, translation, image-classification or audio-classification. Default:
    what the columns of the file say."""
    domains: tuple[str, ...] = ()
    """Keep these domains only, in this order."""
    max_train: int | None = None
    """At most so many rows per domain to train on."""
    max_validation: int | None = None
    """At most so many rows per domain to choose a model by."""
    max_test: int | None = None
    """At most so many rows per domain to test on."""
    text_column: str = "text"
    """Own files: the column with the text."""
    text_pair_column: str | None = None
    """Own files: the column with a second text, for tasks on pairs."""
    label_column: str = "label"
    """Own files: the column with the class, the labels or the number."""
    tokens_column: str = "tokens"
    """Own files: the column with the words of a sentence."""
    tags_column: str = "tags"
    """Own files: the column with a tag for every word."""
    source_column: str = "source"
    """Own files: the column with the text to start from."""
    target_column: str = "target"
    """Own files: the column with the text to arrive at."""
    image_column: str = "image"
    """Own files: the column with images, as paths or bytes."""
    audio_column: str = "audio"
    """Own files: the column with sounds, as paths or bytes of wav files."""
    domain_column: str | None = None
    """Own files: the column that says which domain a row is from."""
    group_column: str | None = None
    """Own files: the column that says which document a row is from; none crosses splits."""
    validation_size: float = 0.1
    """Own files: share of rows to choose a model by."""
    test_size: float = 0.2
    """Own files: share of rows to test on."""
    split_seed: int = 1234
    """Seed of the split."""
    drop_empty: bool = False
    """Leave out rows without text or label instead of refusing the data."""

    def data_options(self) -> dict[str, Any]:
        """The options that were changed, for `load_task` and a run's spec."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(DataOptions)}
        given |= {"domains": self.domains or None, "seed": self.split_seed}
        default = DataOptions()
        return {name: v for name, v in given.items() if v != getattr(default, name)}


@dataclass(frozen=True, kw_only=True)
class Training(Data):
    """Options of commands that train."""

    model: str
    """The pretrained model: a name that `moduli fetch` knows (minilm), a directory, or a
    Hugging Face name; or translator:tiny, translator:small or translator:base, which begin with
    random weights, learn a tokenizer from the training rows, and are trained as suits that."""
    settings: Settings = field(default_factory=FinetuneSettings)
    checkpoint_every: int | None = None
    """Steps between checkpoints from which an interrupted run goes on. Default: one per epoch."""


def groups_of(words: Sequence[str]) -> tuple[tuple[str, ...], ...] | str:
    """Groups of domains to train on: "each", "leave-one-out", or a word with commas for each."""
    if len(words) == 1 and words[0] in ("each", "leave-one-out"):
        return words[0]
    return tuple(tuple(name.strip() for name in word.split(",")) for word in words)


def parse(command: str, kind: type[Args], argv: Sequence[str]) -> Args:
    """The arguments of a command as an instance of its dataclass.

    Its docstring is the help text. On a usage error or --help tyro prints and exits.
    """
    return tyro.cli(kind, prog=f"moduli {command}", args=list(argv), config=CONFIG)


def parse_with_method(command: str, kind: type[Args], argv: Sequence[str]) -> tuple[Args, Any]:
    """As `parse`, with a method and its settings as the last, typed subcommand.

    Raises:
        UnknownNameError: there is no method of the name that was given.
    """
    _check_method_name(command, kind, argv)
    fields: list[Any] = [("method", _methods())]
    if issubclass(kind, Training) and _begins_with_random_weights(argv):
        fields.append(("settings", Settings, field(default_factory=lambda: FROM_SCRATCH)))
    made = dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True
    )
    made.__doc__ = kind.__doc__
    parsed: Any = tyro.cli(made, prog=f"moduli {command}", args=list(argv), config=CONFIG)
    return parsed, parsed.method


def _begins_with_random_weights(argv: Sequence[str]) -> bool:
    """Whether `--model` names a model without weights, which has other usual settings."""
    words = [part for word in argv for part in word.split("=", 1)]
    return any(a == "--model" and size_of(b) is not None for a, b in pairwise(words))


def _methods() -> Any:
    from moduli.methods.registry import get_method, method_names

    kinds = [
        Annotated[cls, tyro.conf.subcommand(cls.name, description=cls.summary)]
        for cls in map(get_method, method_names())
    ]
    # A union of one is no union, and tyro would make no subcommand of it.
    union: Any = Union[tuple(kinds)] if len(kinds) > 1 else kinds[0]  # noqa: UP007
    return union


def _check_method_name(command: str, kind: type[Any], argv: Sequence[str]) -> None:
    """tyro reports an unknown subcommand as an unrecognised option; we know better."""
    from moduli.methods.registry import method_names

    names = method_names()
    if any(word in names or word in ("-h", "--help") for word in argv):
        return
    try:
        _, unknown = tyro.cli(
            kind,
            prog=f"moduli {command}",
            args=list(argv),
            config=CONFIG,
            return_unknown_args=True,
            console_outputs=False,
        )
    except SystemExit:
        return  # another error comes first; the full parser reports it
    word = next((word for word in unknown if not word.startswith("-")), None)
    if word is not None and word == unknown[0]:
        raise UnknownNameError(f"There is no method {word!r}. {nearest(word, names)}")
