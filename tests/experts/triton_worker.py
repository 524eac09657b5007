"""Check the Triton kernel; run by `test_triton.py`.

Usage: triton_worker.py interpret | compile | cuda. In a process of its own, because Triton reads
TRITON_INTERPRET when it is imported and cannot read functions under the shape checks of the other
tests.

    interpret  outputs and gradients on CPU by Triton's interpreter (TRITON_INTERPRET=1)
    compile    machine code for GPUs that need not be there
    cuda       outputs and gradients on the GPU, the same bits twice, a captured graph
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduli.errors import UnsupportedError
from moduli.experts.ffn import StackedFFN
from moduli.experts.kernels import run_experts
from moduli.routing import Routing

T, D, E, K = 70, 40, 5, 2
# Of |y|: what rounding may change against float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}
FORMS = ("plain", "apart", "concatenated", "interleaved")
ROUTINGS = ("usual", "empty experts", "one expert", "some inactive", "none active")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def operands(
    form: str, kind: str, dtype: torch.dtype, device: str, e: int = 24, tokens: int = T
) -> dict[str, Any]:
    """Tensors by name, float32 numbers that the dtype has."""
    rows = e if form in ("plain", "apart") else 2 * e

    def leaf(*shape: int) -> Tensor:
        numbers = torch.randn(*shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        return numbers.to(device, dtype)

    chosen = torch.rand(tokens, E).topk(K).indices
    active = None
    if kind == "empty experts":
        chosen = chosen % 2 + torch.tensor([0, 3])
    elif kind == "one expert":
        chosen = torch.full((tokens, K), E - 1)
    elif kind == "some inactive":
        active = (torch.rand(tokens, K) > 0.4).to(device)
    elif kind == "none active":
        active = torch.zeros(tokens, K, dtype=torch.bool, device=device)
    found: dict[str, Any] = {
        "x": leaf(D, tokens).T,  # not contiguous
        "weights": leaf(tokens, K),
        "first": leaf(E, rows, D),
        "dense_second": leaf(D, E * e),  # experts read a transposed view, as of an nn.Linear
        "first_bias": leaf(E, rows),
        "out_bias": leaf(E, D),
    }
    if form == "apart":
        found |= {"up": leaf(E, e, D), "up_bias": leaf(E, e)}
    fused = form if rows == 2 * e else None
    return found | {"index": chosen.to(device), "active": active, "fused": fused, "e": e}


def step(
    given: dict[str, Any], activation: Callable[[Tensor], Tensor], kernel: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and the gradients of all floating operands."""
    t = dict(given)
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_()
        for name, tensor in t.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    t |= leaves
    experts = StackedFFN(
        first=t["first"],
        second=t["dense_second"].T.unflatten(0, (E, t["e"])),
        sizes=(t["e"],) * E,
        first_bias=t.get("first_bias"),
        up=t.get("up"),
        up_bias=t.get("up_bias"),
        out_bias=t.get("out_bias"),
        fused=t["fused"],
    )
    routing = Routing(t["index"], t["weights"], t["active"])
    y = run_experts(t["x"], routing, experts, activation, kernel)
    push = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), push)
    with torch.no_grad():  # nothing is saved then
        alone = run_experts(t["x"], routing, experts, activation, kernel)
    assert torch.equal(alone, y.detach())
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(given: dict[str, Any], dtype: torch.dtype, activation: str = "gelu") -> None:
    act = ACTIVATIONS[activation]
    found = step(given, act, "triton", dtype)
    again = step(given, act, "triton", dtype)
    for name, wanted in step(given, act, "eager", torch.float32).items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], again[name]), name
        gap = float((found[name].float() - wanted).norm())
        assert gap <= TOLERANCE[dtype] * float(wanted.norm()), (name, gap, float(wanted.norm()))


