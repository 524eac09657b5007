"""What to compose: the base, the experts with their prompts, and how gates and the rest are made.

A recipe can be read from YAML or JSON in the keys of mergekit-moe, so that a file written for it
works here:

    base_model: base/
    gate_mode: hidden
    experts_per_token: 2
    experts:
      - source_model: coder/
        positive_prompts: ["def main():"]
        negative_prompts: ["Dear Sir"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from moduli.errors import ConfigError, DataError, UnknownNameError, nearest
from moduli.surgery.stock import StockRule

GateMode = Literal[
    "hidden",
    "hidden_last",
    "hidden_avg",
    "hidden_avg_padded",
    "ffn_input",
    "cheap_embed",
    "random",
    "uniform_random",
]
Others = Literal["base", "average"]
Vocab = Literal["same", "pad", "zero_pad"]

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
# The names mergekit-moe gives to its output architectures.
_ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
# Key of mergekit-moe -> field of the recipe; the other fields are known by their own names.
_KEYS = {
    "base_model": "base",
    "gate_mode": "gate",
    "experts_per_token": "top_k",
    "shared_experts": "shared",
    "architecture": "target",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A fine-tune that gives the FFNs of one expert, in every layer.

    Attributes:
        model: its directory.
        positive_prompts: texts of the kind that should go to this expert.
        negative_prompts: texts that should not.
        noise_scale: standard deviation of Gaussian noise added to the expert's weights, so that
            copies of one model can part in later training.
        residual_scale: factor on the expert's output.
    """

    model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes the result.

    Attributes:
        base: directory of the model all sources are fine-tunes of; gives tokenizer and, with
            `others="base"`, attention, norms and embeddings.
        experts: one source per expert.
        shared: a source for the shared expert, which runs for every token; only some classes
            have one.
        target: `model_type` of the MoE class; None takes the one that fits.
        top_k: experts per token.
        rule: see `moduli.surgery.stock.StockRule`.
        gate: how routers start. From the base's hidden states on an expert's prompts, as they
            enter each layer: "hidden" and "hidden_last" at the last token, "hidden_avg" averaged
            over the tokens of a prompt, "hidden_avg_padded" over its padding too (what
            mergekit-moe calls hidden_avg). "ffn_input" averages what the router itself will
            see, the normalised input of the FFN. "cheap_embed" sums token embeddings, the same
            in every layer. "random" is standard normal, "uniform_random" the start of a
            `torch.nn.Linear`.
        gate_dtype: in which the base runs on the prompts; mergekit-moe uses bfloat16.
        others: where attention, norms and embeddings come from: the base, or the average of the
            experts' sources.
        vocab: "same" refuses sources with another vocabulary. The others take the largest one
            when averaging and average a row over the sources that have it ("pad"), or with
            zeros for those that lack it ("zero_pad", as MixtureKit).
        dtype: of the weights written; None: that of the base.
        seed: of random gates and of noise.
        force: compose equal sources or equal prompts all the same.
    """

    base: str
    experts: tuple[Source, ...]
    shared: Source | None = None
    target: str | None = None
    top_k: int = 2
    rule: StockRule = "renormalised"
    gate: GateMode = "hidden"
    gate_dtype: str = "float32"
    others: Others = "base"
    vocab: Vocab = "same"
    dtype: str | None = None
    seed: int = 0
    force: bool = False

    @property
    def needs_prompts(self) -> bool:
        return self.gate not in ("random", "uniform_random")

    def check(self) -> None:
        """Raise where the recipe cannot work, before anything is read.

        Raises:
            ConfigError: says which setting, and what would work.
        """
        if len(self.experts) < 2:
            raise ConfigError(f"{len(self.experts)} experts given; a mixture needs at least 2")
        if not 1 <= self.top_k <= len(self.experts):
            raise ConfigError(
                f"top_k is {self.top_k}, but there are {len(self.experts)} experts; "
                f"choose 1 to {len(self.experts)}"
            )
        choices = {"gate": GateMode, "others": Others, "vocab": Vocab, "rule": StockRule}
        for name, kind in choices.items():
            _known(name, getattr(self, name), get_args(kind))
        for name in ("gate_dtype", "dtype"):
            if getattr(self, name) is not None:
                _known(name, getattr(self, name), DTYPES)
        if not self.force and len({str(Path(e.model).resolve()) for e in self.experts}) == 1:
            raise ConfigError(
                f"all experts are {Path(self.experts[0].model).name}: the result would cost more "
                "and compute the same until it is trained. Force it if training comes next"
            )
        if self.needs_prompts:
            self._check_prompts()

    def _check_prompts(self) -> None:
        for number, expert in enumerate(self.experts):
            if not expert.positive_prompts:
                raise ConfigError(
                    f"expert {number} ({Path(expert.model).name}) has no positive prompts, which "
                    f"gate={self.gate!r} needs; give some, or use gate='random' and train the "
                    "routers"
                )
        prompts = {(e.positive_prompts, e.negative_prompts) for e in self.experts}
        if len(prompts) == 1 and not self.force:
            raise ConfigError(
                "the prompts of all experts are the same, so no router could tell them apart; "
                "give each expert prompts of its own kind"
            )


def read_recipe(path: str | Path, resolve: Callable[[str], str] = str, **changes: Any) -> Recipe:
    """A recipe from a YAML or JSON file.

    Args:
        path: the file; keys as in mergekit-moe, or the names of the recipe's fields.
        resolve: turns the name of a model into its directory.
        **changes: fields that replace those of the file.

    Raises:
        DataError: the file cannot be read, or lacks a key.
        UnknownNameError: a key does not exist.
        ConfigError: a value has the wrong type.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise DataError(f"{path} holds no keys; a recipe starts with base_model and experts")
    known = {f.name for f in fields(Recipe)}
    values = {_key(key, _KEYS, known, path): value for key, value in data.items()}
    values = {key: value for key, value in values.items() if value is not None}
    if missing := {"base", "experts"} - set(values):
        names = {"base": "base_model", "experts": "experts"}
        raise DataError(f"{path} has no {' and no '.join(names[m] for m in sorted(missing))}")
    values["base"] = resolve(_text(values["base"], "base_model"))
    values["experts"] = tuple(_source(e, path, resolve) for e in _list(values["experts"]))
    if "shared" in values:
        values["shared"] = _one_shared(_list(values["shared"]), path, resolve)
    if "target" in values:
        values["target"] = _ARCHITECTURES.get(values["target"].lower(), values["target"])
    return replace(Recipe(**values), **changes)


