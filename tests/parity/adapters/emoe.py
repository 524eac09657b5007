"""Cases of EMoE and its relatives, run through the functions and the layers of the library.

A layer case is run twice: once on stacked expert tensors with the kernels, and, where the experts
are a partition, once as users meet it, on a host module with the seam installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moduli.experts import gather_experts, members_of, run_experts, scatter_experts
from moduli.experts.ffn import ExpertFFN, merged_out_bias
from moduli.losses.balance import load_importance_loss
from moduli.routing import (
    AvgKRouter,
    CosineRouter,
    LinearRouter,
    RouteContext,
    Router,
    Routing,
    Rule,
    capacity,
    gate_from_keys,
    retie,
    slots,
)
from moduli.surgery.convert import Split, install, permute_neurons, split_bias
from moduli.surgery.families import FAMILIES
from moduli.surgery.locate import FFN
from moduli.surgery.partition import balanced_clusters, explained_variance
from moduli.surgery.partition.quality import unit_keys
from moduli.surgery.routed import Pass, SeamOptions
from moduli.surgery.seam import RoutedActivation
from tests.parity.adapters import emoe_splits
from tests.parity.case import Case, Check

FAMILY = {family.name: family for family in FAMILIES}
NAME = "layer"


def activation_of(case: Case) -> Callable[[Tensor], Tensor]:
    """The activation that the config describes in words."""
    words = case.config["activation"].split()[0]
    return ACT2FN[{"gelu": "gelu", "gelu_new": "gelu_new"}.get(words, words)]


# --- layers -------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """A host with the names of a ViT MLP (nn.Linear) or of a GPT-2 MLP (Conv1D)."""

    def __init__(self, case: Case, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        w1, w2 = case.given("w1").clone(), case.given("w2").clone()
        conv = is_conv(case)
        hidden, width = (w1.shape) if conv else (w1.shape[1], w1.shape[0])
        first = Conv1D(width, hidden) if conv else nn.Linear(hidden, width)
        last = Conv1D(hidden, width) if conv else nn.Linear(width, hidden)
        self.family = FAMILY["gpt2" if conv else "vit"]
        setattr(self, self.family.first, first)
        setattr(self, self.family.last, last)
        setattr(self, self.family.act, activation)
        self.dropout = nn.Identity()
        with torch.no_grad():
            first.weight.copy_(w1)
            first.bias.copy_(case.given("b1"))
            last.weight.copy_(w2)
            last.bias.copy_(case.given("b2"))

    def forward(self, x: Tensor) -> Tensor:
        part = {n: getattr(self, n) for n in (self.family.first, self.family.last, self.family.act)}
        hidden = part[self.family.act](part[self.family.first](x))
        return self.dropout(part[self.family.last](hidden))

    def ffn(self) -> FFN:
        return FFN(NAME, 0, self.family, self)


def is_conv(case: Case) -> bool:
    return str(case.config.get("layout", "")).startswith("Conv1D")


def rule_of(config: Mapping[str, Any], **changes: Any) -> Rule:
    settings: dict[str, Any] = {
        "top_k": config["top_k"],
        "combine": "one" if config["one_score"] else "softmax",
        "noise": float(config["gate_noise"]),
        "capacity_factor": float(config["capacity_factor"]),
        "prioritized": bool(config["batch_prioritized_routing"]),
        "route_padding": True,
    }
    return Rule(**{**settings, **changes})


def router_of(case: Case, rule: Rule, keys: Tensor, sizes: tuple[int, ...]) -> Router:
    gate, experts = str(case.config["gate"]), len(sizes)
    if gate.startswith("avg-k"):
        normalize = bool(case.config.get("normalize_gate_input", False))
        return AvgKRouter(lambda: keys, sizes, rule, normalize=normalize, momentum=0.0)
    hidden = case.given("x").shape[-1]
    if gate.startswith("cosine"):
        weight = case.given("cos_proj_weight")
        router = CosineRouter(hidden, experts, rule, projection=weight.shape[0])
        with torch.no_grad():
            router.projector.weight.copy_(weight)
            router.projector.bias.copy_(case.given("cos_proj_bias"))
            router.directions.copy_(case.given("cos_sim_matrix"))
            router.temperature.copy_(case.given("cos_temperature"))
        return router
    return LinearRouter(hidden, experts, rule, init=case.given("gate_weight"))


def moe_layer(case: Case, check: Check) -> None:
    config = case.config
    w1, w2 = case.given("w1"), case.given("w2")
    keys, values = (w1.T, w2) if is_conv(case) else (w1, w2.T)
    members = members_for(case, keys.shape[0])
    out_bias = bias_for(case)
    experts = gather_experts(keys, values, members, key_bias=case.given("b1"), out_bias=out_bias)
    stacked = {
        "w1": torch.stack(list(experts.keys)).clone().requires_grad_(),
        "b1": torch.stack(list(experts.key_bias or ())).clone().requires_grad_(),
        "w2": torch.stack(list(experts.values)).clone().requires_grad_(),
        "b2": out_bias.clone().requires_grad_(),
    }
    for name, tensor in stacked.items():
        check.same(f"expert_{name}", tensor.detach())
    experts = ExpertFFN(
        stacked["w1"].unbind(), stacked["w2"].unbind(), stacked["b1"].unbind(), None, None,
        stacked["b2"],
    )  # fmt: skip
    sizes = tuple(len(m) for m in members)
    router = router_of(case, rule_of(config), stacked["w1"].detach().flatten(0, 1), sizes)
    if isinstance(router, AvgKRouter):
        check.close("gate_weight", router.current_gate())
    x = case.given("x").clone().requires_grad_()
    flat = x.flatten(0, -2)
    noise = case.given("noise") if case.has_input("noise") else None
    context = RouteContext(training=noise is not None, noise=noise)
    routing = router(flat, context)
    compare_routing(case, check, routing, rule_of(config))
    aux = load_importance_loss(
        routing.scores, routing.noisy_scores, config["top_k"], float(config["gate_noise"]),
        compare="probabilities",
    )  # fmt: skip
    check.close("l_aux", aux)
    act = activation_of(case)
    y = run_experts(flat, routing, experts, act, "loop").reshape(x.shape)
    check.close("y", y)
    check.close("y", run_experts(flat, routing, experts, act, "eager").reshape(x.shape), "y eager")
    undropped = Routing(routing.experts, routing.weights)
    check.close("y_nodrop", run_experts(flat, undropped, experts, act).reshape(x.shape))
    dense = act(flat @ keys.T + case.given("b1")) @ values + case.given("b2")
    check.close("y_dense", dense.reshape(x.shape))
    if case.has_input("cotangent"):
        loss = (y * case.given("cotangent")).sum() + config["aux_loss_weight_in_grads"] * aux
        loss.backward()
        check.close("loss", loss)
        check.close("grad_x", x.grad)
        for name, tensor in stacked.items():
            check.close(f"grad_expert_{name}", tensor.grad)
        compare_gate_grads(check, router)
    if config.get("expert_repeat", 1) == 1 and not config.get("full_copies"):
        moe_layer_in_host(case, check, len(members))


def members_for(case: Case, width: int) -> list[Tensor]:
    experts = case.config["num_experts"]
    if case.config.get("full_copies"):
        return [torch.arange(width)] * experts
    return members_of(case.given("labels").long(), experts, case.config.get("expert_repeat", 1))


def bias_for(case: Case) -> Tensor:
    b2, experts = case.given("b2"), case.config["num_experts"]
    if "full" in str(case.config["bias2"]):
        return b2.expand(experts, -1).clone()
    return split_bias(b2, experts, case.config["top_k"])


def compare_routing(case: Case, check: Check, routing: Routing, rule: Rule, at: str = "") -> None:
    assert routing.scores is not None
    assert routing.noisy_scores is not None
    experts = routing.scores.shape[1]
    probs = routing.noisy_scores.softmax(-1)
    place = slots(routing.experts, experts, probs.amax(-1) if rule.prioritized else None)
    tokens = place.shape[0]
    limit = most = int(place.max()) + 1
    if rule.capacity_factor != 0:
        limit = capacity(tokens, experts, rule.top_k, rule.capacity_factor)
    if rule.capacity_factor < 0:
        limit = min(limit, most)
    kept = torch.ones_like(place, dtype=torch.bool) if routing.active is None else routing.active
    check.close("logits", routing.scores)
    check.close("noisy_logits", routing.noisy_scores)
    check.close("probs", probs)
    check.same(f"{at}topk_ids", routing.experts)
    check.same(f"{at}locations", place)
    check.close(f"{at}gate_values", routing.weights)
    check.same(f"{at}kept", kept)
    check.same(f"{at}capacity", limit)
    check.same(f"{at}dropped_slots", int((~kept).sum()))
    load = torch.bincount(routing.experts.flatten(), minlength=experts)
    check.same(f"{at}expert_load", load)
    check.same(f"{at}expert_load_before_drop", load)


def compare_gate_grads(check: Check, router: Router) -> None:
    names = {
        "temperature": "temperature",
        "directions": "sim_matrix",
        "projector.weight": "cosine_projector.weight",
        "projector.bias": "cosine_projector.bias",
    }
    for name, parameter in router.named_parameters():
        check.close(f"grad_gate.0.{names.get(name, name)}", parameter.grad)


def moe_layer_in_host(case: Case, check: Check, experts: int) -> None:
    """The same layer as users meet it: `install` on a host module."""
    config = case.config
    block = PlainBlock(case, activation_of(case)).train()
    ffn = block.ffn()
    labels = case.given("labels").long()
    permute_neurons(ffn, labels.argsort(stable=True))
    shared = Pass()
    noise = case.given("noise") if case.has_input("noise") else None
    if noise is not None:
        shared.noise[NAME] = noise
    # Without a stored sample the reference ran in evaluation: no noise, but the same loss.
    rule = rule_of(config)
    options = SeamOptions(aux="load_importance_paper")
    shares = "full" not in str(config["bias2"])
    split = Split(
        lambda f, sizes: router_of(case, rule, f.keys().detach().clone(), sizes),
        options,
        "split" if shares else "shared",
        config["top_k"],
    )
    layer = install(ffn, tuple(torch.bincount(labels, minlength=experts).tolist()), split, shared)
    if noise is None:
        layer.eval()
    x = case.given("x").clone().requires_grad_()
    y = block(x)
    check.close("y", y, "y of the host")
    if not case.has_input("cotangent"):
        return
    assert layer.auxiliary is not None
    assert layer.out_bias is not None
    loss = (y * case.given("cotangent")).sum()
    loss = loss + config["aux_loss_weight_in_grads"] * layer.auxiliary
    loss.backward()
    check.close("loss", loss, "loss of the host")
    check.close("grad_x", x.grad, "grad_x of the host")
    compare_host_grads(check, ffn, layer, experts)


def compare_host_grads(check: Check, ffn: FFN, layer: RoutedActivation, experts: int) -> None:
    first, last = ffn.first, ffn.last
    conv = ffn.family.name == "gpt2"
    keys = first.weight.grad.T if conv else first.weight.grad
    values = last.weight.grad if conv else last.weight.grad.T
    grads = {"w1": keys, "b1": first.bias.grad, "w2": values}
    for name, grad in grads.items():
        check.close(f"grad_expert_{name}", grad.unflatten(0, (experts, -1)), f"host grad {name}")
    check.close("grad_expert_b2", layer.out_bias.grad, "host grad b2")
    compare_gate_grads(check, layer.router)


# --- gates --------------------------------------------------------------------------------------


def gate(case: Case, check: Check) -> None:
    config = case.config
    keys = case.given("expert_keys")
    sizes = (keys.shape[1],) * keys.shape[0]
    flat = keys.flatten(0, 1)
    normalize = bool(config["normalize_gate"])
    weight = gate_from_keys(flat, sizes, normalize=normalize)
    check.close("gate_weight", weight)
    noise = case.given("noise") if case.has_input("noise") else None
    context = RouteContext(training=noise is not None, noise=noise)
    for one in config["configs"]:
        rule = rule_of({**config, **one, "one_score": True})
        router = AvgKRouter(lambda: flat, sizes, rule, normalize=normalize)
        routing = router(case.given("x"), context)
        at = f"c{one['index']}."
        compare_routing(case, check, routing, rule, at)
        limit = capacity_said(routing, rule)
        check.true(limit == one["capacity"], f"{at}capacity is {limit}, expected {one['capacity']}")
        dropped = 0 if routing.active is None else int((~routing.active).sum())
        check.true(
            dropped == one["dropped_slots"],
            f"{at}{dropped} slots dropped, expected {one['dropped_slots']}",
        )
        loss = load_importance_loss(
            routing.scores, routing.noisy_scores, rule.top_k, rule.noise, compare="probabilities"
        )
        check.close(f"{at}l_aux", loss)


def capacity_said(routing: Routing, rule: Rule) -> int:
    """Capacity as the reference states it: with factor <= 0 never more than is used."""
    assert routing.noisy_scores is not None
    tokens, experts = routing.noisy_scores.shape
    priority = routing.noisy_scores.softmax(-1).amax(-1) if rule.prioritized else None
    most = int(slots(routing.experts, experts, priority).max()) + 1
    if rule.capacity_factor == 0:
        return most
    limit = capacity(tokens, experts, rule.top_k, rule.capacity_factor)
    return min(limit, most) if rule.capacity_factor < 0 else limit


def gate_update(case: Case, check: Check) -> None:
    config = case.config
    keys, values = case.given("expert_w1"), case.given("expert_w2")
    after = retie(
        case.given("gate_weight_before"),
        keys.flatten(0, 1),
        (keys.shape[1],) * keys.shape[0],
        momentum=float(config["momentum"]),
        normalize=bool(config["normalize"]),
        values=values.flatten(0, 1) if config.get("value_norm_weighted") else None,
    )
    check.close("gate_weight_after", after)


# --- gated FFNs ---------------------------------------------------------------------------------


class GatedBlock(nn.Module):
    """A host with the names of a Llama MLP."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = case.given(name).clone()
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight)
            setattr(self, name, layer)
        self.act_fn = activation_of(case)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def moe_layer_swiglu(case: Case, check: Check) -> None:
    config = case.config
    labels = case.given("labels").long()
    x = case.given("x")
    sizes = tuple(torch.bincount(labels, minlength=config["num_experts"]).tolist())
    check.close("y_dense", GatedBlock(case)(x))
    for select in config["select_rules"]:
        block = GatedBlock(case)
        ffn = FFN(NAME, 0, FAMILY["llama"], block)
        permute_neurons(ffn, labels.argsort(stable=True))
        for name in ("gate_proj", "up_proj", "down_proj"):
            check.same(f"{name}_rearranged", getattr(block, name).weight.detach())
        shared, seen = Pass(), []
        shared.record = lambda name, routing, real, seen=seen: seen.append(routing)
        split = Split(
            lambda f, s: AvgKRouter(f.keys, s, Rule(config["top_k"])),
            SeamOptions(select=select, path="masked"),
            "shared",
            config["top_k"],
        )
        layer = install(ffn, sizes, split, shared)
        check.close(f"{select}.y", block(x))
        check.close(f"{select}.scores", seen[0].scores)
        check.same(f"{select}.topk_ids", seen[0].experts)
        if select == "gate":  # the one rule with a fast path
            layer.options = SeamOptions(select=select, path="fast")
            check.close(f"{select}.y", block(x), f"{select}.y fast")