def outputs(device: str, dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    for dtype in dtypes:
        for form in FORMS:
            for kind in ROUTINGS if dtype is dtypes[0] else ["some inactive"]:
                compare(operands(form, kind, dtype, device), dtype)
    for activation in ACTIVATIONS:
        compare(operands("concatenated", "usual", dtypes[0], device), dtypes[0], activation)
    # Experts wider than a tile, few tokens, none, no biases, something frozen.
    compare(operands("apart", "usual", dtypes[0], device, e=100), dtypes[0])
    compare(operands("plain", "usual", dtypes[0], device, tokens=1), dtypes[0])
    compare(operands("plain", "usual", dtypes[0], device, tokens=0), dtypes[0])
    bare = operands("interleaved", "usual", dtypes[0], device)
    for name in ("first_bias", "out_bias"):
        del bare[name]
    compare(bare, dtypes[0])
    frozen(device)


def frozen(device: str) -> None:
    """Only biases learn, as in some tuners; and there is no second derivative."""
    t = operands("concatenated", "usual", torch.float32, device)
    bias = t["first_bias"].requires_grad_()
    grads = []
    for kernel in ("triton", "eager"):
        experts = StackedFFN(
            t["first"],
            t["dense_second"].T.unflatten(0, (E, t["e"])),
            (t["e"],) * E,
            bias,
            fused=t["fused"],
        )
        y = run_experts(t["x"], Routing(t["index"], t["weights"]), experts, F.silu, kernel)
        grads += torch.autograd.grad(y.square().sum(), bias, create_graph=kernel == "triton")
    torch.testing.assert_close(grads[0], grads[1])
    try:
        grads[0].sum().backward()
    except UnsupportedError:
        return
    raise AssertionError("a second derivative that is not refused")


def compile_ahead() -> None:
    """Every kernel, for tensor cores of two generations, with and without what is optional."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moduli.experts.kernels import fused_device

    others = {
        **dict.fromkeys(("tokens", "slots", "tile_expert", "tile_start"), "*i64"),
        **dict.fromkeys(("starts", "ends"), "*i32"),
        "dot": "*fp32",
    }
    own = ["x", "gate", "up", "gate_bias", "up_bias", "z", "h", "a", "w", "b", "v", "bias"]
    own += ["weights", "out", "dy", "dz", "sums"]  # of the experts' type
    optional = {
        "first": ["up", "up_bias", "gate_bias", "z"],
        "second": ["b", "v", "bias", "weights"],
        "hidden_gradient": [],
        "outer": ["sums"],
    }
    tile = {"ROWS": 64, "COLS": 64, "STEP": 32}
    for name, absent in optional.items():
        kernel = getattr(fused_device, name)
        fixed = {"ACT": "silu", "GATED": True, **tile}
        for without in (absent, []):
            constants = {**dict.fromkeys(without), **fixed}
            constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
            for dtype, capability in (("bf16", 90), ("fp32", 80)):
                signature = {
                    n: "constexpr"
                    if n in constants
                    else others.get(n, f"*{dtype}" if n in own else "i32")
                    for n in kernel.arg_names
                }
                built = triton.compile(
                    ASTSource(kernel, signature, constants),
                    target=GPUTarget("cuda", capability, 32),
                )
                assert built.asm["ptx"]


def on_cuda() -> None:
    outputs("cuda", [torch.float32, torch.bfloat16, torch.float16])
    held = operands("apart", "some inactive", torch.bfloat16, "cuda")
    step(held, F.silu, "triton", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_without_checks(held)
    for kind in ROUTINGS[:3]:
        new = operands("apart", kind, torch.bfloat16, "cuda")
        held["index"].copy_(new["index"])
        held["x"].copy_(new["x"])
        graph.replay()
        assert torch.equal(captured, step_without_checks(held))


def step_without_checks(t: dict[str, Any]) -> Tensor:
    second = t["dense_second"].T.unflatten(0, (E, t["e"]))
    experts = StackedFFN(
        t["first"], second, (t["e"],) * E, t["first_bias"], t["up"], t["up_bias"], t["out_bias"]
    )
    with torch.no_grad():
        routing = Routing(t["index"], t["weights"], t["active"])
        return run_experts(t["x"], routing, experts, F.silu, "triton")


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        outputs("cpu", [torch.float32, torch.float16])
    elif sys.argv[1] == "compile":
        compile_ahead()
    else:
        on_cuda()
