"""Which parameters a run trains: all, the head, the last blocks, or low-rank factors (LoRA).

`prepare` says so to a model, dense or converted, before `finetune`; `finish` takes it back after.
Factors are merged into the weights then, so that what comes back is the ordinary model again.
With LoRA everything else is frozen but what has no pretrained weights to stay close to: the head,
learned routers, and experts with parameters of their own. They are trained as PEFT's
`modules_to_save`, so that a checkpoint of the Trainer, which holds the adapter only, has them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from moduli.errors import ConfigError, TrainingError
from moduli.routing import AvgKRouter
from moduli.surgery.locate import stacks, survey
from moduli.surgery.modular import routed_layers
from moduli.surgery.projection import base_of, is_conv1d, is_linear
from moduli.surgery.stochastic import stochastic_projections
from moduli.training.settings import FinetuneSettings

_BEFORE = "_moduli_trained_before"  # names of the parameters that `finish` lets train again

ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("Wqkv",),
    ("qkv_proj",),
    ("qkv",),
)
"""Names of the projections of query and value, for families that PEFT has no default for."""


def prepare(model: nn.Module, settings: FinetuneSettings) -> nn.Module:
    """The model to train, in which `settings.trains` says what is trained.

    Call it after `moduli.convert`. Factors of LoRA are drawn from torch's generator. Parameters
    that were frozen before stay frozen.

    Args:
        model: a transformers model, dense or converted.
        settings: `trains` and the settings of LoRA.

    Returns:
        `model`, or for LoRA a `PeftModel` around it.

    Raises:
        ConfigError: the model has no head, fewer blocks, or no layers for the factors.
    """
    if settings.trains == "all":
        return model
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    if settings.trains == "lora":
        prepared = _with_factors(model, settings)
    else:
        prepared = model
        if settings.last_blocks is None:
            chosen = _head_parameters(model)
            if not chosen:
                raise ConfigError(_no_head(model))
        else:
            chosen = _head_parameters(model) | _last_blocks(model, settings.last_blocks)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before and name in chosen)
    setattr(model, _BEFORE, before)
    return prepared


def finish(model: nn.Module) -> nn.Module:
    """The ordinary model that `prepare` was given, trained; factors are in its weights.

    Raises:
        TrainingError: merging the factors would make weights infinite or NaN.
    """
    host = model
    merge: Any = getattr(model, "merge_and_unload", None)
    if merge is not None:
        try:
            host = merge(safe_merge=True)
        except ValueError as error:
            raise TrainingError(f"The factors cannot be merged into the weights: {error}") from None
    before = host.__dict__.pop(_BEFORE, None)
    if before is not None:
        for name, parameter in host.named_parameters():
            parameter.requires_grad_(name in before)
    return host


def expect_updates(model: nn.Module) -> None:
    """Make gates that copy the keys do so at the next pass, since an adapter's checkpoint has none.

    For a checkpoint of the whole model this changes nothing: its copies are those of its keys.
    """
    for layer in routed_layers(model).values():
        if isinstance(layer.router, AvgKRouter) and layer.router.momentum == 0:
            layer.router.stale = True


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Children beside the pretrained part that have parameters, by name.

    The output embeddings of a language model are no head: they are pretrained like the rest.
    """
    base = getattr(model, "base_model", model)
    if base is model:
        return {}
    pretrained = (base, getattr(model, "get_output_embeddings", lambda: None)())
    return {
        name: module
        for name, module in model.named_children()
        if module not in pretrained and any(True for _ in module.parameters())
    }


def _head_parameters(model: nn.Module) -> set[str]:
    """Names of all parameters outside the pretrained part, and of the pooler in front of them.

    A pooler is fitted to what a model was pretrained for. Frozen, it hides from the head what the
    blocks know: on MiniLM nothing is learnt behind it.
    """
    heads = head_modules(model)
    base: Any = getattr(model, "base_model", model)
    if heads and isinstance(pooler := getattr(base, "pooler", None), nn.Module):
        heads[f"{model.base_model_prefix}.pooler"] = pooler
    found = {f"{name}.{inner}" for name, module in heads.items() for inner in _names(module)}
    return found | _loose_parameters(model)


def _loose_parameters(model: nn.Module) -> set[str]:
    """Parameters that the model itself holds beside its pretrained part."""
    if getattr(model, "base_model", model) is model:
        return set()
    return {name for name, _ in model.named_parameters(recurse=False)}


def _names(module: nn.Module) -> Iterator[str]:
    return (name for name, _ in module.named_parameters())


def _no_head(model: nn.Module) -> str:
    return (
        f"trains='head', but {type(model).__name__} has no head of its own: a language model's "
        "output embeddings belong to the pretrained model. Train last:1, lora or all"
    )


def _last_blocks(model: nn.Module, count: int) -> set[str]:
    """Parameters of the last blocks of every stack, and of what comes after them in it."""
    chosen: set[str] = set()
    for stack, blocks in _blocks(model).items():
        if count > len(blocks):
            raise ConfigError(
                f"trains='last:{count}', but {stack or type(model).__name__} has {len(blocks)} "
                f"blocks; choose last:1 to last:{len(blocks)}"
            )
        for path in (*blocks[-count:], *_following(model, blocks[-1], stack)):
            chosen |= {f"{path}.{name}" for name in _names(model.get_submodule(path))}
    return chosen


