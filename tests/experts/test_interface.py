"""The experts of every MoE family of transformers, by our kernels and by transformers' own code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

import moduli
from moduli.errors import ConfigError
from moduli.experts import interface
from tests import tiny
from tests.experts import moe_families as families

QUICK = {"mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss"}


def marked(cases: list[str]) -> list[Any]:
    """Cases as parameters, of which the fast tier runs some."""
    slow = pytest.mark.slow
    return [pytest.param(c, marks=() if c.split(".")[0] in QUICK else slow) for c in cases]


CASES = families.cases()
ROOT = Path(__file__).parents[2]
MIXTRAL = "mixtral.MixtralExperts"
E, F, D, T, K = 5, 6, 8, 11, 2


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for every run of our kernels."""
    calls: list[None] = []
    run = interface.run_experts

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(interface, "run_experts", counting)
        yield calls


def results(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's output and the gradients of all parameters that have one."""
    model.zero_grad()
    torch.manual_seed(2)  # for families that draw what they start from
    out = model(**batch)
    y = out.logits if hasattr(out, "logits") else out.last_hidden_state
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 2e-5) -> None:
    """Each tensor to `tol` of its own size; what is nothing beside the others may be noise."""
    assert found.keys() == expected.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    noise = 1e-7 * max(sizes.values())
    for name, tensor in expected.items():
        atol = tol * sizes[name] + noise
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", marked(CASES))
def test_a_family_computes_and_learns_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build(case)
    batch = families.inputs(model)
    runs: list[None] = []
    hooks = [
        module.register_forward_hook(lambda *_: runs.append(None))
        for module in families.experts_of(model, case)
    ]
    model.set_experts_implementation("eager")
    expected = results(model, batch)
    for hook in hooks:
        hook.remove()
    model.set_experts_implementation("moduli")
    with counted(monkeypatch) as calls:
        found = results(model, batch)
    assert len(calls) == len(runs) > 0
    learnt = [n for n in expected if n.endswith("down_proj") and expected[n].dim() == 3]
    assert any(expected[n].any() for n in learnt)
    assert_same(found, expected)


