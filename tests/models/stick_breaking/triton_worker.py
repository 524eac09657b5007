"""Check the Triton kernels; run by `test_triton.py`.

Usage: triton_worker.py interpret | compile | cuda. In a process of its own, because Triton reads
TRITON_INTERPRET when it is imported and cannot read functions under the shape checks of the other
tests.

    interpret  outputs and gradients on CPU by Triton's interpreter (TRITON_INTERPRET=1)
    compile    machine code for GPUs that need not be there
    cuda       outputs and gradients on the GPU, and long sequences
"""

import sys
from typing import Any

import torch
from torch import Tensor

from moduli.models.stick_breaking import stick_breaking_attention

# Of the largest number of a tensor: what rounding may change against float64.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Batch, heads of queries and of keys, queries, keys, width of keys and of values.
SHAPES = {
    "square": (1, 2, 2, 70, 70, 24, 16),
    "group with a cache": (2, 4, 2, 37, 90, 16, 40),
    "decoding": (2, 3, 1, 1, 100, 16, 16),
    "one": (1, 1, 1, 1, 1, 8, 8),
    "parts of rows": (1, 2, 1, 37, 50, 300, 140),
    "keys of one part": (2, 1, 1, 20, 33, 16, 200),
    "MoLM": (1, 2, 1, 12, 40, 1024, 1024),
}

# Operands of one row [D] in the types and for the generations that are compiled for.
AHEAD = (
    (torch.bfloat16, 90, 128), (torch.bfloat16, 80, 1024), (torch.float32, 80, 64),
    (torch.float32, 90, 1024),
)  # fmt: skip
SHARED = 99 * 1024  # bytes of fast memory that a program may have on any GPU since 2020


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key, value, gradients of outputs and remainders: numbers that the dtype has."""
    B, Hq, H, T, S, D, Dv = shape
    sizes = ((B, Hq, T, D), (B, H, S, D), (B, H, S, Dv), (B, Hq, T, Dv), (B, Hq, T))
    return [torch.randn(*size).to(device, dtype) for size in sizes]


def step(given: list[Tensor], backend: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Outputs, remainders and gradients."""
    *leaves, dout, drest = (t.detach().to(dtype) for t in given)
    leaves = [t.requires_grad_() for t in leaves]
    found = stick_breaking_attention(*leaves, return_remainder=True, backend=backend, **options)
    return [*found, *torch.autograd.grad(found, leaves, (dout, drest))]


def compare(shape: tuple[int, ...], dtype: torch.dtype, device: str, **options: Any) -> None:
    compared(operands(shape, dtype, device), dtype, TOLERANCE[dtype], shape, **options)


def compared(
    given: list[Tensor], dtype: torch.dtype, tolerance: float, what: object, **options: Any
) -> None:
    found = step(given, "triton", dtype, **options)
    again = step(given, "triton", dtype, **options)
    wanted = step(given, "reference", torch.float64, **options)
    for name, a, b, c in zip(("out", "rest", "dq", "dk", "dv"), found, again, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b), name
        gap = float((a.double() - c).abs().max())
        assert gap <= tolerance * max(float(c.abs().max()), 1e-3), (what, name, gap)


def outputs(device: str, dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    for shape in SHAPES.values():
        for dtype in dtypes:
            compare(shape, dtype, device)
        compare(shape, dtypes[0], device, attend_current=False)
    shape = SHAPES["group with a cache"]
    mask = torch.rand(2, 90, device=device) > 0.4
    mask[1] = False
    segments = torch.arange(90, device=device).expand(2, 90) // 35
    compare(shape, dtypes[0], device, key_mask=mask)
    compare(shape, dtypes[0], device, segments=segments)
    compare(shape, dtypes[0], device, key_mask=mask, segments=segments, scale=3.0)
    extreme(device)
    early(device)


def extreme(device: str) -> None:
    """Logits beside which those of other keys have few digits left."""
    query, key, value, dout, drest = operands((1, 2, 2, 40, 40, 16, 16), torch.float32, device)
    for t in (query, key):  # powers of two in one column: the same logits in both precisions
        t[..., 1:] = 0
        t[..., 0] = t[..., 0].sign() * (1 + (t[..., 0].abs() > 1))
    for scale in (30.0, 2000.0):
        compared([query, key, value, dout, drest], torch.float32, 2e-5, "extreme", scale=scale)


def early(device: str) -> None:
    """What is dropped weighs no more than was allowed."""
    given = operands((1, 1, 1, 200, 200, 16, 16), torch.float32, device)
    out, _, *_ = step(given, "reference", torch.float64)
    for least in (1e-2, 1e-6):
        found, rest, *_ = step(given, "triton", torch.float32, early_exit=least)
        bound = least * float(given[2].abs().max()) + 1e-5
        assert float((found - out).abs().max()) <= bound
        assert float(rest.max()) <= 1


def compile_ahead() -> None:
    """Every kernel, for tensor cores of two generations, with and without what is optional."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moduli.models.stick_breaking import triton as stick
    from moduli.models.stick_breaking import triton_device

    types = {"mask": "*i8", "segments": "*i64", "scale": "fp32", "least": "fp32"}
    types |= dict.fromkeys(("rest", "drest", "kept", "before"), "*fp32")
    own = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    for name in ("forward", "query_gradient", "key_gradient"):
        kernel = getattr(triton_device, name)
        for without in (("mask", "segments", *(["kept"] if name == "forward" else [])), ()):
            for dtype, capability, width in AHEAD:
                row = torch.empty(1, 1, 1, width, dtype=dtype)
                fixed = {"CURRENT": 1, **stick._tile(row, row[0])}
                constants = dict.fromkeys(without) | fixed
                signature = {
                    n: "constexpr"
                    if n in constants
                    else "*bf16"
                    if n in own and dtype == torch.bfloat16
                    else "*fp32"
                    if n in own
                    else types.get(n, "i32")
                    for n in kernel.arg_names
                }
                built = triton.compile(
                    ASTSource(kernel, signature, constants),
                    target=GPUTarget("cuda", capability, 32),
                )
                assert built.asm["cubin"]
                assert built.metadata.shared <= SHARED, (name, dtype, width)


def on_cuda() -> None:
    outputs("cuda", [torch.float32, torch.bfloat16, torch.float16])
    for width in (64, 128, 256, 1024):
        compare((1, 4, 2, 600, 1000, width, width), torch.bfloat16, "cuda")
    assert (
        stick_breaking_attention(*operands((1, 1, 1, 9, 9, 16, 16), torch.half, "cuda")[:3])
        .isfinite()
        .all()
    )


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        outputs("cpu", [torch.float32, torch.float16])
    elif sys.argv[1] == "compile":
        compile_ahead()
    else:
        on_cuda()