def _blocks(model: nn.Module) -> dict[str, list[str]]:
    """Names of the transformer blocks of every stack, in order.

    A block is the smallest element of a `ModuleList` with both an FFN, be it dense or of experts,
    and an attention.
    """
    found, near = survey(model)
    ffns = {f.name for f in found} | {r.name for r in near} | set(routed_layers(model))
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            members = [f"{name}.{i}" for i in range(len(module))]
            blocks += [path for path in members if _is_block(model, path, ffns)]
    smallest = [b for b in blocks if not any(other.startswith(f"{b}.") for other in blocks)]
    by_stack = {
        stack: [b for b in smallest if not stack or b.startswith(f"{stack}.")]
        for stack in stacks(model)
    }
    if not any(by_stack.values()):
        raise ConfigError(
            f"trains='last:N', but no blocks of an attention and an FFN were found in "
            f"{type(model).__name__}; train all or lora"
        )
    return {stack: found for stack, found in by_stack.items() if found}


def _is_block(model: nn.Module, path: str, ffns: set[str]) -> bool:
    attends = any(
        "attention" in type(module).__name__.lower()
        for module in model.get_submodule(path).modules()
    )
    return attends and any(name == path or name.startswith(f"{path}.") for name in ffns)


def _following(model: nn.Module, path: str, stack: str) -> Iterator[str]:
    """What stands after a block in the modules that hold it, up to its stack: norms, poolers."""
    whole = getattr(model, "base_model", model) is model
    root = "" if whole else str(model.base_model_prefix)
    while path not in (stack, root, ""):
        parent, _, name = path.rpartition(".")
        children = list(dict(model.get_submodule(parent).named_children()))
        later = children[children.index(name) + 1 :]
        # OPT defines its final norm before its blocks, BART the norm of its embeddings after them.
        for sibling in [c for c in children if "final" in c and c not in later] + later:
            if "embed" not in sibling:
                yield f"{parent}.{sibling}" if parent else sibling
        path = parent


def _with_factors(model: nn.Module, settings: FinetuneSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if loose := _loose_parameters(model):
        raise ConfigError(
            f"trains='lora', but {', '.join(sorted(loose))} of {type(model).__name__} belongs to "
            "no module, so that PEFT neither trains nor saves it; train all or last:N"
        )
    _require_savable_gates(model)
    in_full = [*head_modules(model), *_learned_parts(model)]
    targets = _targets(model, settings)
    # What is trained in full gets no factors on top.
    outside = "|".join(map(re.escape, in_full))
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        exclude_modules=rf"({outside})(\..*)?" if in_full else None,
        modules_to_save=in_full or None,
        fan_in_fan_out=any(map(is_conv1d, model.modules())),
    )
    try:
        # Without a task type: the wrappers for tasks call the model past its hooks.
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"lora_targets {targets!r} do not fit {type(model).__name__}: {error} Name linear "
            "layers of the model with --lora-targets"
        ) from error
    return adapted


def _learned_parts(model: nn.Module) -> list[str]:
    """Names of learned routers, banks of experts and copies of projections that train."""
    parts: set[nn.Module] = set()
    for layer in routed_layers(model).values():
        own = (getattr(layer, "experts", None), getattr(layer, "residual", None))
        parts |= {part for part in (layer.router, *own) if isinstance(part, nn.Module)}
    for projection in stochastic_projections(model).values():
        parts |= set(projection.experts)
    return [
        name
        for name, module in model.named_modules()
        if module in parts and any(p.requires_grad for p in module.parameters())
    ]


def _require_savable_gates(model: nn.Module) -> None:
    for name, layer in routed_layers(model).items():
        if isinstance(layer.router, AvgKRouter) and layer.router.momentum not in (None, 0):
            raise ConfigError(
                f"trains='lora', but the gate of {name} is an average over earlier steps "
                f"(momentum {layer.router.momentum}), which a checkpoint of an adapter does not "
                "hold, so that a resumed run would differ. Use a gate without momentum"
            )


def _targets(model: nn.Module, settings: FinetuneSettings) -> list[str] | str:
    """Names for PEFT: those given, its own for the family, or those of query and value."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if settings.lora_targets:
        given = list(settings.lora_targets)
        return "all-linear" if given == ["all-linear"] else given
    config: Any = getattr(model, "config", None)
    default = DEFAULTS.get(getattr(config, "model_type", ""))
    if default is not None:
        return list(default) if not isinstance(default, str) else default
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(base_of(m))}
    for known in ATTENTION:
        if names.issuperset(known):
            return list(known)
    raise ConfigError(
        f"PEFT has no default layers for LoRA in {type(model).__name__}, and no query and value "
        "projections were found in it; name layers with --lora-targets, of "
        f"{', '.join(sorted(names))}"
    )