# --- back to dense, selection, clustering -------------------------------------------------------


def merge_to_dense(case: Case, check: Check) -> None:
    config = case.config
    tensors = {n: case.given(f"expert_{n}") for n in ("w1", "b1", "w2", "b2")}
    experts = ExpertFFN(
        tensors["w1"].unbind(), tensors["w2"].unbind(), tensors["b1"].unbind(), None, None,
        tensors["b2"],
    )  # fmt: skip
    members = members_of(case.given("labels").long(), config["num_experts"])
    keys, bias, values = scatter_experts(experts, members)
    b2 = merged_out_bias(tensors["b2"], config["top_k"])
    check.same("w1", keys)
    check.same("b1", bias)
    check.same("w2", values.T)
    check.close("b2", b2)
    x, act = case.given("x"), activation_of(case)
    check.close("y_dense", F.linear(act(F.linear(x, keys, bias)), values.T, b2))
    sizes = tuple(len(m) for m in members)
    router = AvgKRouter(lambda: torch.cat(list(experts.keys)), sizes, Rule(config["top_k"]))
    routing = router(x, RouteContext())
    check.same("topk_ids", routing.experts)
    check.close("y_emoe_nodrop", run_experts(x, routing, experts, act))


def selection_variants(case: Case, check: Check) -> None:
    labels = case.given("labels").long()
    sizes = tuple(torch.bincount(labels, minlength=case.config["num_experts"]).tolist())
    x = case.given("x")
    check.close("y_dense", PlainBlock(case, activation_of(case))(x))
    for name, choose in (("top_k", "top"), ("bottom_k", "bottom"), ("not_top_k", "not_top")):
        rule = Rule(case.config["top_k"], choose=choose)
        for path in ("masked", "fast"):
            block = PlainBlock(case, activation_of(case))
            ffn = block.ffn()
            permute_neurons(ffn, labels.argsort(stable=True))
            shared, seen = Pass(), []
            shared.record = lambda name, routing, real, seen=seen: seen.append(routing)
            options = SeamOptions(path=path)
            split = Split(
                lambda f, s, rule=rule: AvgKRouter(f.keys, s, rule), options, "shared", rule.top_k
            )
            install(ffn, sizes, split, shared)
            check.close(f"{name}.y", block(x), f"{name}.y {path}")
            check.close("scores", seen[0].scores)
            check.same(f"{name}.ids_sorted", seen[0].experts.sort(-1).values)