@pytest.mark.parametrize("case", marked([c for c in CASES if c not in families.NO_TEXT]))
def test_a_family_generates_the_same_text(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build(case)
    if case in families.IN_DOUBLE:
        model.double()
    batch = families.inputs(model)
    texts = []
    for implementation in ("eager", "moduli"):
        model.set_experts_implementation(implementation)
        torch.manual_seed(0)
        with counted(monkeypatch) as calls:
            texts.append(model.generate(**batch, max_new_tokens=6, do_sample=False))
        assert bool(calls) == (implementation == "moduli")
    theirs, ours = (getattr(text, "sequences", text) for text in texts)
    assert theirs.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(ours, theirs)


class Config:
    """What `use_experts_implementation` reads of a configuration."""

    def __init__(self, implementation: str) -> None:
        self._experts_implementation = implementation


def own_gate(self: Any, z: Tensor) -> Tensor:
    gate, up = (z[..., ::2], z[..., 1::2]) if not self.is_concatenated else z.chunk(2, dim=-1)
    return (up + 1) * gate.clamp(max=1.0) * torch.sigmoid(1.7 * gate)


def an_experts_module(own: bool, **flags: bool) -> Any:
    """A module as its flags say, with random parameters."""

    class Experts(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            name, rows = ("gate_up_proj", 2 * F) if flags["has_gate"] else ("up_proj", F)
            shapes = {name: (E, rows, D), "down_proj": (E, D, F)}
            if flags["is_transposed"]:
                shapes = {n: (a, c, b) for n, (a, b, c) in shapes.items()}
            biases = {f"{name}_bias": (E, rows), "down_proj_bias": (E, D)}
            self.num_experts = E
            self.act_fn = nn.GELU()
            for n, shape in {**shapes, **(biases if flags["has_bias"] else {})}.items():
                self.register_parameter(n, nn.Parameter(torch.randn(shape)))
            if flags["has_post_expert_norm"]:
                self.post_expert_norm = nn.LayerNorm(D)

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            raise NotImplementedError("has no code of its own")

    if own:
        Experts._apply_gate = own_gate  # type: ignore[attr-defined]
    return use_experts_implementation(**flags)(Experts)(Config("batched_mm"))


FLAGS = ["is_transposed", "has_bias", "has_post_expert_norm"]
GATES = {
    "plain": {"has_gate": False, "own": False},
    "gated": {"has_gate": True, "own": False},
    "gated, in turns": {"has_gate": True, "own": False, "is_concatenated": False},
    "own gate": {"has_gate": True, "own": True},
    "own gate, in turns": {"has_gate": True, "own": True, "is_concatenated": False},
}


def routing(elsewhere: bool = False) -> tuple[Tensor, Tensor]:
    """Experts and weights of every slot; some weights are 0, and with `elsewhere` some experts
    are those of another rank."""
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    weights = torch.rand(T, K)
    weights[::3, 1] = 0
    if elsewhere:
        index[::3, 1] = E
    return index, weights


def run(module: Any, implementation: str, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    module.config._experts_implementation = implementation
    module.zero_grad()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weights = weights.clone().requires_grad_()
    y = module(x, index, weights)
    y.square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("flags", range(2 ** len(FLAGS)))
@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_flag_means_what_it_means_to_transformers(
    gate: str, flags: int, elsewhere: bool
) -> None:
    chosen = {name: bool(flags >> i & 1) for i, name in enumerate(FLAGS)}
    module = an_experts_module(**{"is_concatenated": True, **GATES[gate]}, **chosen)
    module._is_expert_parallel = elsewhere
    where = routing(elsewhere)
    assert_same(run(module, "moduli", *where), run(module, "batched_mm", *where), tol=1e-5)


def test_a_weight_of_zero_has_its_gradient() -> None:
    module = an_experts_module(False, has_gate=True, **dict.fromkeys(FLAGS, False))
    index, weights = routing()
    found = run(module, "moduli", index, weights)["weights"]
    assert (found[weights == 0] != 0).all()


@pytest.mark.parametrize("case", [MIXTRAL, "gpt_oss.GptOssExperts", "nemotron_h.NemotronHExperts"])
def test_bfloat16_is_as_near_to_the_truth_as_transformers_own_code(case: str) -> None:
    model = families.build(case)
    module, width = families.experts_of(model, case)[0], families.WIDTH
    x = torch.randn(T, width)
    index = torch.stack([torch.randperm(families.EXPERTS)[:K] for _ in range(T)])
    weights = torch.rand(T, K)  # routers compute them in float32
    model.set_experts_implementation("eager")
    with torch.no_grad():
        exact = module.bfloat16().double()(x.bfloat16().double(), index, weights.double())
        theirs = module.bfloat16()(x.bfloat16(), index, weights)
        model.set_experts_implementation("moduli")
        ours = module(x.bfloat16(), index, weights)
    assert ours.dtype == torch.bfloat16
    error, error_of_theirs = ((y - exact).norm() for y in (ours, theirs))
    assert error <= 1.5 * error_of_theirs


def test_autocast() -> None:
    model = families.build(MIXTRAL)
    batch = families.inputs(model)
    found = {}
    for implementation in ("eager", "moduli"):
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            found[implementation] = results(model, batch)
    assert_same(found["moduli"], found["eager"], tol=0.05)


def test_gradient_checkpointing() -> None:
    model = families.build(MIXTRAL)
    model.set_experts_implementation("moduli")
    batch = families.inputs(model)
    expected = results(model, batch)
    model.gradient_checkpointing_enable()
    assert_same(results(model.train(), batch), expected, tol=1e-6)


def test_adapters_on_the_experts_learn() -> None:
    peft = pytest.importorskip("peft")
    model = families.build(MIXTRAL)
    names = [n for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    config = peft.LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    found = {}
    for implementation in ("eager", "moduli"):
        model.set_experts_implementation(implementation)
        found[implementation] = results(tuned, families.inputs(model))
    assert any("lora_A" in name for name in found["eager"])
    assert_same(found["moduli"], found["eager"])


def test_one_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build(MIXTRAL)
    model.set_experts_implementation(moduli.register_experts("padded"))
    used: list[str] = []
    run = interface.run_experts
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(
            interface, "run_experts", lambda *a, **k: (used.append(a[4]), run(*a, **k))[1]
        )
        model(**families.inputs(model))
    assert set(used) == {"padded"}
    other = families.build("gpt_oss.GptOssExperts")
    other.set_experts_implementation(moduli.register_experts("padded"))
    with pytest.raises(ConfigError, match=r"kernel='padded' cannot.*gating rule of their own"):
        other(**families.inputs(other))


def test_a_checkpoint_is_loaded_with_our_kernels_and_does_not_know_of_them(tmp_path: Path) -> None:
    model = families.build(MIXTRAL)
    model.set_experts_implementation("moduli")
    model.save_pretrained(tmp_path)
    assert "moduli" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moduli")
    assert again.get_experts_implementation() == {"": "moduli"}
    batch = families.inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        ("aot_eager", [MIXTRAL, "gpt_oss.GptOssExperts", "muse_spark.MuseSparkExperts"]),
        ("inductor", [MIXTRAL]),
    ],
)
def test_a_compiled_model_is_one_graph_and_learns_the_same(backend: str, cases: list[str]) -> None:
    command = [sys.executable, "-m", "tests.experts.compile_worker", backend, *cases]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_guide_names_every_family() -> None:
    page = (ROOT / "docs/guide/kernels.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", page.partition("tested with they are\n")[2].partition("\n\n")[0])
    assert named == sorted({case.split(".")[0] for case in CASES})


def test_a_model_without_such_experts_says_that_nothing_changed() -> None:
    model = tiny.build("llama")
    model.set_experts_implementation("moduli")
    assert model.get_experts_implementation() != {"": "moduli"}
