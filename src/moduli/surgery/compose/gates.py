"""How routers start: one direction per expert, from prompts or at random.

For each expert the base model reads its positive prompts; in every layer the mean hidden state,
less that of the negative prompts, scaled to length 1, becomes the expert's row of the router. A
token is then sent to the experts whose prompts it resembles.

Letters: L layers, E experts, D width, S tokens of a prompt, V vocabulary.
Source: mergekit/moe/router.py of mergekit 0.1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moduli.errors import CheckpointError, DataError
from moduli.surgery.compose.plan import EMBEDDINGS, Plan
from moduli.surgery.compose.recipe import DTYPES, Recipe, Source

MAX_CONDITION = 5.0
"""A layer whose router has a larger condition number can hardly tell some experts apart."""

Read = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, eq=False)
class Gates:
    """Start of all routers.

    Attributes:
        routers: one matrix per layer.
        shared: direction of the shared expert's gate; None: it always counts fully.
        conditions: condition number of each layer's router.
        prompted: whether they come from prompts.
    """

    routers: Float[Tensor, "L E D"]
    shared: Float[Tensor, "L 1 D"] | None
    conditions: tuple[float, ...]
    prompted: bool

    def warnings(self) -> list[str]:
        """What a user should know about these gates."""
        if not self.prompted:
            return ["the routers are random: train them before the model is used"]
        bad = [layer for layer, c in enumerate(self.conditions) if not c <= MAX_CONDITION]
        if not bad:
            return []
        where = "every layer" if len(bad) == len(self.conditions) else f"layers {bad}"
        return [
            f"the router of {where} has a condition number above {MAX_CONDITION:g} (largest "
            f"{max(self.conditions):.3g}): the prompts are too alike, and some experts will hardly "
            "be told apart. Use prompts that differ more, or train the routers"
        ]


def make_gates(layout: Plan, device: str = "cpu") -> Gates:
    """Gates as the recipe asks for.

    Args:
        layout: the plan.
        device: on which the base reads the prompts.

    Raises:
        CheckpointError: the base has no tokenizer for the prompts, or does not load.
        DataError: a prompt has no tokens.
    """
    recipe = layout.recipe
    if not recipe.needs_prompts:
        routers, shared = _random(layout), None
    else:
        read = _reader(layout, device)
        routers = torch.stack([_direction(read, e) for e in recipe.experts], dim=1)
        prompted = recipe.shared is not None and bool(recipe.shared.positive_prompts)
        shared = _direction(read, recipe.shared)[:, None] if prompted and recipe.shared else None
    conditions = tuple(torch.linalg.cond(routers.float()).tolist())
    return Gates(routers, shared, conditions, recipe.needs_prompts)


def _random(layout: Plan) -> Float[Tensor, "L E D"]:
    config = layout.base.config
    generator = torch.Generator().manual_seed(layout.recipe.seed)
    size = (config.num_hidden_layers, len(layout.experts), config.hidden_size)
    if layout.recipe.gate == "random":
        return torch.randn(size, generator=generator)
    return (2 * torch.rand(size, generator=generator) - 1) / math.sqrt(config.hidden_size)


def _direction(read: Read, source: Source) -> Float[Tensor, "L D"]:
    state = read(source.positive_prompts)
    if source.negative_prompts:
        state = state - read(source.negative_prompts)
    return _unit(state)


def _unit(state: Float[Tensor, "L D"]) -> Float[Tensor, "L D"]:
    length: Tensor = state.norm(dim=-1, keepdim=True)
    return state / length.clamp(min=1e-8)


def _reader(layout: Plan, device: str) -> Read:
    """A function from prompts to one state [L, D]."""
    recipe, base = layout.recipe, layout.base
    tokenizer = base.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{base.role} has no tokenizer, which prompts need; add its files, or use gate='random'"
        )
    if recipe.gate == "cheap_embed":
        embeddings = base.read(EMBEDDINGS[0]).float()
        layers = base.config.num_hidden_layers

        def cheap(prompts: Sequence[str]) -> Tensor:
            ids = [i for prompt in prompts for i in _ids(tokenizer, prompt)]
            return _unit(embeddings[ids].sum(0, keepdim=True)).repeat(layers, 1)

        return cheap
    model = _model(recipe, base.directory, device)
    if recipe.gate == "hidden_avg_padded":
        return lambda prompts: _padded_average(model, tokenizer, prompts)
    states = _ffn_inputs if recipe.gate == "ffn_input" else _layer_inputs

    def mean(prompts: Sequence[str]) -> Tensor:
        # One prompt at a time: little memory, and no padding to leave out.
        total = torch.zeros(base.config.num_hidden_layers, base.config.hidden_size)
        for prompt in prompts:
            ids = torch.tensor([_ids(tokenizer, prompt)], device=model.device)
            state = states(model, {"input_ids": ids})[:, 0]
            last = recipe.gate in ("hidden", "hidden_last")
            total += (state[:, -1] if last else state.mean(dim=1)).cpu()
        return total / len(prompts)

    return mean


def _model(recipe: Recipe, directory: Any, device: str) -> Any:
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, DTYPES[recipe.gate_dtype]), use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} does not load: {error}") from error
    return model.eval().to(device)


@torch.no_grad()
def _layer_inputs(model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "L B S D"]:
    """Hidden states as they enter each layer."""
    states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([state.float() for state in states[:-1]])


@torch.no_grad()
def _ffn_inputs(model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "L B S D"]:
    """What each layer's FFN, and so its router, gets."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
        for layer in model.model.layers
    ]
    try:
        model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def _padded_average(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Float[Tensor, "L D"]:
    """Average over all positions of the padded batch, as mergekit-moe's hidden_avg."""
    rows = [_ids(tokenizer, prompt) for prompt in prompts]
    pad = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return _layer_inputs(model, batch).mean(dim=(1, 2)).cpu()


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    text = (tokenizer.bos_token or "") + prompt
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no tokens")
    return ids
