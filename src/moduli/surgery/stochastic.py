"""Stochastic experts: N copies of an FFN without a router; something else says which one computes.

The FFN's own forward stays as it is. Each of its projections is replaced by a module that holds N
copies of that stock layer, and all projections of one FFN ask the same `Chooser`, so that copy e of
each together is expert e. Dropout, activations, gates and norms of the block keep their places,
blocks with an inline FFN (BERT, BART) need no code of their own, and PEFT or a quantiser finds
stock layers. What was not chosen is not computed, and its parameters get no gradient at all.

Merging takes the mean of the copies of every tensor. Letters: B batch, T tokens, D width, F
neurons, N experts.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moduli.errors import ModelError
from moduli.surgery.locate import FFN
from moduli.surgery.owned import require_copyable
from moduli.surgery.projection import base_of, bias_of, is_sharded, is_stock, shape_of, weight_of
from moduli.surgery.recall import Recalled

Choice = int | tuple[int, ...] | Int[Tensor, " T"] | Literal["each", "mean", "none"]
"""Experts of one call of an FFN: one for all of it; one for each of several equal parts of the
batch; one for each token; every one, of whose outputs the mean is taken; one whose weights are the
mean of all; or none, so that the FFN gives 0."""

Limit = Callable[[Choice, torch.Size], Choice]
"""What becomes of the chooser's choice in training; also given the input's leading dimensions."""


class Chooser(Recalled):
    """Says with which experts the layers of a model compute; one object for all of them.

    Attributes:
        dense: True while `moduli.dense` is active, and then `choose` is not asked.
    """

    dense = False

    def snapshot(self) -> dict[str, Any]:
        """See `Recalled`."""
        return {"dense": self.dense}

    def choose(self, layer: int, lead: torch.Size, training: bool) -> Choice:
        """The experts of an FFN.

        Args:
            layer: place of the FFN among those with experts, from 0.
            lead: leading dimensions of its input.
            training: whether the FFN is in training mode.
        """
        return "mean"

    def finish(self, layer: int) -> None:
        """Called when the last projection of an FFN is done: its next call is another one."""


class StochasticProjection(nn.Module):
    """N copies of a projection, of which the chooser names those that compute.

    Args:
        dense: the projection; it becomes the first copy.
        num_experts: N.
        shared: names the experts.
        layer: place of the FFN among those with experts.
        last: whether it is the FFN's last projection.

    Attributes:
        limit: of the choice in training; None: what the chooser says.
    """

    def __init__(
        self, dense: nn.Module, num_experts: int, shared: Chooser, layer: int, last: bool
    ) -> None:
        super().__init__()
        copies = [copy.deepcopy(dense) for _ in range(num_experts - 1)]
        self.experts = nn.ModuleList([dense, *copies])
        self.out_features, self.in_features = shape_of(dense)
        self.shared = shared
        self.layer = layer
        self.last = last
        self.limit: Limit | None = None
        self._kept = KeptMeans()

    @property
    def weight(self) -> Tensor:
        """Of the first copy: blocks ask a projection for its dtype or device (T5)."""
        return weight_of(base_of(self.experts[0]))

    @property
    def bias(self) -> Tensor | None:
        """Of the first copy, or None."""
        return bias_of(base_of(self.experts[0]))

    def forward(self, x: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*out outputs"]:
        """The projection by the chosen experts; for "each", the results of all stand one after
        the other along the first dimension from the first projection to the last."""
        choice = self._choice(x.shape[:-1])
        if self.last:
            self.shared.finish(self.layer)
        if isinstance(choice, int):
            y: Tensor = self.experts[choice](x)
            return y
        if isinstance(choice, tuple):
            return self._in_parts(x, choice)
        if isinstance(choice, Tensor):
            return self._by_token(x, choice)
        if choice == "mean":
            return self._mean(x)
        if choice == "none":
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if not self.last:
            return torch.cat([expert(x) for expert in self.experts])
        parts = x.chunk(len(self.experts))
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.stack(outputs).mean(0)

    def _choice(self, lead: torch.Size) -> Choice:
        if self.shared.dense:
            return "mean"
        choice = self.shared.choose(self.layer, lead, self.training)
        return self.limit(choice, lead) if self.limit and self.training else choice

    def _in_parts(self, x: Tensor, choice: tuple[int, ...]) -> Tensor:
        if len(set(choice)) == 1:
            whole: Tensor = self.experts[choice[0]](x)
            return whole
        parts = x.chunk(len(choice))
        return torch.cat([self.experts[e](part) for e, part in zip(choice, parts, strict=True)])

    def _by_token(self, x: Tensor, choice: Int[Tensor, " T"]) -> Tensor:
        """Tokens sorted by expert, a call for each expert that has some, and back in place."""
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice, minlength=len(self.experts)).tolist()
        parts = x.reshape(-1, x.shape[-1])[order.to(x.device)].split(counts)
        outputs = [e(part) for e, part in zip(self.experts, parts, strict=True) if len(part)]
        y = torch.cat(outputs)[order.argsort().to(x.device)]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _mean(self, x: Tensor) -> Tensor:
        if all(is_stock(expert) for expert in self.experts):
            tensors = self._kept(self, reuse=not (self.training or torch.is_grad_enabled()))
            made: Tensor = torch.func.functional_call(self.experts[0], tensors, (x,))
            return made
        # The mean of linear maps is the map by the mean: true with an adapter on each as well.
        return torch.stack([expert(x) for expert in self.experts]).mean(0)

    def extra_repr(self) -> str:
        return f"num_experts={len(self.experts)}, layer={self.layer}"


def stochastic_projections(model: nn.Module) -> dict[str, StochasticProjection]:
    """Projections that have several copies, by their names, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, StochasticProjection)}


