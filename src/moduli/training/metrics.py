"""What is measured: the record of a metric, and scores of a classifier from its logits.

Balanced accuracy and macro-F1 stand beside accuracy because the class priors of domains differ:
a model that only learnt the prior of its training domain loses accuracy elsewhere for that alone.

    C classes, N examples
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from moduli.errors import DataError


@dataclass(frozen=True)
class Metric:
    """A number in the scores of a kind of task.

    Attributes:
        name: its key in the scores.
        title: what it is called in tables and sentences.
        higher_is_better: whether a higher value is the better one.
        share: in [0, 1] and shown in percent; otherwise shown as it is.
        note: for the report, why it stands beside the first metric; metrics without a note have
            no table of their own there.
    """

    name: str
    title: str
    higher_is_better: bool = True
    share: bool = True
    note: str = ""


LOSS = Metric("loss", "loss", higher_is_better=False, share=False)
CLASS_METRICS = (
    Metric("accuracy", "accuracy"),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        note="The mean of the recalls of the classes. Domains differ in how many texts of each "
        "class they hold; this score does not reward having learnt the prior of one.",
    ),
    Metric("macro_f1", "macro-F1"),
    LOSS,
)


@dataclass(frozen=True)
class Scores:
    """What a model achieves; each kind of task has its own numbers in a subclass."""

    n: int
    """How many decisions were scored."""

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ClassScores(Scores):
    """What a classifier achieves on `n` examples; all but `loss` and `n` are in [0, 1]."""

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    loss: float


def score(logits: torch.Tensor, labels: torch.Tensor) -> ClassScores:
    """Accuracy, balanced accuracy, macro-F1 and mean cross-entropy (nats).

    Classes that occur neither in the labels nor in the predictions do not enter the macro-F1, and
    balanced accuracy is the mean recall of the classes that occur in the labels (scikit-learn's
    definitions).

    Args:
        logits: `[N, C]`, any float dtype.
        labels: `[N]`, class indices.

    Raises:
        DataError: no examples, or a label outside the model's classes.
    """
    from sklearn.metrics import f1_score, recall_score

    if labels.numel() == 0:
        raise DataError("There are no examples to score; give a data set with at least one.")
    classes = logits.shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but the model has {classes} classes (0 to {classes - 1})."
        )
    truth, predicted = labels.cpu().numpy(), logits.argmax(-1).cpu().numpy()
    present = sorted(set(truth.tolist()))
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    return ClassScores(
        n=len(truth),
        accuracy=float((truth == predicted).mean()),
        balanced_accuracy=float(
            recall_score(truth, predicted, labels=present, average="macro", zero_division=0)
        ),
        macro_f1=float(f1_score(truth, predicted, average="macro", zero_division=0)),
        loss=float(loss),
    )
