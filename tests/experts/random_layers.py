"""Layers of experts of every shape, memory layout and routing, for tests of kernels.

Letters: T tokens, D width, E experts, e neurons of one expert, R rows of its first matrix, K
experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from moduli.experts import run_experts
from moduli.experts.ffn import StackedFFN
from moduli.routing import Routing

FORMS = ("plain", "apart", "concatenated", "interleaved")
LAYOUTS = ("linear", "conv1d", "owned", "sliced")
ROUTINGS = ("random", "one expert", "ties", "repeated", "everyone")
TOKENS = ("contiguous", "transposed", "sliced", "expanded")
# Of the norm: what rounding may change.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Case:
    """A layer, its tokens and their routing.

    Attributes:
        layout: how parameters lie in memory: two `nn.Linear`, two `Conv1D`, tensors of owned
            experts (equal sizes only), or parts of larger tensors.
        routing: who goes where; "ties" is one weight for all, "repeated" an expert several times
            in the slots of one token.
        x: how the tokens lie in memory.
        active: share of slots that are computed; 1 without a mask.
    """

    tokens: int = 7
    width: int = 16
    sizes: tuple[int, ...] = (8, 8, 8)
    top_k: int = 2
    form: str = "plain"
    layout: str = "linear"
    first_bias: bool = False
    up_bias: bool = False
    out_bias: bool = False
    routing: str = "random"
    active: float = 1.0
    x: str = "contiguous"
    activation: Callable[[Tensor], Tensor] = F.gelu
    seed: int = 0

    @property
    def equal(self) -> bool:
        return len(set(self.sizes)) == 1


@dataclass(frozen=True)
class Layer:
    """What a case is made of: leaves by name, and what kernels read, made of the leaves."""

    case: Case
    leaves: dict[str, Tensor]
    mask: Tensor | None
    index: Tensor

    def x(self) -> Tensor:
        leaf = self.leaves["x"]
        return {
            "contiguous": lambda: leaf,
            "transposed": lambda: leaf.T,
            "sliced": lambda: leaf[1::2, 3:],
            "expanded": lambda: leaf.expand(self.case.tokens, -1),
        }[self.case.x]()

    def routing(self) -> Routing:
        return Routing(self.index, self.leaves["weights"], self.mask)

    def experts(self) -> StackedFFN:
        case, leaves = self.case, self.leaves

        def cut(tensor: Tensor | None, owned: bool = False) -> Tensor | None:
            if tensor is None or owned or not case.equal:
                return tensor
            stacked: Tensor = tensor.unflatten(0, (len(case.sizes), -1))
            return stacked

        def first(name: str) -> Tensor | None:
            leaf = leaves.get(name)
            if leaf is None or case.layout in ("linear", "owned"):
                return cut(leaf, case.layout == "owned")
            return cut(leaf.T if case.layout == "conv1d" else leaf[:, 2 : 2 + case.width])

        second = leaves["second"]
        if case.layout == "owned":
            second = second.mT
        else:
            rows = {"linear": second.T, "conv1d": second, "sliced": second[:, 1:].T}[case.layout]
            found = cut(rows)
            assert found is not None
            second = found
        keys = first("first")
        assert keys is not None
        return StackedFFN(
            first=keys,
            second=second,
            sizes=case.sizes,
            first_bias=cut(leaves.get("first_bias")),
            up=first("up"),
            up_bias=cut(leaves.get("up_bias")),
            out_bias=leaves.get("out_bias"),
            fused=None if case.form in ("plain", "apart") else case.form,  # type: ignore[arg-type]
        )

    def run(self, kernel: str) -> Tensor:
        y: Tensor = run_experts(
            self.x(), self.routing(), self.experts(), self.case.activation, kernel
        )
        return y

    def to(self, dtype: torch.dtype) -> Layer:
        """The same numbers in another type; the routing keeps its own leaves."""
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.leaves.items()}
        return replace(self, leaves=leaves)

    def push(self) -> Tensor:
        """A gradient of the output."""
        generator = torch.Generator().manual_seed(self.case.seed + 1)
        shape = self.case.tokens, self.case.width
        return torch.randn(shape, generator=generator).to(self.leaves["x"].dtype)


def build(case: Case, dtype: torch.dtype = torch.float32) -> Layer:
    """Random parameters, tokens and routing."""
    generator = torch.Generator().manual_seed(case.seed)
    count, total = len(case.sizes), sum(case.sizes)
    in_first = total * (2 if case.form in ("concatenated", "interleaved") else 1)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    def matrix(rows: int, scale: float, second: bool = False) -> Tensor:
        d = case.width
        if case.layout == "owned":
            shape: tuple[int, ...] = (count, rows // count, d)
            shape = (shape[0], d, shape[1]) if second else shape
        elif case.layout == "sliced":
            shape = (d, rows + 1) if second else (rows, d + 5)
        else:
            upright = (case.layout == "conv1d") is second
            shape = (rows, d) if upright else (d, rows)
        return leaf(*shape, scale=scale)

    leaves = {
        "x": leaf(
            *{
                "contiguous": (case.tokens, case.width),
                "transposed": (case.width, case.tokens),
                "sliced": (2 * case.tokens + 1, case.width + 3),
                "expanded": (1, case.width),
            }[case.x]
        ),
        "first": matrix(in_first, case.width**-0.5),
        "second": matrix(total, 1.0, second=True),
    }
    if case.form == "apart":
        leaves["up"] = matrix(total, case.width**-0.5)
        if case.up_bias:
            leaves["up_bias"] = leaf(total)
    if case.first_bias:
        leaves["first_bias"] = leaf(in_first)
    if case.out_bias:
        leaves["out_bias"] = leaf(count, case.width)
    top_k = count if case.routing == "everyone" else case.top_k
    shape = case.tokens, top_k
    scores = torch.rand(case.tokens, count, generator=generator)
    index = scores.topk(top_k).indices
    if case.routing == "one expert":
        index = torch.full(shape, int(torch.randint(count, (), generator=generator)))
    elif case.routing == "repeated":
        index = torch.randint(count, shape, generator=generator)
    equal, drawn = torch.full(shape, 1 / top_k), torch.rand(shape, generator=generator)
    leaves["weights"] = (equal if case.routing == "ties" else drawn).to(dtype)
    leaves["weights"].requires_grad_()
    mask = None
    if case.active < 1:
        mask = torch.rand(shape, generator=generator) < case.active
    return Layer(case, leaves, mask, index)


@st.composite
def cases(draw: Any, most_tokens: int = 300, most_experts: int = 70, even: bool = False) -> Case:
    """Cases of every kind; small ones are more frequent than large ones.

    Args:
        draw: what hypothesis passes.
        most_tokens: largest T.
        most_experts: largest E.
        even: even widths only.
    """

    def size(most: int) -> Any:
        return st.one_of(st.integers(1, min(20, most)), st.integers(1, most))

    count = draw(size(most_experts))
    tokens = draw(size(most_tokens))
    layout = draw(st.sampled_from(LAYOUTS))
    if layout != "owned" and draw(st.booleans()):
        seed = draw(st.integers(0, 1000))
        most = draw(size(60))
        generator = torch.Generator().manual_seed(seed)
        sizes = tuple(torch.randint(1, most + 1, (count,), generator=generator).tolist())
    else:
        sizes = (draw(size(100)),) * count
    form = draw(st.sampled_from(FORMS))
    width = draw(size(130))
    return Case(
        tokens=tokens,
        width=width + width % 2 if even else width,
        sizes=sizes,
        top_k=draw(st.integers(1, min(count, 9))),
        form=form,
        layout=layout,
        first_bias=draw(st.booleans()),
        up_bias=form == "apart" and draw(st.booleans()),
        out_bias=draw(st.booleans()),
        routing=draw(st.sampled_from(ROUTINGS)),
        active=draw(st.sampled_from((1.0, 1.0, 0.6, 0.1, 0.0))),
        x=draw(st.sampled_from(TOKENS)),
        activation=draw(st.sampled_from((F.gelu, F.silu, F.relu))),
        seed=draw(st.integers(0, 2**20)),
    )


def gradients(layer: Layer, kernel: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of every leaf; zeros where a leaf takes no part."""
    y = layer.run(kernel)
    names = list(layer.leaves)
    found = torch.autograd.grad(
        y, [layer.leaves[n] for n in names], layer.push(), allow_unused=True
    )
    return y, {
        n: torch.zeros_like(layer.leaves[n]) if g is None else g
        for n, g in zip(names, found, strict=True)
    }


