"""The properties that a cell of the support table stands for, each checked on a tiny model.

A check builds what it needs, and asserts. Where moduli refuses, its reason becomes the result;
where the stock model cannot do it either, or there is nothing to check, it does not apply.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

import moduli
from moduli.errors import ModuliError
from moduli.methods.base import Method
from moduli.methods.registry import get_method, method_names
from moduli.surgery.checkpoint import own_tensors
from moduli.surgery.modular import routed_layers
from moduli.surgery.owned import OwnedExperts
from moduli.surgery.projection import base_of, is_conv1d, is_linear
from moduli.surgery.stochastic import stochastic_projections
from tests import families

# Of these every method takes the settings that it has.
SETTINGS = {"num_experts": 6, "top_k": 2, "layers": "all", "projection": 8, "router_epochs": 2}
LENGTH = 6
ATTENTION = re.compile(
    r"(^|\.)(q_proj|qkv_proj|query|query_key_value|q_lin|q|Wqkv|c_attn|query_proj)$"
)


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        status: whether the property holds; "n/a" where it does not apply.
        reason: why it does not.
    """

    status: Literal["yes", "no", "n/a", "FAILED"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class NotApplicableError(Exception):
    """Raised by a check that has nothing to check."""


@dataclass(frozen=True)
class Case:
    """One cell of the table, and a folder for its files."""

    family: str
    method: str
    folder: Path

    def dense(self) -> Any:
        return families.build(self.family)

    def converted(self, **changes: Any) -> Any:
        model = self.dense()
        moduli.convert(model, config(self.method, **changes), batch=self.batch)
        return model

    @property
    def batch(self) -> dict[str, Tensor]:
        return families.inputs(self.family)

    @torch.no_grad()
    def outputs(self, model: Any) -> Tensor:
        return families.outputs(model, self.batch)


def methods() -> list[str]:
    """Every method that makes experts."""
    return [name for name in method_names() if get_method(name).modular]


def config(method: str, **changes: Any) -> Method:
    """A method with settings for tiny models."""
    kind = get_method(method)
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in {**SETTINGS, **changes}.items() if k in known})


def round_trip(case: Case) -> None:
    """Merging an untrained model restores every tensor bit for bit."""
    model = case.dense()
    before, settings = digests(model), model.config.to_dict()
    moduli.convert(model, config(case.method), batch=case.batch)
    assert moduli.is_modular(model)
    copied = [module for module in stochastic_projections(model).values() if module.last]
    assert len(routed_layers(model)) + len(copied) == families.ffn_count(case.family)
    moduli.merge(model)
    assert digests(model) == before, "tensors differ after conversion and merging"
    assert model.config.to_dict() == settings, "the config differs"


def save_and_load(case: Case) -> None:
    """Outputs of a trained model survive saving; its ordinary part is the merged model."""
    model = case.converted()
    perturb(model)
    expected = case.outputs(model)
    moduli.save(model, case.folder / "ours", batch=case.batch)
    model.save_pretrained(case.folder / "bare")
    for folder in ("ours", "bare"):
        loaded = moduli.load(case.folder / folder)
        assert moduli.is_modular(loaded)
        assert torch.equal(case.outputs(loaded), expected), f"outputs differ after load ({folder})"
    plain, found = type(model).from_pretrained(case.folder / "ours", output_loading_info=True)
    assert not found["missing_keys"], found
    assert not found["unexpected_keys"], found
    moduli.merge(model)
    assert torch.equal(case.outputs(plain.eval()), case.outputs(model)), "the merged model differs"


def names(case: Case) -> None:
    """Tensors in files are called as those of the dense model, whoever wrote the files."""
    model = case.dense()
    model.save_pretrained(case.folder / "dense")
    dense = stored_names(case.folder / "dense")
    moduli.convert(model, config(case.method), batch=case.batch)
    moduli.save(model, case.folder / "ours", batch=case.batch)
    ours = case.folder / "ours"
    (ours / "moduli.safetensors").unlink(missing_ok=True)
    assert stored_names(ours) == dense, "the ordinary part has other names"
    if not owned(model) and not stochastic_projections(model):
        model.save_pretrained(case.folder / "bare")
        bare = stored_names(case.folder / "bare")
        assert dense <= bare, f"save_pretrained lacks {sorted(dense - bare)}"
        assert len(bare - dense) == len(own_tensors(model)), sorted(bare - dense)


def lora(case: Case) -> None:
    """LoRA learns: on the FFN of a split model; in and beside experts of their own; on copies."""
    from peft import LoraConfig, get_peft_model

    model = case.converted()
    banks, copied = owned(model), stochastic_projections(model)
    if banks:
        named = model.named_modules()
        targets = [name for name, m in named if ATTENTION.search(name) and is_linear(m)]
    elif copied:
        targets = [
            f"{name}.experts.{e}" for name, m in copied.items() for e in range(len(m.experts))
        ]
    else:
        targets = [f"{ffn.name}.{path}" for ffn in find_layers(model) for path in ffn.projections]
    assert targets, "no projection to put an adapter on"
    transposed = is_conv1d(base_of(model.get_submodule(targets[0])))
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=targets, fan_in_fan_out=transposed, init_lora_weights=False),
    ).train(not copied)  # a training pass draws one copy; evaluation takes the mean of all
    for bank in banks:
        bank.experts.requires_grad_(True)
    families.outputs(adapted, case.batch).square().mean().backward()
    factors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * len(targets)
    require_gradients(factors)
    if banks:
        require_gradients({f"{b.path}.experts": b.experts.down_proj for b in banks})
        lora_in_experts(case)


