"""Cases of THOR: the consistency loss, layers with a given expert, and a step of two passes.

The layers are those of BART (post-norm) and mBART (pre-norm), which compute what fairseq's do.
Their FFNs get THOR's copies, with weights from the case, and a chooser that names its experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.mbart.modeling_mbart import MBartDecoderLayer, MBartEncoderLayer

from moduli.losses.consistency import ConsistencyLoss, consistency_loss
from moduli.surgery.locate import find_ffns
from moduli.surgery.stochastic import Choice, Chooser, copy_projections
from tests.parity.case import Case, Check

LAYERS = {
    ("encoder", False): BartEncoderLayer,
    ("encoder", True): MBartEncoderLayer,
    ("decoder", False): BartDecoderLayer,
    ("decoder", True): MBartDecoderLayer,
}


class Given(Chooser):
    """Names the experts that a case names."""

    choice: Choice = 0

    def choose(self, layer: int, lead: torch.Size, training: bool) -> Choice:
        return self.choice


class Compared:
    """Compares stored tensors by name; the expected outputs of these cases are a list of names."""

    def __init__(self, case: Case, check: Check) -> None:
        self.case, self.check = case, check
        self.left = set(expected(case))

    def close(self, name: str, got: Tensor) -> None:
        if name not in self.left:
            return
        self.left.discard(name)
        want, have = self.case.tensors[name].double(), got.detach().double()
        want = want.reshape(()) if want.numel() == 1 and have.dim() == 0 else want
        if have.shape != want.shape:
            problem = f"{name}: shape {tuple(have.shape)}, not {tuple(want.shape)}"
            self.check.problems.append(problem)
            return
        error = (have - want).abs()
        self.check.largest = max(self.check.largest, float(error.max()))
        near = error <= self.case.atol + self.case.rtol * want.abs()
        self.check.true(bool(near.all()), f"{name}: off by {float(error.max()):.3g}")

    def finish(self) -> None:
        self.check.seen = set(self.case.data["expected"])
        self.check.true(not self.left, f"not compared: {', '.join(sorted(self.left))}")


def expected(case: Case) -> list[str]:
    """Names of the expected tensors, with those that a pattern stands for."""
    found = []
    for name in case.data["expected"]:
        pattern = re.escape(name).replace(r"\*", ".*")
        found += [t for t in case.tensors if re.fullmatch(pattern, t)]
    return found


# --- the loss -------------------------------------------------------------------------------------


def losses(case: Case, logits: list[Tensor], smoothing: float, alpha: float) -> ConsistencyLoss:
    return consistency_loss(
        logits,
        case.tensors["target"],
        alpha,
        label_smoothing=smoothing,
        ignore_index=case.data["hyper"]["pad_id"],
    )


def compare_losses(case: Case, compared: Compared, logits: list[Tensor]) -> Tensor:
    """Everything that a case says of its loss; returns the total."""
    hyper = case.data["hyper"]
    made = losses(case, logits, hyper["label_smoothing"], hyper["alpha"])
    plain = losses(case, logits, 0.0, 0.0)
    for i, (smooth, nll) in enumerate(zip(made.errors, plain.errors, strict=True), start=1):
        compared.close(f"ce{i}", smooth)
        compared.close(f"nll{i}", nll)
    compared.close("sym_kl", made.disagreement)
    compared.close("total", made.total)
    if "n_tokens" in case.data:
        compared.check.true(made.count == case.data["n_tokens"], f"{made.count} labels counted")
    return made.total


def loss(case: Case, check: Check) -> None:
    compared = Compared(case, check)
    logits = [case.tensors[f"logits{i}"].clone().requires_grad_() for i in (1, 2)]
    compare_losses(case, compared, logits).backward()
    for i, one in enumerate(logits, start=1):
        assert one.grad is not None
        compared.close(f"grad_logits{i}", one.grad)
    compared.finish()


def extreme_loss(case: Case, check: Check) -> None:
    """Finite where the reference is not, with finite gradients."""
    compared = Compared(case, check)
    logits = [case.tensors[f"logits{i}"].clone().requires_grad_() for i in (1, 2)]
    made = losses(case, logits, 0.0, 1.0)
    compared.close("sym_kl", made.disagreement)
    for grad in torch.autograd.grad(made.total, logits):
        check.true(bool(grad.isfinite().all()), "a gradient is not finite")
    compared.finish()


# --- layers ---------------------------------------------------------------------------------------


def built(case: Case, side: str) -> tuple[nn.Module, Given]:
    """The layer of a case with its weights, in training mode without dropout, and its chooser."""
    hyper = case.data["hyper"]
    config = BartConfig(
        d_model=hyper["d_model"],
        **{f"{s}_ffn_dim": hyper["ffn"] for s in ("encoder", "decoder")},
        **{f"{s}_attention_heads": hyper["heads"] for s in ("encoder", "decoder")},
        activation_function=hyper["activation"],
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    config._attn_implementation = "eager"
    layer: Any = LAYERS[side, bool(hyper["pre_norm"])](config)
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = hyper["layer_norm_eps"]
    chooser = Given()
    copy_projections(find_ffns(layer), hyper["num_experts"], chooser)
    weights = {n[2:]: t for n, t in case.tensors.items() if n.startswith("w.")}
    layer.load_state_dict({ours(name): tensor for name, tensor in weights.items()}, strict=True)
    return layer.to(case.tensors["x"].dtype).train(), chooser


def ours(name: str) -> str:
    """fc1.2.weight is fc1.experts.2.weight here."""
    return re.sub(r"^(fc[12])\.(\d+)\.", r"\1.experts.\2.", name)


def theirs(name: str) -> str:
    return name.replace(".experts.", ".")


def blocked(padding: Tensor, queries: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """An additive attention mask [B, 1, queries, keys] from padding [B, keys] (True: padding)."""
    hidden = padding[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        hidden = hidden | torch.ones(queries, padding.shape[1]).triu(1).bool()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def encoder_layer(case: Case, check: Check) -> None:
    """Each expert alone, and by token, by position (the reference's "level 1"), by sentence."""
    compared, (layer, chooser) = Compared(case, check), built(case, "encoder")
    x = case.tensors["x"]
    padding = case.tensors.get("padding_mask", torch.zeros(x.shape[:2], dtype=torch.bool))
    mask = blocked(padding, x.shape[1], False, x.dtype)
    choices: dict[str, Choice] = {
        f"train_expert{e}": e for e in range(case.data["hyper"]["num_experts"])
    }
    for name, given, shape in (
        ("eval_token_level", "token_choice", (-1, -1)),
        ("eval_reference_level1", "position_choice", (1, -1)),
        ("sentence_level_true", "sentence_choice", (-1, 1)),
    ):
        if given in case.tensors:
            chosen = case.tensors[given]
            chosen = chosen if chosen.dim() == 2 else chosen.reshape(shape)
            choices[name] = chosen.expand(x.shape[:2]).flatten()
    for name, choice in choices.items():
        chooser.choice = choice
        compared.close(name, first(layer(x, attention_mask=mask)))
    compared.finish()


@torch.no_grad()
def decoder_layer(case: Case, check: Check) -> None:
    """Each expert alone, behind causal attention and attention to an encoder's output."""
    compared, (layer, chooser) = Compared(case, check), built(case, "decoder")
    x, source = case.tensors["x"], case.tensors["encoder_out"]
    length = x.shape[1]
    nothing = torch.zeros(x.shape[:2], dtype=torch.bool)
    own = blocked(nothing, length, bool(case.data["hyper"].get("causal", True)), x.dtype)
    hidden = case.tensors.get(
        "encoder_padding_mask", torch.zeros(source.shape[:2], dtype=torch.bool)
    )
    across = blocked(hidden, length, False, x.dtype)
    for e in range(case.data["hyper"]["num_experts"]):
        chooser.choice = e
        output = layer(
            x,
            attention_mask=own,
            encoder_hidden_states=source,
            encoder_attention_mask=across,
            use_cache=False,
        )
        compared.close(f"train_expert{e}", first(output))
    compared.finish()


def two_pass_step(case: Case, check: Check) -> None:
    """Both passes as one doubled batch: losses, every gradient, and who has none."""
    compared, (layer, chooser) = Compared(case, check), built(case, "encoder")
    hyper, target = case.data["hyper"], case.tensors["target"]
    weight = case.tensors["out_weight"].clone().requires_grad_()
    chooser.choice = (hyper["pass1_expert"], hyper["pass2_expert"])
    x = torch.cat([case.tensors["x"]] * 2)
    padding = torch.cat([target == hyper["pad_id"]] * 2)
    hidden = first(layer(x, attention_mask=blocked(padding, x.shape[1], False, x.dtype)))
    logits = list((hidden @ weight.T).chunk(2))
    for i, one in enumerate(logits, start=1):
        compared.close(f"logits{i}", one)
    compare_losses(case, compared, logits).backward()
    assert weight.grad is not None
    compared.close("grad.out_weight", weight.grad)
    none = set()
    for name, parameter in layer.named_parameters():
        if parameter.grad is None:
            none.add(theirs(name))
        else:
            compared.close(f"grad.{theirs(name)}", parameter.grad)
    without = set(case.data.get("parameters_without_grad", none))
    check.true(none == without, f"without gradient: {sorted(none)}, not {sorted(without)}")
    compared.finish()


KINDS: dict[str, Callable[[Case, Check], None]] = {
    "consistency_loss": loss,
    "consistency_loss_extreme": extreme_loss,
    "encoder_layer": encoder_layer,
    "decoder_layer": decoder_layer,
    "two_pass_step": two_pass_step,
}