def assert_close(found: Tensor, exact: Tensor, tolerance: float, what: str, scale: float) -> None:
    """Within `tolerance` of the norm, or of `scale` per number where the norm is small."""
    found, exact = found.detach().double(), exact.detach().double()
    assert found.shape == exact.shape, what
    gap = float((found - exact).norm())
    norm = max(float(exact.norm()), scale * exact.numel() ** 0.5)
    assert gap <= tolerance * norm, f"{what}: {gap / norm} of the norm, {tolerance} allowed"


def assert_computes(layer: Layer, kernel: str) -> None:
    """Output with and without a graph, and all gradients, are those of `eager` in float64."""
    dtype, case = layer.leaves["x"].dtype, layer.case
    expected, wanted = gradients(layer.to(torch.float64), "eager")
    found, grads = gradients(layer, kernel)
    with torch.no_grad():
        again = layer.run(kernel)
    tolerance = TOLERANCE[dtype]
    for what, y in (("y", found), ("y without a graph", again)):
        assert y.dtype == dtype
        assert_close(y, expected, tolerance, what, 0.3)
    if dtype == torch.bfloat16 and case.activation is F.relu:
        tolerance *= 3  # rounding moves pre-activations across the kink
    for name, gradient in grads.items():
        # What has passed the second matrix backwards is a sum of D terms, which may cancel.
        scale = 0.3 if name in ("second", "out_bias") else 0.5 * case.width**0.5
        if name == "x" and case.x == "expanded":
            scale *= case.tokens**0.5
        elif name not in ("x", "weights"):  # a sum over the slots of an expert, which may too
            scale *= max(1.0, layer.index.numel() / len(case.sizes)) ** 0.5
        assert_close(gradient, wanted[name], tolerance, name, scale)