def clustering(case: Case, check: Check) -> None:
    weights = _weights_of(case)
    for item in case.data["items"]:
        keys = weights(item)
        rule = item["pass_rule"]
        where = f"layer {item.get('layer')}, {item['num_experts']} experts"
        # The time that the rule allows is the limit of the search, not a stopwatch beside it.
        limit = rule.get("max_seconds")
        labels = balanced_clusters(keys, item["num_experts"], time_limit=limit)
        counts = torch.bincount(labels, minlength=item["num_experts"])
        check.true(int(counts.max() - counts.min()) <= 1, f"{where}: sizes {counts.tolist()}")
        if "expert_size" in item:
            check.true(bool((counts == item["expert_size"]).all()), f"{where}: sizes differ")
        quality = explained_variance(unit_keys(keys), labels)
        wanted = rule.get("stretch_explained", rule["min_explained"])
        check.largest = max(check.largest, (wanted - quality.explained) / wanted)
        check.true(
            quality.explained >= wanted,
            f"{where}: explained {quality.explained:.2f}, the bar is {wanted:.2f}",
        )
        check.true(
            abs(quality.total - item["total_ss"]) <= 1e-6 * item["total_ss"],
            f"{where}: total {quality.total}, expected {item['total_ss']}",
        )
        for tool in ("reference", "swap"):
            stored = case.tensors.get(f"labels.{tool}.layer{item.get('layer')}.N{counts.numel()}")
            said = item["reference" if tool == "reference" else "swap_search"]["objective"]
            if stored is not None:
                found = explained_variance(unit_keys(keys), stored.long()).objective
                check.true(
                    abs(found - said) <= 1e-6 * said,
                    f"{where}: objective of the {tool} labels is {found}, expected {said}",
                )


def _weights_of(case: Case) -> Callable[[Mapping[str, Any]], Tensor]:
    """Reads the weights that a clustering case names: its own tensors, or the real MiniLM's."""
    import hashlib

    def read(item: Mapping[str, Any]) -> Tensor:
        name = item["tensor"]
        if name in case.tensors:
            return case.tensors[name]
        from safetensors import safe_open

        from moduli.data import fetch

        with safe_open(fetch("minilm") / "model.safetensors", framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
        digest = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
        if digest != item["weight_sha256"]:
            raise AssertionError(f"{name} has sha256 {digest}, expected {item['weight_sha256']}")
        return weight

    return read


KINDS: dict[str, Callable[[Case, Check], None]] = {
    "clustering": clustering,
    "gate": gate,
    "gate_update": gate_update,
    "merge_to_dense": merge_to_dense,
    "moe_layer": moe_layer,
    "moe_layer_swiglu": moe_layer_swiglu,
    "selection_variants": selection_variants,
    **emoe_splits.KINDS,
}
