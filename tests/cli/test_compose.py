"""`moduli compose`: by options or by a recipe, first dry, then for good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moduli.cli import main
from tests.surgery.compose.conftest import logits, tensors
from tests.surgery.compose.tiny_sources import tiny_source

Run = Callable[..., Any]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    names = {"base": 0, "coder": 1, "writer": 2}
    return {name: str(tiny_source(tmp_path / name, "llama", seed)) for name, seed in names.items()}


@pytest.fixture
def options(sources: dict[str, str]) -> list[str]:
    return [
        *("--base", sources["base"]),
        *("--expert", sources["coder"], "--prompts", "w3 w4", "w5"),
        *("--expert", sources["writer"], "--prompts", "w30 w31"),
    ]


def test_options_and_recipe_give_the_same_weights(
    sources: dict[str, str], options: list[str], tmp_path: Path, run_json: Run
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--top-k", "1", "--gate", "cheap_embed"]
    done = run_json("compose", "--json", *options, *more, "--out", str(one))
    assert done["architecture"] == "MixtralForCausalLM"
    assert done["directory"] == str(one)
    recipe = {
        "base_model": sources["base"],
        "gate_mode": "hidden",
        "experts_per_token": 1,
        "experts": [
            {"source_model": sources["coder"], "positive_prompts": ["w3 w4", "w5"]},
            {"source_model": sources["writer"], "positive_prompts": ["w30 w31"]},
        ],
    }
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    given = ["--recipe", str(file), "--gate", "cheap_embed"]
    run_json("compose", "--json", *given, "--out", str(two))
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert logits(one).isfinite().all()


def test_a_dry_run_says_what_goes_where_and_writes_nothing(
    options: list[str], tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    plan = run_json("compose", "--json", "--dry-run", *options)
    assert sum(group["bytes"] for group in plan["tensors"]) == plan["bytes"]
    assert main(["compose", "--dry-run", *options]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.block_sparse_moe.experts.1.w1.weight" in text
    assert f"{plan['total_parameters']:,} parameters" in text
    assert sorted(tmp_path.iterdir()) == before


def test_routers_can_be_trained_at_once(
    options: list[str], tmp_path: Path, run_json: Run, fails: Run
) -> None:
    words = " ".join(f"w{i}" for i in range(3, 60))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([words] * 12))
    out = tmp_path / "out"
    warm = ["--warm-up", str(text), "--warm-up-steps", "3"]
    done = run_json("compose", "--json", *options, "--out", str(out), *warm)
    assert len(done["warm_up_losses"]) == 3
    plain = tmp_path / "plain"
    run_json("compose", "--json", *options, "--out", str(plain))
    trained, untrained = tensors(out), tensors(plain)
    changed = {n for n in trained if not (trained[n] == untrained[n]).all()}
    assert changed == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)}
    lost = ["--out", str(tmp_path / "lost"), "--warm-up", str(tmp_path / "no.txt")]
    assert "cannot be read" in fails(5, "compose", *options, *lost)
    assert not (tmp_path / "lost").exists()


def test_what_is_missing_is_said(
    sources: dict[str, str], options: list[str], tmp_path: Path, fails: Run
) -> None:
    assert "--out" in fails(2, "compose", *options)
    out = ["--out", str(tmp_path / "out")]
    assert "--expert" in fails(2, "compose", "--base", sources["base"], *out)
    assert "once per --expert" in fails(2, "compose", *options, "--expert", sources["base"], *out)
    assert "leave those options out" in fails(
        2, "compose", "--recipe", str(tmp_path / "r.yaml"), *options, *out
    )
    assert "cannot be read" in fails(5, "compose", "--recipe", str(tmp_path / "r.yaml"), *out)
    assert "no positive prompts" in fails(2, "compose", *options[:2], *_bare(options), *out)


def _bare(options: list[str]) -> list[str]:
    """The experts without their prompts."""
    return [w for i, o in enumerate(options) if o == "--expert" for w in (o, options[i + 1])]
