"""Cases of ModuleFormer: whole models by `from_pretrained`, router losses, and its attention.

A whole model is copied to a directory of its own and loaded as a user loads it, by the Auto
classes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache

from moduli.losses.mutual_information import (
    accumulated,
    mutual_information_loss,
    router_statistics,
    switch_z_loss,
)
from tests.parity.adapters import moduleformer_attention
from tests.parity.case import Case, Check

LOSSES = {"mi": mutual_information_loss, "switch": switch_z_loss}


class Compared:
    """Compares tensors of one file by name and remembers which; a case differs by its own
    tolerances."""

    def __init__(self, check: Check, want: Mapping[str, Tensor]) -> None:
        self.check, self.want = check, want
        self.seen: set[str] = set()

    def close(self, name: str, got: Tensor | None, tolerance: float) -> None:
        if name not in self.want:
            return
        self.seen.add(name)
        want = self.want[name].double()
        if got is None:
            self.check.problems.append(f"{name}: nothing came out")
            return
        have = got.detach().double()
        if have.numel() == want.numel() == 1:
            have = have.reshape(want.shape)
        if have.shape != want.shape:
            self.check.problems.append(
                f"{name}: shape {tuple(have.shape)}, not {tuple(want.shape)}"
            )
            return
        error = float((have - want).abs().max()) if want.numel() else 0.0
        self.check.largest = max(self.check.largest, error)
        self.check.true(error <= tolerance, f"{name}: off by {error:.3g}, allowed {tolerance:.3g}")

    def same(self, name: str, got: Tensor) -> None:
        if name in self.want:
            self.seen.add(name)
            equal = got.shape == self.want[name].shape and torch.equal(got, self.want[name])
            self.check.true(equal, f"{name}: differs")

    def finish(self, inputs: set[str]) -> None:
        left = sorted(set(self.want) - self.seen - inputs)
        self.check.true(not left, f"not compared: {', '.join(left)}")


def tolerance_of(case: Case, *names: str, default: float) -> float:
    """The first of the case's tolerances that it has."""
    given = case.data.get("tolerance", {})
    return next((float(given[name]) for name in names if name in given), default)