def lora_in_experts(case: Case) -> None:
    """PEFT's `target_parameters` on the stacked tensors learn, and can be merged into them."""
    from peft import LoraConfig, get_peft_model

    model = case.converted()
    targets = {
        f"experts.{name}"
        for bank in owned(model)
        for name, p in bank.experts.named_parameters()
        if p.dim() == 3
    }
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2, target_modules=[], target_parameters=sorted(targets), init_lora_weights=False
        ),
    )
    families.outputs(adapted, case.batch).square().mean().backward()
    factors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(factors) == 4 * len(owned(case.converted()))
    require_gradients(factors)
    expected = case.outputs(adapted)
    plain = case.outputs(adapted.merge_and_unload())
    error = float((plain - expected).norm() / expected.norm())
    assert error < 1e-4, f"merging adapters into experts changes outputs by {error:.1e}"


def require_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """Every one of them has a gradient that is not zero."""
    without = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient in {without}"


def compiled(case: Case) -> None:
    """The model compiles as one graph and computes the same."""
    if not stock_compiles(case.family):
        raise NotApplicableError("the stock model does not compile as one graph")
    model = case.converted()
    plain = case.outputs(model)
    torch._dynamo.reset()  # nothing of another cell counts against the limits of this one
    fast = case.outputs(torch.compile(model, fullgraph=True, backend="aot_eager"))
    error = float((fast - plain).norm() / plain.norm())
    assert error < 1e-4, f"the compiled model differs by {error:.1e}"


def generate(case: Case) -> None:
    """Tokens do not depend on the cache; with every expert they are the dense model's, and with
    copies that are still equal."""
    if case.family not in families.GENERATIVE:
        raise NotApplicableError("it does not generate")
    prompt = prompts(case.family)
    stock = tokens(case.dense(), prompt)
    model = case.converted()
    greedy = tokens(model, prompt)
    assert greedy.shape == stock.shape
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(tokens(model, prompt, **other), greedy), f"{other} changes tokens"
    for search in ({"num_beams": 2}, {"do_sample": True}):
        torch.manual_seed(0)
        assert tokens(model, prompt, **search).shape == stock.shape
    layers = routed_layers(model).values()
    if stochastic_projections(model):
        assert torch.equal(greedy, stock), "with equal copies tokens differ"
    elif all(layer.router.rule.combine == "one" for layer in layers):
        moduli.set_top_k(model, min(layer.num_experts for layer in layers))
        assert torch.equal(tokens(model, prompt), stock), "with every expert tokens differ"


CHECKS: dict[str, Callable[[Case], None]] = {
    "round trip": round_trip,
    "save": save_and_load,
    "names": names,
    "LoRA": lora,
    "compile": compiled,
    "generate": generate,
}


def run_check(name: str, family: str, method: str) -> Result:
    """The result of one check of one cell."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CHECKS[name](Case(family, method, Path(folder)))
        except NotApplicableError as error:
            return Result("n/a", str(error))
        except ModuliError as error:
            return Result("no", _reason(str(error), folder))
        except Exception as error:
            return Result("FAILED", f"{type(error).__name__}: {error}".partition("\n")[0])
    return Result("yes")


def run_cell(family: str, method: str, checks: Iterable[str] = CHECKS) -> dict[str, Result]:
    """Results of some checks by name; the first alone where conversion is refused."""
    found: dict[str, Result] = {}
    for name in checks:
        found[name] = run_check(name, family, method)
        if name == next(iter(CHECKS)) and found[name].status == "no":
            break
    return found


def _reason(message: str, folder: str) -> str:
    """A refusal without what differs from layer to layer and from run to run."""
    closest = re.search(r"Closest:\n  [\w.]+: (.*)", message)
    text = message.partition(". Looked for")[0] if closest is None else closest[1]
    text = re.sub(rf"{re.escape(folder)}\S*", "the directory", text)
    text = re.sub(r"^[\w.]+\.[\w.]+: ", "", text)  # the name of a module
    return text.partition("\n")[0].rstrip(".")


# --- parts of the checks ------------------------------------------------------------------------


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor."""
    return {
        name: hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in model.state_dict().items()
    }


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in the files of a checkpoint."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def owned(model: nn.Module) -> list[OwnedExperts]:
    return [m for m in model.modules() if isinstance(m, OwnedExperts)]


def find_layers(model: nn.Module) -> list[Any]:
    return [layer.ffn for layer in routed_layers(model).values()]


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every parameter of the layers with experts, as training does."""
    for layer in routed_layers(model).values():
        dense = () if isinstance(layer, OwnedExperts) else layer.ffn.projections.values()
        for part in (layer, *dense):
            for parameter in part.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.01 * torch.randn_like(parameter))
    for projection in stochastic_projections(model).values():
        for parameter in projection.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


@cache
def stock_compiles(family: str) -> bool:
    """Whether the dense model compiles as one graph."""
    torch._dynamo.reset()
    model = torch.compile(families.build(family), fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            model(**families.inputs(family))
    except Exception:  # whatever it trips over
        return False
    return True


def prompts(family: str) -> dict[str, Tensor]:
    """Two prompts of one length."""
    generator = torch.Generator().manual_seed(1)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    ids = torch.randint(3, families.VOCAB, (2, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens(model: Any, prompt: dict[str, Tensor], **settings: Any) -> Tensor:
    """What a model generates, always of the same length."""
    lengths = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    settings = {"do_sample": False, "pad_token_id": 0, **lengths, **settings}
    found: Tensor = model.generate(**prompt, **settings)
    return found
