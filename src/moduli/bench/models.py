"""The bench of whole models: tuning steps and generation, dense against converted, taking turns.

Letters: B batch, S sequence, N experts, k experts per token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import moduli.data
from moduli.bench.machine import Machine
from moduli.bench.protocol import ROUNDS, Clock, measure
from moduli.bench.rows import Entry
from moduli.bench.settings import Settings, scope
from moduli.errors import ConfigError
from moduli.methods.api import convert
from moduli.methods.emoe import EMoE
from moduli.surgery.convert import set_top_k

Task = Literal["tune", "generate"]

# With all experts a converted model computes what the dense one does.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
TEXTS = "sentiment"


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """One model doing one thing.

    Attributes:
        model: a name that `moduli fetch` knows, or a directory.
        task: "tune": forward, backward and AdamW; or "generate": greedy, with a cache.
        experts: N, in all layers.
        top_k: k.
        batch: B.
        length: S in tuning, tokens of the prompt in generation.
        new_tokens: tokens to generate.
        dtype: of the model.
        threads: of the process.
    """

    model: str
    task: Task
    experts: int = 16
    top_k: int = 4
    batch: int = 32
    length: int = 128
    new_tokens: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one call: trained on, or generated."""
        return self.batch * (self.length if self.task == "tune" else self.new_tokens)

    @property
    def label(self) -> str:
        """Short and unique among cases."""
        size = f"{self.batch} x {self.length} tokens"
        if self.task == "generate":
            size += f" and {self.new_tokens} new ones"
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.model} {self.task}, {size}, {self.dtype}{threads}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ModelRow:
    """A model measured under one of the settings.

    Attributes:
        entries: "dense" and "emoe", times of one call.
        text: what the tokens are.
    """

    case: ModelCase
    settings: Settings
    device: str
    entries: tuple[Entry, ...]
    text: str

    def per_second(self, name: str) -> float | None:
        """Tokens per second."""
        ms = next((e.ms for e in self.entries if e.name == name), None)
        return None if ms is None else 1000 * self.case.tokens / ms

    @property
    def speedup(self) -> float | None:
        """Tokens per second of the converted model over those of the dense one."""
        dense, emoe = self.per_second("dense"), self.per_second("emoe")
        return None if dense is None or emoe is None else emoe / dense

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rates = {e.name: self.per_second(e.name) for e in self.entries}
        return {
            **asdict(self),
            "label": self.case.label,
            "tokens_per_second": rates,
            "speedup": self.speedup,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelRow:
        """The inverse of `to_dict`; ratios are derived anew."""
        names = Entry.__dataclass_fields__
        return cls(
            case=ModelCase(**data["case"]),
            settings=data["settings"],
            device=data["device"],
            entries=tuple(
                Entry(**{k: v for k, v in e.items() if k in names}) for e in data["entries"]
            ),
            text=data["text"],
        )


def default_case(model: str, task: Task, **changes: Any) -> ModelCase:
    """The case of a task: 32 texts of 128 tokens to tune on, or one prompt of 32 to go on from."""
    size = {} if task == "tune" else {"batch": 1, "length": 32}
    return ModelCase(**{"model": model, "task": task, **size, **changes})


def measure_model(
    case: ModelCase,
    machine: Machine,
    *,
    settings: Settings = "tuned",
    rounds: int = ROUNDS,
    clock: Clock | None = None,
) -> ModelRow:
    """Measure a model against itself converted by EMoE, in this process.

    Args:
        case: the case; the process should have as many threads as it says.
        machine: of this process.
        settings: what both run under; `moduli.bench.settings.prepare` went before.
        rounds: rounds of the protocol.
        clock: what to time with; that of the device by default.

    Raises:
        ConfigError: the prompt and the new tokens do not fit into the model.
    """
    device = torch.device(machine.device)
    path = _directory(case.model)
    ids, text = _tokens(case, path)
    ids = ids.to(device)
    entries: dict[str, Entry] = {}
    calls: dict[str, Callable[[], object]] = {}
    with scope(settings, device):
        models = {name: _load(case, path).to(device) for name in ("dense", "emoe")}
        method = EMoE(num_experts=case.experts, top_k=case.top_k, layers="all")
        convert(models["emoe"], method)
        error = _deviation(models, ids, case)
        for name, model in models.items():
            note = None
            if name == "emoe" and not error <= TOLERANCE[case.dtype]:
                note = f"wrong: with all experts it deviates from the dense model by {error:.1e}"
            entries[name] = Entry(
                name, "kernel" if name == "emoe" else "dense", error=error, note=note
            )
            if note is None:
                make = _tuning if case.task == "tune" else _generating
                calls[name] = make(model, ids, case)
        timings = measure(
            calls,
            clock or Clock.of(device, case.threads),
            rounds=rounds,
            rng=random.Random(0),
        )
    timed = tuple(e.timed(timings[n]) if n in timings else e for n, e in entries.items())
    return ModelRow(case, settings, machine.device, timed, text)


def _directory(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else moduli.data.fetch(name)


def _load(case: ModelCase, path: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if case.task == "tune" else AutoModelForCausalLM
    torch.manual_seed(0)
    return kind.from_pretrained(path, dtype=getattr(torch, case.dtype))


def _tokens(case: ModelCase, path: Path) -> tuple[Tensor, str]:
    """Token ids [B, S] without padding, and what they are."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    needed = case.length + (case.new_tokens if case.task == "generate" else 0)
    limit = getattr(config, "max_position_embeddings", needed)
    if needed > limit:
        raise ConfigError(f"{needed} tokens do not fit into {case.model}, which takes {limit}")
    count = case.batch * case.length
    if not (path / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(0)
        random_ids = torch.randint(config.vocab_size, (count,), generator=generator)
        return random_ids.view(case.batch, case.length), "random tokens"
    tokenizer = AutoTokenizer.from_pretrained(path)
    domain = next(iter(moduli.data.load_task(TEXTS).domains.values()))
    ids: list[int] = []
    for row in domain.train or ():
        ids += tokenizer(row["text"])["input_ids"]
        if len(ids) >= count:
            break
    if len(ids) < count:
        ids *= -(-count // len(ids))
    return torch.tensor(ids[:count]).view(case.batch, case.length), f"texts of {TEXTS}"


def _deviation(models: Mapping[str, Any], ids: Tensor, case: ModelCase) -> float:
    """Largest deviation of the logits, with all experts, relative to the largest logit."""
    logits = {}
    set_top_k(models["emoe"], case.experts)
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits.float()
    set_top_k(models["emoe"], case.top_k)
    difference = (logits["emoe"] - logits["dense"]).abs().max()
    return float(difference / logits["dense"].abs().max())


def _tuning(model: Any, ids: Tensor, case: ModelCase) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.arange(case.batch, device=ids.device) % model.config.num_labels

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _generating(model: Any, ids: Tensor, case: ModelCase) -> Callable[[], None]:
    model.eval()
    wanted = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
    mask = torch.ones_like(ids)

    def generate() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **wanted)

    return generate