@contextmanager
def loaded(case: Case, auto: Any, **changes: Any) -> Iterator[Any]:
    """The model of a case, from a directory with its two files."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        config = json.loads((case.folder / case.data["config"]).read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(
            (case.folder / case.data["checkpoint"]).read_bytes()
        )
        yield auto.from_pretrained(folder, dtype=getattr(torch, case.data.get("dtype", "float32")))


# --- language models ------------------------------------------------------------------------------


def causal_lm(case: Case, check: Check) -> None:
    """Everything a stored language model gives: one pass, masks, chunks, generation, gradients."""
    io = load_file(case.folder / case.data["io"])
    compared = Compared(check, io)
    # The reference counts padding in its auxiliary loss.
    with loaded(case, AutoModelForCausalLM, count_padding=True) as model:
        model.eval()
        one_pass(case, compared, model)
        masked(case, compared, model)
        chunks(case, compared, model)
        generation(case, compared, model)
        gradients(case, check, model, io)
    given = ("input_ids", "labels", "attn_mask_", "token_type_ids", "gen.prompt", "gen_left.prompt",
             "gen_left.mask")  # fmt: skip
    compared.finish({name for name in io if name.startswith(given)})


def one_pass(case: Case, compared: Compared, model: Any) -> None:
    io, near = compared.want, tolerance_of(case, "logits_abs", "abs", default=1e-4)
    loss = tolerance_of(case, "loss_abs", "abs", default=2e-5)
    with torch.no_grad():
        told = {"output_hidden_states": True, "output_attentions": True}
        out = model(io["input_ids"], labels=io.get("labels"), output_router_logits=True, **told)
    compared.close("logits", out.logits, near)
    compared.close("loss", out.loss, loss)
    compared.close("aux_loss", out.aux_loss, loss)
    weight = model.config.aux_loss_weight
    if out.loss is not None:
        compared.close("ce_loss", out.loss - weight * out.aux_loss, loss)
    for i, hidden in enumerate(out.hidden_states):
        compared.close(f"hidden.{i}", hidden, near)
    for i, weights in enumerate(out.attentions):
        compared.close(f"attn.{i}", weights[:1], near)
    balance_loss = LOSSES.get(model.config.aux_loss_type, switch_z_loss)
    each = [
        balance_loss(router_statistics(logits, experts))
        for logits, experts in zip(out.router_logits, out.router_experts, strict=True)
    ]
    compared.close("aux_att", torch.stack(each[::2]), loss)
    compared.close("aux_mlp", torch.stack(each[1::2]), loss)
    for i, (logits, experts) in enumerate(zip(out.router_logits, out.router_experts, strict=True)):
        name = f"route.{'mlp' if i % 2 else 'att'}.{i // 2}"
        probs = logits.softmax(-1)
        compared.close(f"{name}.logits", logits, near)
        compared.close(f"{name}.probs", probs, near)
        compared.close(f"{name}.gate", probs.gather(1, experts), near)
        if f"{name}.idx" in io:
            compared.seen.add(f"{name}.idx")
            equal = torch.equal(experts.sort(1).values, io[f"{name}.idx"].sort(1).values)
            compared.check.true(equal, f"{name}.idx: other experts")
    if "token_type_ids" in io:
        with torch.no_grad():
            out = model(io["input_ids"], token_type_ids=io["token_type_ids"])
        compared.close("logits_token_type", out.logits, near)


def masked(case: Case, compared: Compared, model: Any) -> None:
    io, near = compared.want, tolerance_of(case, "logits_abs", "abs", default=1e-4)
    loss = tolerance_of(case, "loss_abs", "abs", default=2e-5)
    for name in [name for name in io if name.startswith("attn_mask_")]:
        side = name.removeprefix("attn_mask_")
        with torch.no_grad():
            out = model(
                io["input_ids"], attention_mask=io[name], labels=io.get("labels"),
                output_router_logits=True,
            )  # fmt: skip
        # What stands at places of padding means nothing, and is equal all the same.
        compared.close(f"logits_{side}_mask", out.logits, near)
        compared.close(f"loss_{side}_mask", out.loss, loss)
        compared.close(f"aux_{side}_mask", out.aux_loss, loss)


def chunks(case: Case, compared: Compared, model: Any) -> None:
    io, near = compared.want, tolerance_of(case, "logits_abs", "abs", default=1e-4)
    if "prefix_len" not in case.data:
        return
    length, ids = int(case.data["prefix_len"]), io["input_ids"]

    def second(mask: Tensor | None, use_cache: bool = True) -> tuple[Tensor, DynamicCache]:
        first = None if mask is None else mask[:, :length]
        # Without the cache the past is not looked at, and a mask would be of its own tokens.
        with torch.no_grad():
            past = model(ids[:, :length], attention_mask=first, use_cache=True).past_key_values
            kept = (
                [layer.keys.clone() for layer in past.layers],
                [layer.values.clone() for layer in past.layers],
            )
            out = model(
                ids[:, length:], attention_mask=mask, past_key_values=past, use_cache=use_cache
            )
        return out.logits, kept

    logits, (keys, values) = second(None)
    compared.close("logits_second_chunk", logits, near)
    for name in [name for name in io if name.startswith("past.")]:
        kind, layer = name.split(".")[1], int(name.split(".")[2].split("_")[0])
        kept = keys[layer] if kind == "k" or not values[layer].numel() else values[layer]
        compared.close(name, kept.transpose(1, 2).flatten(2), near)
    compared.close("logits_second_chunk_nocache", second(None, use_cache=False)[0], near)
    for name in [name for name in io if name.startswith("logits_second_chunk_")]:
        side = name.removeprefix("logits_second_chunk_").removesuffix("_mask")
        if f"attn_mask_{side}" in io:
            compared.close(name, second(io[f"attn_mask_{side}"])[0], near)


def generation(case: Case, compared: Compared, model: Any) -> None:
    io, near = compared.want, tolerance_of(case, "logits_abs", "abs", default=1e-4)
    for name in ("gen", "gen_left"):
        if f"{name}.prompt" not in io:
            continue
        prompt = io[f"{name}.prompt"]
        mask = io.get(f"{name}.mask", torch.ones_like(prompt))
        new = io[f"{name}.sequences"].shape[1] - prompt.shape[1]
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        compared.same(f"{name}.sequences", out.sequences)
        compared.close(f"{name}.scores", torch.stack(out.logits), near)
        compared.close(f"{name}.last_scores", out.logits[-1], near)


def gradients(case: Case, check: Check, model: Any, io: Mapping[str, Tensor]) -> None:
    if "grads" not in case.data:
        return
    model.zero_grad()
    model(io["input_ids"], labels=io.get("labels")).loss.backward()
    near = tolerance_of(case, "grads_rel_to_max", default=1e-4)
    for name, want in load_file(case.folder / case.data["grads"]).items():
        grad = parameter_named(model, name).grad
        if grad is None:
            check.problems.append(f"gradient of {name}: there is none")
            continue
        error = float((grad - want).abs().max() / want.abs().max().clamp_min(1e-12))
        check.true(error <= near, f"gradient of {name}: off by {error:.3g} of its largest")


def parameter_named(model: Any, name: str) -> torch.nn.Parameter:
    """A parameter by its published name."""
    ours = name.replace("mlpf.output_experts.weight", "mlpf.experts.down_proj")
    return model.get_parameter(ours.replace("mlpf.experts.weight", "mlpf.experts.up_proj"))


# --- the rest -------------------------------------------------------------------------------------


def sequence_classification(case: Case, check: Check) -> None:
    """Logits, loss and gradients of a classifier."""
    io = load_file(case.folder / case.data.get("io", "io.safetensors"))
    compared = Compared(check, io)
    near = tolerance_of(case, "abs", default=2e-5)
    said = ("num_labels", "problem_type", "pad_token_id")
    changes = {name: case.data[name] for name in said if name in case.data}
    with loaded(case, AutoModelForSequenceClassification, **changes) as model:
        model.eval()
        given = {name: io.get(name) for name in ("attention_mask", "labels")}
        out = model(io["input_ids"], **given)
        if out.loss is not None:
            out.loss.backward()
        compared.close("logits", out.logits, near)
        compared.close("loss", out.loss, near)
        compared.close("grad_score", model.score.weight.grad, near)
        first = model.transformer.h[0].attn.q_proj.experts.weight
        compared.close("grad_q0", first.grad, near)
    compared.finish({"input_ids", "labels", "attention_mask"})


def router_aux_losses(case: Case, check: Check) -> None:
    """Both losses of given logits, of one call and accumulated, with and without skipped rows."""
    io, k = case.tensors, case.data["top_k"]
    compared = Compared(check, io)
    near = tolerance_of(case, "abs", default=2e-6)
    for name in [name for name in io if name.endswith(".loss")]:
        kind, calls, rows, _ = name.split(".")
        several = [n for n in io if n.startswith("logits.")]
        several.sort(key=lambda n: int(n.rpartition(".")[2]))
        names = ["one.logits"] if calls == "one" else several
        masks = [n.replace("logits", "skip_mask") for n in names]
        given = [io[n].clone().requires_grad_() for n in names]
        found = []
        chosen = k if isinstance(k, list) else [k] * len(given)
        for logits, mask, top_k in zip(given, masks, chosen, strict=False):
            real = io[mask].flatten() != 0 if rows == "skip" else None
            experts = logits.softmax(-1).topk(top_k).indices
            found.append(router_statistics(logits, experts, real, zero_padding=True))
        loss = LOSSES[kind](accumulated(found))
        loss.backward()
        compared.close(name, loss, near)
        for i, logits in enumerate(given):
            compared.close(f"{kind}.{calls}.{rows}.dlogits.{i}", logits.grad, near)
    compared.finish({n for n in io if n.startswith(("one.", "logits.", "skip_mask."))})


KINDS: dict[str, Callable[[Case, Check], None]] = {
    "causal_lm": causal_lm,
    "router_aux_losses": router_aux_losses,
    "sequence_classification": sequence_classification,
    "stickbreaking_attention": moduleformer_attention.stickbreaking_attention,
    "stickbreaking_attention_remainder": moduleformer_attention.stickbreaking_attention_remainder,
}
