"""Train the routers of a stock MoE model and nothing else, with the stock Trainer.

For a model composed of fine-tunes: the experts are good already, only who goes where is a guess.
The loss is that of the language model plus the balance loss of the class, both as transformers
computes them; all other weights stay bit for bit.

Letters: S tokens of a block, K experts per token.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moduli.errors import CheckpointError, ConfigError, DataError, ModelError
from moduli.surgery.compose.write import replace_tensors
from moduli.surgery.files import COMPOSED
from moduli.surgery.stock import STOCK


@dataclass(frozen=True)
class WarmupResult:
    """What the warm-up did; the model was trained in place.

    Attributes:
        steps: optimiser steps.
        losses: loss of every step, balance loss included.
        trained: names of the parameters that were trained.
    """

    steps: int
    losses: tuple[float, ...]
    trained: tuple[str, ...]


def warm_up_routers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    balance: float = 0.01,
    batch_size: int = 4,
    block: int = 128,
    seed: int = 0,
    on_progress: Callable[[Any], None] | None = None,
) -> WarmupResult:
    """Train `model`'s routers in place.

    Where the weights of the chosen experts sum to 1 and K is 1, the only weight is 1 whatever the
    router says, and the language-model loss cannot teach it. Such a model is trained with K = 2
    and gets its K back.

    Args:
        model: of a class in `moduli.surgery.stock.STOCK`, in float32 or bfloat16. Routers are
            trained in float32 and get the model's dtype back.
        tokenizer: its tokenizer.
        texts: of the kinds that the experts are for, mixed.
        steps: optimiser steps of AdamW, with linear decay.
        learning_rate: at the start.
        balance: weight of the balance loss.
        batch_size: blocks per step.
        block: S; texts are joined and cut into blocks of this length.
        seed: order of the blocks.
        on_progress: called with a `moduli.training.callbacks.Progress` after each step.

    Raises:
        ModelError: not a stock MoE class, or in a dtype that cannot be trained in.
        ConfigError: a setting cannot work.
        DataError: the texts do not fill one block.
        TrainingError: the loss or the gradient became infinite or NaN.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from moduli.training.callbacks import ReportProgress, StopOnNonFinite

    if steps < 1 or batch_size < 1 or block < 2 or learning_rate <= 0 or balance < 0:
        raise ConfigError(
            f"steps {steps}, batch_size {batch_size}, block {block}, learning_rate "
            f"{learning_rate} and balance {balance} were given; all but balance have to be above "
            "0, and a block has 2 tokens or more"
        )
    routers = find_routers(model)
    blocks = _blocks(tokenizer, texts, block)
    with (
        tempfile.TemporaryDirectory(prefix="moduli-") as scratch,
        _trainable(model, routers, balance),
    ):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            per_device_train_batch_size=batch_size,
            use_cpu=not torch.accelerator.is_available(),
            bf16=model.dtype == torch.bfloat16,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=cast("Any", blocks),
            callbacks=[StopOnNonFinite()],
        )
        trainer.remove_callback(PrinterCallback)
        if on_progress is not None:
            trainer.add_callback(ReportProgress(on_progress))
        trainer.train()
    losses = tuple(float(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    return WarmupResult(trainer.state.global_step, losses, tuple(routers))


def warm_up_checkpoint(
    directory: str | Path, texts: Sequence[str], **settings: Any
) -> WarmupResult:
    """As `warm_up_routers`, for a composed directory, whose routers are replaced in place.

    Args:
        directory: written by `moduli.compose`.
        texts: see `warm_up_routers`.
        **settings: those of `warm_up_routers`.

    Raises:
        CheckpointError: the directory does not load, or cannot be written to.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(directory)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} does not load with its tokenizer: {error}") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    result = warm_up_routers(model, tokenizer, texts, **settings)
    routers = find_routers(model)
    replace_tensors(folder, {n: cast("Tensor", r.weight) for n, r in routers.items()})
    record = folder / COMPOSED
    if record.is_file():
        data = json.loads(record.read_text(encoding="utf-8"))
        data["warm_up"] = {"steps": result.steps, "losses": result.losses}
        record.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return result


def find_routers(model: Any) -> dict[str, nn.Module]:
    """The routers of a stock MoE model, by the names of their weights in a checkpoint.

    Raises:
        ModelError: the model is of another class.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    stock = next((entry for entry in STOCK if entry.moe == kind), None)
    if stock is None:
        known = ", ".join(sorted({entry.architecture for entry in STOCK}))
        raise ModelError(f"{type(model).__name__} is no stock MoE class that moduli knows: {known}")
    return {stock.router_tensor(i): layer.mlp.gate for i, layer in enumerate(model.model.layers)}


@contextmanager
def _trainable(model: Any, routers: dict[str, nn.Module], balance: float) -> Iterator[None]:
    """Routers in float32 and alone trainable; the class's balance loss on; then all as it was."""
    dtype = model.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"the model is in {dtype}; load it in float32 or bfloat16 to train it")
    config, training = model.config, model.training
    changed = ("output_router_logits", "router_aux_loss_coef", "use_cache")  # the last by Trainer
    was = {name: getattr(config, name) for name in changed}
    top_k = config.num_experts_per_tok
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    fixed = not getattr(config, "norm_topk_prob", True)  # the weight at K = 1 is a probability
    _set(model, routers, top_k if fixed else max(top_k, 2), balance)
    config.output_router_logits = True
    for router in routers.values():
        router.float().requires_grad_(True)
    try:
        yield
    finally:
        for router in routers.values():
            router.to(dtype)
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
        model.train(training)
        _set(model, routers, top_k, was["router_aux_loss_coef"])
        for name, value in was.items():
            setattr(config, name, value)


def _set(model: Any, routers: dict[str, nn.Module], top_k: int, balance: float) -> None:
    for router in routers.values():
        router.top_k = top_k  # type: ignore[assignment]
    model.num_experts_per_tok = top_k
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = balance


def _blocks(tokenizer: Any, texts: Sequence[str], length: int) -> list[dict[str, list[int]]]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not cut:
        raise DataError(f"the texts have {len(ids)} tokens, too few for one block of {length}")
    return [{"input_ids": block, "labels": block} for block in cut]