def _source(entry: Any, path: str | Path, resolve: Callable[[str], str]) -> Source:
    if not isinstance(entry, Mapping):
        raise DataError(f"{path}: an expert is {entry!r}; it needs source_model and prompts")
    known = {f.name for f in fields(Source)}
    values = {_key(k, {"source_model": "model"}, known, path): v for k, v in entry.items()}
    values = {key: value for key, value in values.items() if value is not None}
    if "model" not in values:
        raise DataError(f"{path}: an expert has no source_model")
    values["model"] = resolve(_text(values["model"], "source_model"))
    for name in ("positive_prompts", "negative_prompts"):
        if name in values:
            values[name] = tuple(_text(p, name) for p in _list(values[name]))
    return Source(**values)


def _one_shared(
    entries: Sequence[Any], path: str | Path, resolve: Callable[[str], str]
) -> Source | None:
    if len(entries) > 1:
        raise ConfigError(f"{path} has {len(entries)} shared experts; a stock class has one")
    return _source(entries[0], path, resolve) if entries else None


def _key(key: str, renamed: Mapping[str, str], known: set[str], path: str | Path) -> str:
    name = renamed.get(key, key)
    if name not in known:
        offered = (known - set(renamed.values())) | set(renamed)
        raise UnknownNameError(f"{path} has an unknown key {key!r}. {nearest(str(key), offered)}")
    return name


def _list(value: Any) -> Sequence[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise ConfigError(f"a list was expected, not {value!r}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}; it has to be a text")
    return value


def _known(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UnknownNameError(f"{name} is {value!r}. {nearest(str(value), choices)}")