def copy_projections(ffns: Sequence[FFN], num_experts: int, shared: Chooser) -> None:
    """Give every projection of `ffns` its copies, in place.

    Raises:
        ModelError: an FFN whose weights cannot be copied; nothing has changed.
    """
    for ffn in ffns:
        require_copyable(ffn)
    for layer, ffn in enumerate(ffns):
        for path, module in ffn.projections.items():
            last = path == ffn.family.last
            copies = StochasticProjection(module, num_experts, shared, layer, last)
            copies.train(ffn.block.training)
            ffn.block.set_submodule(path, copies)


@torch.no_grad()
def perturb(model: nn.Module, noise: float, seed: int) -> None:
    """Add Gaussian noise to the weights of all copies, so that they do not start equal.

    Args:
        model: with stochastic experts.
        noise: standard deviation, in units of that of the numbers of each weight.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for projection in stochastic_projections(model).values():
        for expert in projection.experts:
            weight = weight_of(expert)
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(drawn * (noise * weight.std()))


class KeptMeans:
    """The means of a projection's copies, kept in evaluation while none of them changes.

    They are made again if a copy is other memory than it was, if its version counter has moved, or,
    in main memory, if a sample of its numbers is another one, since `.data` passes by the counter.
    It is not copied or pickled with its owner.
    """

    def __init__(self) -> None:
        self._value: dict[str, Tensor] = {}
        self._sources: list[tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor | None]] = []

    def __call__(self, projection: StochasticProjection, reuse: bool) -> dict[str, Tensor]:
        """`mean_tensors(projection)`, now or as it was; `reuse`: whether it may be kept."""
        sources = [p for expert in projection.experts for p in expert.parameters()]
        reuse = reuse and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())
        if not reuse or any(p.is_inference() or type(p) is not nn.Parameter for p in sources):
            self.__init__()  # type: ignore[misc]
            return mean_tensors(projection)
        if not self._still(sources):
            self._value = mean_tensors(projection)
            self._sources = [(weakref.ref(p), _stamp(p), _sample(p)) for p in sources]
        return self._value

    def _still(self, sources: Sequence[Tensor]) -> bool:
        if len(sources) != len(self._sources):
            return False
        for now, (was, stamp, sample) in zip(sources, self._sources, strict=True):
            if was() is not now or stamp != _stamp(now):
                return False
            if sample is not None and not torch.equal(sample, _sample(now)):  # type: ignore[arg-type]
                return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptMeans:
        return KeptMeans()

    def __reduce__(self) -> tuple[type[KeptMeans], tuple[()]]:
        return KeptMeans, ()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype
    return tensor._version, *place


def _sample(tensor: Tensor) -> Tensor | None:
    """Up to 64 numbers from everywhere in a tensor; None where reading them would wait."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return tensor.detach().view(-1)[:: (tensor.numel() // 64) | 1].clone()


def mean_tensors(projection: StochasticProjection) -> dict[str, Tensor]:
    """The mean over copies of the weight, and of the bias if there is one.

    Copies that are equal come out bit for bit: the mean is the first plus the mean difference to
    it, in float32 or better.
    """
    copies = [dict(expert.named_parameters()) for expert in projection.experts]
    return {
        name: _mean_of([each[name] for each in copies]).to(first.dtype)
        for name, first in copies[0].items()
    }


def _mean_of(tensors: Sequence[Tensor]) -> Tensor:
    first, *others = (t if t.dtype == torch.float64 else t.float() for t in tensors)
    for_one = [(other - first) / len(tensors) for other in others]
    return torch.stack(for_one).sum(0) + first if for_one else first


@torch.no_grad()
def have_parted(projection: StochasticProjection) -> bool:
    """Whether the copies differ, so that merging has to average them."""
    first, *others = (list(expert.parameters()) for expert in projection.experts)
    return any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def require_mergeable(model: nn.Module) -> None:
    """Raise unless the copies can be averaged in place.

    Raises:
        ModelError: one carries an adapter, or is sharded over processes.
    """
    for name, projection in stochastic_projections(model).items():
        if not all(base_of(expert) is expert for expert in projection.experts):
            raise ModelError(
                f"the experts of {name} carry an adapter; merge it into them first "
                "(merge_and_unload)"
            )
        if any(map(is_sharded, projection.parameters())):
            raise ModelError(
                f"{name} cannot be merged: its experts are sharded over processes; gather them "
                "into an ordinary model first (FSDP's full state dict)"
            )


@torch.no_grad()
def merge_projections(model: nn.Module) -> None:
    """Put a single projection back in every place, the mean of its copies."""
    for name, projection in stochastic_projections(model).items():
        merged = projection.experts[0]
        for key, tensor in mean_tensors(projection).items():
            merged.get_parameter(key).copy_(tensor)
        model.set_submodule(name, merged)
