"""What training and evaluation consume: a task with domains, each split in three.

Every way to name data (`moduli.data.loading`) ends here, so the rest of the library knows one
form: `datasets.Dataset` tables with the columns of the task's kind (`moduli.data.kinds`): for
text classification "text" (str), "label" (int) and, for tasks on pairs, "text_pair" (str).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moduli.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Splits:
    """The three parts of one domain; no document and no text is in two of them.

    Attributes:
        train: None only if the data came as separate files (or splits of a data set) and the one
            for training has no row of this domain: a domain to be tested on.
        validation: None if `validation_size` is 0, or if no row fell to it in a small domain.
        test: None if `test_size` is 0, or if the data came as separate files and the one for
            testing has no row of this domain.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None


@dataclass(frozen=True)
class Task:
    """A named task.

    Attributes:
        name: as it was given to `load_task`.
        kind: what is learnt, a name in `moduli.data.kinds`; it decides the head and the metrics.
        label_names: name of every class, label or tag, in the order of their integers; empty for
            kinds that have none (numbers and texts).
        domains: splits of every domain, in a fixed order; a task without domains has one, "all".
        sources: domains that are trained on together where nobody says otherwise, such as the
            languages of a translator; empty: the first one that has training rows.
        notes: what was left out and why, one sentence each; to be shown to the user.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    domains: dict[str, Splits] = field(repr=False)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataOptions:
    """How to read and split data; the options of `load_task`.

    Attributes:
        kind: what is to be learnt, a name in `moduli.data.kinds`; None: what the columns say.
        text_column: column with the text.
        text_pair_column: column with a second text, for tasks on pairs.
        label_column: column with the class (words or whole numbers), the labels or the number.
        tokens_column, tags_column: columns with the words of a sentence and a tag for each.
        source_column, target_column: columns with a text and what it is to be turned into.
        image_column, audio_column: columns with pictures, or with sound in wav files.
        domain_column: column that says which domain a row is from; without it all are one, "all".
        group_column: column that says which document (author, product, ...) a row is from;
            a document never crosses splits.
        domains: keep these domains only, in this order. Splits do not depend on it.
        max_train, max_validation, max_test: keep at most so many rows per domain: the first ones
            of the shuffled split, so a smaller number keeps a subset of a larger one.
        validation_size, test_size: share of rows, where the data does not come split.
        seed: of the shuffle.
        drop_empty: leave out rows without text or label instead of refusing the data.
    """

    kind: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    source_column: str = "source"
    target_column: str = "target"
    image_column: str = "image"
    audio_column: str = "audio"
    domain_column: str | None = None
    group_column: str | None = None
    domains: tuple[str, ...] | None = None
    max_train: int | None = None
    max_validation: int | None = None
    max_test: int | None = None
    validation_size: float = 0.1
    test_size: float = 0.2
    seed: int = 1234
    drop_empty: bool = False

    def __post_init__(self) -> None:
        for name in ("max_train", "max_validation", "max_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1, or None for all.")
        for name in ("validation_size", "test_size"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}; it is a share of the rows, 0 <= share < 1.")
        if self.validation_size + self.test_size >= 1:
            raise ConfigError(
                f"validation_size {self.validation_size} and test_size {self.test_size} leave "
                "nothing to train on; together they must be below 1."
            )
        if self.domains is not None and not self.domains:
            raise ConfigError("domains is empty; name at least one, or None for all.")
