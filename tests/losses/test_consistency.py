"""The consistency loss: equal to its plain form, finite, lean, and zero where passes agree."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from moduli.errors import ConfigError, DataError
from moduli.losses import consistency
from moduli.losses.consistency import (
    consistency_loss,
    consistency_loss_by_autograd,
    consistent_regression,
)

V = 7


def passes(count: int = 2, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> list[Tensor]:
    return [
        (scale * torch.randn(3, 4, V, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def labels(ignored: int = -100) -> Tensor:
    found = torch.randint(V, (3, 4))
    found[0, 2:] = ignored
    return found


def gradients(loss: Any, logits: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, logits))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("style", ["fairseq", "torch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_is_its_plain_form(
    count: int, style: Any, smoothing: float, reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consistency, "PIECE", 3 * V)  # 10 positions in 4 pieces
    logits, truth = passes(count), labels()
    options = {"label_smoothing": smoothing, "smoothing_style": style, "reduction": reduction}
    ours = consistency_loss(logits, truth, 1.5, **options)
    plain = consistency_loss_by_autograd(logits, truth, 1.5, **options)
    torch.testing.assert_close(ours.total, plain.total)
    torch.testing.assert_close(ours.errors, plain.errors)
    torch.testing.assert_close(ours.disagreement, plain.disagreement)
    assert ours.count == plain.count == 10
    for mine, other in zip(gradients(ours, logits), gradients(plain, logits), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_are_those_of_the_function() -> None:
    truth = labels()

    def total(*logits: Tensor) -> Tensor:
        return consistency_loss(logits, truth, 0.7, label_smoothing=0.1).total

    assert torch.autograd.gradcheck(total, passes(3))


@pytest.mark.parametrize("style", ["fairseq", "torch"])
def test_one_pass_is_cross_entropy(style: Any) -> None:
    (logits,), truth = passes(1), labels()
    smoothing = 0.1 if style == "torch" else 0.1 * (V - 1) / V
    ours = consistency_loss([logits], truth, 3.0, label_smoothing=smoothing, smoothing_style=style)
    theirs = cross_entropy(
        logits.flatten(0, 1), truth.flatten(), reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(ours.total, theirs)
    assert float(ours.disagreement) == 0


def test_passes_that_agree_cost_nothing() -> None:
    one = passes(1, torch.float32)[0].detach()
    logits = [one.clone().requires_grad_() for _ in range(3)]
    truth = labels()
    found = consistency_loss(logits, truth, 5.0)
    assert float(found.disagreement) == 0
    alone = consistency_loss(logits[:1], truth, 5.0)
    torch.testing.assert_close(gradients(found, logits)[0], gradients(alone, logits[:1])[0])


def test_disagreement_is_the_mean_over_pairs() -> None:
    logits, truth = passes(4), labels()
    pairs = [
        consistency_loss(pair, truth, 1.0).disagreement
        for pair in itertools.combinations(logits, 2)
    ]
    found = consistency_loss(logits, truth, 1.0).disagreement
    torch.testing.assert_close(found, torch.stack(pairs).mean())


def test_without_alpha_disagreement_has_no_part_in_the_loss() -> None:
    truth = labels().clamp(max=V - 2)
    logits = [one.detach().clone() for one in passes(2)]
    for one in logits:
        one[..., V - 1] = -torch.inf  # a class that is masked out
        one.requires_grad_()
    found = consistency_loss(logits, truth, 0.0)
    alone = [consistency_loss([one], truth, 0.0) for one in logits]
    assert torch.isfinite(found.total)
    torch.testing.assert_close(found.total, alone[0].total + alone[1].total)
    for i, gradient in enumerate(gradients(found, logits)):
        assert torch.equal(gradient, gradients(alone[i], [logits[i]])[0])


def test_positions_without_a_label_do_not_count() -> None:
    logits, truth = passes(), labels(ignored=1)
    found = consistency_loss(logits, truth, 2.0, ignore_index=1, reduction="token_mean")
    kept = truth != 1
    alone = consistency_loss(
        [one[kept] for one in logits], truth[kept], 2.0, reduction="token_mean"
    )
    torch.testing.assert_close(found.total, alone.total)
    for grad in gradients(found, logits):
        assert not grad[~kept].any()
        assert grad[kept].any()
    nothing = consistency_loss(logits, torch.full_like(truth, 1), 2.0, ignore_index=1)
    assert float(nothing.total.detach()) == nothing.count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits, truth = passes(2, dtype), labels()
    found = consistency_loss(logits, truth, 5.0, label_smoothing=0.1)
    exact = [one.detach().double().requires_grad_() for one in logits]
    expected = consistency_loss_by_autograd(exact, truth, 5.0, label_smoothing=0.1)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected.total, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients(found, logits), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = [one.detach().sign().mul(3e4).to(dtype).requires_grad_() for one in passes()]
    found = consistency_loss(logits, labels(), 5.0, label_smoothing=0.1)
    assert float(found.disagreement) > 1e4
    assert found.total.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(found, logits))


class Largest(TorchDispatchMode):
    """The most elements of any float32 tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_whole_distribution_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "PIECE", 2 * V)
    logits, truth = passes(2, torch.bfloat16), labels()
    with Largest() as ours:
        consistency_loss(logits, truth, 1.0, label_smoothing=0.1).total.backward()
    with Largest() as plain:
        consistency_loss_by_autograd(logits, truth, 1.0).total.backward()
    assert ours.elements == 2 * V
    assert plain.elements == 10 * V


def test_regression() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    found = consistent_regression([one, other], torch.tensor([0.0, 2.0]), 10.0)
    assert found.errors.tolist() == [1.0, 8.0]
    assert float(found.disagreement) == 5.0
    assert float(found.total) == 59.0
    mean = consistent_regression(
        [one, other], torch.tensor([0.0, 2.0]), 10.0, reduction="token_mean"
    )
    assert float(mean.total) == 29.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"logits": []}, "no pass"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], says: str) -> None:
    given = {"logits": passes(), "labels": labels(), "alpha": 1.0, **changes}
    with pytest.raises(ConfigError, match=says):
        consistency_loss(**given)


@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_that_do_not_fit() -> None:
    one, truth = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match="different shapes"):
        consistency_loss([one, one[:1]], truth, 1.0)
    with pytest.raises(ConfigError, match="labels are to have the shape"):
        consistency_loss([one], truth[:, :2], 1.0)
    with pytest.raises(ConfigError, match="they have to be the same"):
        consistent_regression([one], one[0], 1.0)


def test_a_label_that_is_no_class() -> None:
    with pytest.raises(DataError, match="a label is 7, but there are 7 classes"):
        consistency_loss(passes(), labels().fill_(V), 1.0)
