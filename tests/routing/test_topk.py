"""The k best experts: order, ties, and that every way of computing them is the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moduli.routing import RouteContext, Rule, route
from moduli.routing.topk import FEW, best

SHAPES = [(1, 8), (1, 64), (300, 7), (3 * FEW, 64), (90, 256)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tied(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scores of few different values, zeros of both signs and infinities among them."""
    scores = (2 * torch.randn(tokens, experts)).round()
    scores[scores == 0] *= torch.randn(tokens, experts).sign()[scores == 0]
    scores[0, -1], scores[-1, 0] = torch.inf, -torch.inf
    return scores.to(dtype)


def by_definition(scores: torch.Tensor, count: int) -> torch.Tensor:
    rows = [
        sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:count]
        for row in scores.tolist()
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_best_first_and_ties_by_index(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = tied(*shape, dtype)
    for count in (1, 3, shape[1]):
        assert torch.equal(best(scores, count), by_definition(scores, count))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_ties_it_is_topk(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape)
    for count in (1, 3, shape[1]):
        assert torch.equal(best(scores, count), scores.topk(count).indices)


def test_any_memory_layout() -> None:
    scores = tied(64, 40)
    expected = by_definition(scores, 5)
    for view in (scores.T.contiguous().T, tied(64, 80)[:, ::2].copy_(scores)):
        assert not view.is_contiguous()
        assert torch.equal(best(view, 5), expected)


def test_no_tokens() -> None:
    assert best(torch.empty(0, 8), 3).shape == (0, 3)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled(dtype: torch.dtype) -> None:
    compiled = torch.compile(best, fullgraph=True)
    for tokens in (3, 70):
        scores = tied(tokens, 16, dtype)
        assert torch.equal(compiled(scores, 4), by_definition(scores, 4))


@pytest.mark.usefixtures("without_shape_checks")
def test_recorded_graphs_choose_anew() -> None:
    first, second = tied(70, 16), tied(70, 16)
    expected = by_definition(second, 4)
    assert not torch.equal(best(first, 4), expected)
    assert torch.equal(make_fx(lambda s: best(s, 4))(first)(second), expected)
    assert torch.equal(torch.jit.trace(lambda s: best(s, 4), first)(second), expected)


def test_transforms_and_fake_tensors() -> None:
    scores = torch.stack([tied(40, 16), tied(40, 16)])
    found = torch.vmap(lambda s: best(s, 3))(scores)
    assert torch.equal(found, torch.stack([by_definition(s, 3) for s in scores]))

    def loss(s: torch.Tensor) -> torch.Tensor:
        return s.gather(1, best(s, 3)).sum()

    (found,) = torch.func.grad(loss)(scores[0]).nonzero().T[1].split(3 * 40)
    assert torch.equal(found.view(40, 3), by_definition(scores[0], 3).sort(dim=-1).values)
    with FakeTensorMode():
        assert best(torch.empty(40, 16), 3).shape == (40, 3)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    scores = tied(3 * FEW, 64)
    assert torch.equal(best(scores.cuda(), 8).cpu(), by_definition(scores, 8))


def test_one_token_goes_where_it_goes_among_many() -> None:
    scores = torch.zeros(4 * FEW, 8)  # a gate that starts at 0
    for arm in ("top", "bottom", "not_top"):
        rule = Rule(top_k=3, choose=arm)  # type: ignore[arg-type]
        many = route(scores, rule, RouteContext()).experts
        one = route(scores[:1], rule, RouteContext()).experts
        assert torch.equal(many, one.expand_as(many))
        assert one.tolist() == [[3, 4, 5, 6, 7] if arm == "not_top" else [0, 1, 2]]
