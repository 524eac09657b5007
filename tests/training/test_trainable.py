"""What is trained is what was asked for; the rest keeps its bits, and LoRA leaves no trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertForSequenceClassification, set_seed

import moduli
from moduli.errors import CheckpointError, ConfigError
from moduli.surgery.locate import find_ffns
from moduli.surgery.modular import routed_layers
from moduli.training.callbacks import Progress
from moduli.training.evaluate import predict
from moduli.training.finetune import finetune
from moduli.training.settings import FinetuneSettings
from moduli.training.trainable import finish, head_modules, prepare
from tests import families, tiny
from tests.training import tinykinds

SPLIT = moduli.EMoE(num_experts=6, top_k=2, layers="all")
METHODS: dict[str, Any] = {
    "dense": None,
    "split": SPLIT,
    "copied gate": moduli.EMoE(
        num_experts=6, top_k=2, layers="all", gate_momentum=0.0, normalize_gate=True
    ),
    "learned gate": moduli.EMoE(num_experts=6, top_k=2, layers="all", gate="cosine"),
    "owned experts": moduli.GMoE(num_experts=3, layers="all", projection=8),
}


def settings(**changes: Any) -> FinetuneSettings:
    return FinetuneSettings(
        **{"max_steps": 4, "batch_size": 4, "learning_rate": 0.02, "bf16": False, **changes}
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model: Any, family: str) -> None:
    """One step of gradient descent on everything that has a gradient."""
    model.train()(**tiny.batch(tiny.rows(family, 4))).loss.backward()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimiser.step()
    model.eval()


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}


def test_all_is_the_model_as_it_is() -> None:
    model = tiny.build("bert")
    before = trained(model)
    assert prepare(model, settings()) is model
    assert trained(model) == before
    assert finish(model) is model


@pytest.mark.parametrize(
    ("family", "trains", "expected"),
    [
        ("bert", "head", ("classifier.", "bert.pooler.")),
        ("vit", "head", ("classifier.",)),
        ("bert", "last:1", ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")),
        ("vit", "last:1", ("vit.layers.1.", "vit.layernorm.", "classifier.")),
        ("gpt2", "last:1", ("transformer.h.1.", "transformer.ln_f.")),
        ("llama", "last:1", ("model.layers.1.", "model.norm.")),
    ],
)
@pytest.mark.parametrize("method", ["dense", "split"])
def test_only_the_named_part_changes(
    family: str, trains: str, expected: tuple[str, ...], method: str
) -> None:
    model = tiny.build(family)
    if METHODS[method] is not None:
        moduli.convert(model, METHODS[method])
    all_of_them, before = trained(model), state(model)
    assert prepare(model, settings(trains=trains)) is model
    chosen = {name for name in all_of_them if name.startswith(expected)}
    assert trained(model) == chosen
    step(model, family)
    moved = changed(model, before)
    assert moved <= chosen
    assert all(any(name.startswith(part) for name in moved) for part in expected)
    assert finish(model) is model
    assert trained(model) == all_of_them


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_the_last_blocks_of_both_stacks(family: str) -> None:
    model = families.build(family)
    prepare(model, settings(trains="last:1"))
    names = trained(model)
    for stack in ("encoder", "decoder"):
        assert any(re.search(rf"{stack}\.(block|layers)\.1\.", name) for name in names)
    assert not any(re.search(r"(block|layers)\.0\.[a-z]|embed|shared", name) for name in names)


def test_last_blocks_of_experts() -> None:
    model = tiny.build("bert")
    moduli.convert(model, METHODS["owned experts"])
    prepare(model, settings(trains="last:1"))
    names = trained(model)
    assert any("layer.1" in name and "experts" in name for name in names)
    assert not any("layer.0" in name for name in names)


def test_what_was_frozen_stays_frozen() -> None:
    model = tiny.build("bert")
    model.classifier.bias.requires_grad_(False)
    prepare(model, settings(trains="head"))
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained(model) == {"classifier.weight", *pooler}
    finish(model)
    assert not model.classifier.bias.requires_grad


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_language_model_has_no_head(family: str) -> None:
    model = families.build(family)
    assert head_modules(model) == {}
    with pytest.raises(ConfigError, match="no head of its own"):
        prepare(model, settings(trains="head"))


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ConfigError, match="last:1 to last:2"):
        prepare(tiny.build("bert"), settings(trains="last:3"))


def classifier(method: str) -> nn.Module:
    """A tiny text classifier with dropout, so that the random state matters; one for a method."""
    set_seed(5)
    config = tinykinds.BUILDERS["classification"]()[0].config
    config.hidden_dropout_prob, config.initializer_range = 0.1, 0.1
    model = BertForSequenceClassification(config)
    if METHODS[method] is not None:
        moduli.convert(model, METHODS[method])
    set_seed(7)
    return model


def labelled() -> list[dict[str, Any]]:
    return [
        {"text": row["text"], "label": int(row["label"] == "good")}
        for row in tinykinds.rows("classification")
    ]


class KilledError(Exception):
    pass


def kill(progress: Progress) -> None:
    if progress.step == 3:
        raise KilledError


FFN_TOO = ("intermediate.dense", "query")


@pytest.mark.parametrize(
    ("method", "targets"),
    [*((method, ()) for method in METHODS), ("split", FFN_TOO), ("copied gate", FFN_TOO)],
)
def test_lora_trains_its_part_resumes_bit_for_bit_and_merges(
    method: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    how = settings(trains="lora", lora_rank=3, lora_targets=targets)
    processor, rows = tinykinds.tokenizer(), labelled()

    def run(out: Path | None, on_progress: Callable[[Progress], None] | None = None) -> Any:
        model = prepare(classifier(method), how)
        finetune(
            model,
            processor,
            "classification",
            rows,
            settings=how,
            seed=3,
            out=out,
            checkpoint_every=2,
            on_progress=on_progress,
        )
        return model

    model = run(None)
    before, after = classifier(method), model.get_base_model()
    start = {name.replace(".base_layer", ""): t for name, t in before.state_dict().items()}
    moved = {
        name.replace(".modules_to_save.default", "")
        for name, tensor in after.state_dict().items()
        if (key := name.replace(".modules_to_save.default", "").replace(".base_layer", "")) in start
        and not torch.equal(tensor, start[key])
    }
    allowed = ("classifier", ".router.", ".experts.")
    assert all(any(part in name for part in allowed) for name in moved), moved
    assert any("classifier" in name for name in moved)
    assert any(".router." in name for name in moved) == ("gate" in method or "owned" in method)
    assert any(".experts." in name for name in moved) == ("owned" in method)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert factors
    assert all(bool(p.detach().any()) for p in factors)

    with pytest.raises(KilledError):
        run(tmp_path, kill)
    resumed = run(tmp_path)
    expected, found = model.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []

    said = predict(model, processor, rows)
    merged = finish(model)
    assert type(merged) is type(before)
    assert merged.state_dict().keys() == before.state_dict().keys()
    assert trained(merged) == trained(before)
    torch.testing.assert_close(predict(merged, processor, rows), said, rtol=1e-5, atol=1e-5)
    if METHODS[method] is not None:
        assert routed_layers(merged).keys() == routed_layers(before).keys()
        moduli.merge(merged)
        assert not moduli.is_modular(merged)


def test_an_adapter_is_not_resumed_into_another_order_of_neurons(tmp_path: Path) -> None:
    how = settings(trains="lora", lora_targets=("intermediate.dense",), max_steps=2)

    def run(seed: int) -> int | None:
        model = classifier("dense")
        moduli.convert(model, moduli.EMoE(num_experts=4, top_k=2, split="random", seed=seed))
        result = finetune(
            prepare(model, how),
            tinykinds.tokenizer(),
            "classification",
            labelled(),
            settings=how,
            seed=3,
            out=tmp_path,
            checkpoint_every=1,
        )
        return result.resumed_from

    assert run(seed=0) is None
    assert run(seed=0) == 2
    with pytest.raises(CheckpointError, match="another order"):
        run(seed=1)


def test_half_a_layout_beside_an_adapter_stops_no_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout comes last, when the checkpoint counts as complete already."""
    how = settings(trains="lora", lora_targets=("intermediate.dense",), max_steps=2)

    def run() -> int | None:
        model = classifier("split")
        tuning, data = prepare(model, how), labelled()
        words = tinykinds.tokenizer()
        return finetune(
            *(tuning, words, "classification", data),
            settings=how,
            seed=3,
            out=tmp_path,
            checkpoint_every=1,
        ).resumed_from

    def cut(self: Any, path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_text('{"moduli": {"lay')
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(transformers.BertConfig, "to_json_file", cut)
        with pytest.raises(ZeroDivisionError):
            run()
    assert run() == 1


def test_factors_are_a_function_of_the_seed() -> None:
    one, other = (prepare(classifier("dense"), settings(trains="lora")) for _ in range(2))
    same = state(one)
    assert all(torch.equal(tensor, same[name]) for name, tensor in other.state_dict().items())


def test_a_gate_that_averages_over_steps_cannot_be_resumed_and_is_refused() -> None:
    model = tiny.build("bert")
    moduli.convert(model, moduli.EMoE(num_experts=6, top_k=2, layers="all", gate_momentum=0.5))
    with pytest.raises(ConfigError, match="without momentum"):
        prepare(model, settings(trains="lora"))


@pytest.mark.parametrize("targets", [("no_such_layer",), ("embeddings",)])
def test_targets_that_do_not_fit(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--lora-targets"):
        prepare(tiny.build("bert"), settings(trains="lora", lora_targets=targets))


def test_families_that_peft_has_no_default_for() -> None:
    model: Any = prepare(families.build("modernbert"), settings(trains="lora"))
    assert model.peft_config["default"].target_modules == {"Wqkv"}


def test_all_linear_layers_but_those_that_train_in_full() -> None:
    model: Any = tiny.build("bert")
    moduli.convert(model, METHODS["learned gate"])
    adapted: Any = prepare(model, settings(trains="lora", lora_targets=("all-linear",)))
    with_factors = {n for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert any("intermediate.dense" in name for name in with_factors)
    assert not any("classifier" in name or "router" in name for name in with_factors)


def test_ffns_are_found_beside_heads_that_train_in_full() -> None:
    """RoBERTa's head is two linear layers, which an FFN might be made of."""
    model = families.build("roberta")
    before = [ffn.name for ffn in find_ffns(model)]
    adapted: Any = prepare(model, settings(trains="lora"))
    assert [ffn.name for ffn in find_ffns(adapted.get_base_model())] == before


@pytest.mark.parametrize(
    "bad", [{"trains": "last:0"}, {"trains": "some"}, {"lora_rank": 0}, {"lora_dropout": 1.0}]
)
def test_settings_that_cannot_work(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        settings(**bad)
