"""The fast path: an FFN block that computes the chosen neurons only.

It is taken where every projection is exactly a stock module with plain tensors, without hooks or
tuner, so that nobody's change of the projections is bypassed; else the block's own code runs and
the activation masks. Letters: T tokens, D width, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import beats_masking, run_experts
from moduli.surgery.locate import FFN
from moduli.surgery.projection import bias_of, is_stock, rows
from moduli.surgery.routed import RoutedLayer
from moduli.surgery.seam import RoutedActivation


class FastFFN:
    """Stands in for the FFN method of one block; falls back to the class's own method.

    Args:
        layer: the routed activation of the block.
    """

    def __init__(self, layer: RoutedActivation) -> None:
        self.layer = layer
        self._views: Views | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        ffn = layer.ffn
        if self.usable(x):
            return _tail(ffn, self.compute(x), x)
        entry = ffn.family.entry
        assert entry is not None
        y: Tensor = getattr(type(ffn.block), entry)(ffn.block, x)
        return y

    def usable(self, x: Tensor) -> bool:
        """Whether this input takes the fast path."""
        layer = self.layer
        if layer.shared.dense or torch.compiler.is_compiling():
            return False
        if not self._unchanged() and obstacle(layer) is not None:
            return False
        return layer.options.path == "fast" or pays_off(layer, x)

    def compute(self, x: Tensor) -> Tensor:
        """The FFN without what the block does after it."""
        layer = self.layer
        flat = x.reshape(-1, x.shape[-1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer._differentiable):
            scores = layer.router.scores(flat)
        routing = layer.route(scores, x.shape[:-1])
        y = run_experts(flat, routing, self._experts(), layer.activation)
        bias = bias_of(layer.ffn.last)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.reshape(x.shape)

    def _experts(self) -> StackedFFN:
        if torch.is_grad_enabled():
            return views(self.layer.ffn, self.layer.sizes)
        if self._views is None:
            self._views = Views(self.layer)
        return self._views.experts

    def _unchanged(self) -> bool:
        """Whether what was found out about the block without gradients still holds."""
        if torch.is_grad_enabled() or self._views is None:
            return False
        if self._views.hold(self.layer):
            return True
        self._views = None
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None}  # a copy has weights of its own


class Views:
    """The experts of a block that has no obstacle, for as long as nobody touches the block.

    Looking every part up takes longer than a token takes; comparing what was found does not. The
    views see changes of the weights in place, as they share their memory.
    """

    def __init__(self, layer: RoutedActivation) -> None:
        ffn = layer.ffn
        self.options, self.out_bias = layer.options, layer.out_bias
        self.inner = [(module, module.training) for module in ffn.inner]
        self.links: list[tuple[dict[str, Any], str, Any]] = []
        self.projections: list[nn.Module] = list(ffn.projections.values())
        for path in ffn.projections:
            module = ffn.block
            for name in path.split("."):
                parent, module = module, module._modules[name]  # type: ignore[assignment]
                self.links.append((parent._modules, name, module))
        self.tensors = [
            (module._parameters, name, tensor, None if tensor is None else tensor.data_ptr())
            for module in self.projections
            for name, tensor in module._parameters.items()
        ]
        self.experts = views(ffn, layer.sizes)

    def hold(self, layer: RoutedActivation) -> bool:
        """Whether all is as it was."""
        if layer.options is not self.options or layer.out_bias is not self.out_bias:
            return False
        for place, name, found in self.links:
            if place.get(name) is not found:
                return False
        for place, name, tensor, address in self.tensors:
            now = place.get(name)
            if now is not tensor or (now is not None and now.data_ptr() != address):
                return False
        ours = layer.remember_input
        for module in self.projections:
            if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
                return False
            if any(hook != ours for hook in module._forward_pre_hooks.values()):
                return False
        return all(module.training is before for module, before in self.inner)


def views(ffn: FFN, sizes: Sequence[int]) -> StackedFFN:
    """The experts of an FFN as views of its weights; gradients arrive in the weights."""
    equal = len(set(sizes)) == 1

    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not equal:
            return tensor
        stacked: Tensor = tensor.unflatten(0, (len(sizes), sizes[0]))
        return stacked

    first, second = cut(ffn.keys()), cut(rows(ffn.last).T)
    assert first is not None
    assert second is not None
    return StackedFFN(
        first=first,
        second=second,
        sizes=tuple(sizes),
        first_bias=cut(ffn.key_bias()),
        up=cut(ffn.up_keys()),
        up_bias=cut(ffn.up_bias()),
    )


def obstacle(layer: RoutedActivation) -> str | None:
    """Why the layer cannot take the fast path at present; None if it can."""
    ffn, options = layer.ffn, layer.options
    if options.path == "masked":
        return "path='masked' was asked for"
    if ffn.family.entry is None or not hasattr(ffn.block, ffn.family.entry):
        return "the FFN is inline in a larger forward"
    if ffn.family.residual and not _ends_as_bert(ffn.block):
        return "its block has a LayerNorm elsewhere than BERT's"
    if layer.out_bias is not None:
        return "experts have output biases of their own"
    if options.select != "gate":
        return f"select={options.select!r} needs all neurons"
    if options.dropout:
        return "dropout inside experts"
    if layer.labels is not None:
        return "its neurons could not be moved"
    if any(_is_active(module) for module in ffn.inner):
        return "the block drops neurons in training"
    if len({module.weight.dtype for module in ffn.projections.values()}) > 1:
        return "its projections differ in dtype"
    for path, module in ffn.projections.items():
        if not is_stock(module):
            return f"{path} is a {type(module).__name__}"
        if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{path} has hooks"
        ours = layer.remember_input
        if any(hook != ours for hook in module._forward_pre_hooks.values()):
            return f"{path} has hooks"
    return None


def pays_off(layer: RoutedActivation, x: Tensor) -> bool:
    """Whether computing the chosen neurons alone is expected to be faster than masking."""
    return beats_masking(
        x.numel() // x.shape[-1],
        x.shape[-1],
        layer.sizes,
        max(1, round(chosen_share(layer) * layer.num_experts)),
        gated=layer.ffn.gated,
        like=x,
    )


def chosen_share(layer: RoutedLayer) -> float:
    """Experts that a token uses, as a share of all."""
    rule = layer.router.rule
    used = layer.num_experts - rule.top_k if rule.choose == "not_top" else rule.top_k
    return used / layer.num_experts


def path_of(layer: RoutedLayer) -> str:
    """The path in words, for reports."""
    if not isinstance(layer, RoutedActivation):
        return "bank of experts"
    reason = obstacle(layer)
    if reason is not None:
        return f"masked ({reason})"
    if layer.options.path == "fast":
        return "fast"
    return "fast where it is expected to be faster than masking"


def _ends_as_bert(block: nn.Module) -> bool:
    """Whether `feed_forward_chunk` is BERT's: nothing before the FFN, a LayerNorm after it."""
    before, after = (
        {name for name, _ in block.get_submodule(part).named_children()}
        for part in ("intermediate", "output")
    )
    return (
        before == {"dense", "intermediate_act_fn"}
        and after == {"dense", "dropout", "LayerNorm"}
        and not any(isinstance(child, nn.LayerNorm) for child in block.children())
    )


def _is_active(module: nn.Module) -> bool:
    """Whether a parameter-free module of the block changes what passes through it at present."""
    if isinstance(module, nn.Dropout):
        return module.training and module.p > 0
    return not isinstance(module, nn.Identity)


def _tail(ffn: FFN, y: Tensor, x: Tensor) -> Tensor:
    if ffn.family.residual:  # BERT: dropout, residual, LayerNorm
        output = ffn.block.get_submodule("output")
        normed: Tensor = output.get_submodule("LayerNorm")(output.get_submodule("dropout")(y) + x)
        return normed
    for module in ffn.after:
        y = module(y)
    return y
