"""Stick-breaking attention alone: the formula and the tiles, against stored outputs and gradients.

Two layouts are stored. Of ModuleFormer, queries [B, T, K, H, D] and keys [B, S, H, D], the K
experts of a token sharing its keys; of the stand-alone library, [B, H, T, D] throughout, with what
is left of the stick. Whatever a case stores is compared, with the truth in float64 where there is
one; what it does not say has its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moduli.models.stick_breaking import stick_breaking_attention, stick_breaking_weights
from tests.parity.case import Case, Check

RUNS = (("reference", torch.float64), ("blocked", torch.float64), ("blocked", torch.float32))
GRADIENTS = ("dq", "dk", "dv")
INPUTS = {"q", "k", "v", "grad_out", "grad_rem", "pad_mask", "segments", "cu_seqlens"}


def stickbreaking_attention(case: Case, check: Check) -> None:
    q, k, v = (case.tensors[name] for name in "qkv")
    experts = q.shape[2]
    options = _options(case, q.shape[-1], *k.shape[:2])
    options["attend_current"] = bool(case.data.get("attend_current", True))
    for backend, dtype in RUNS:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        # A head of keys serves the same head of every expert: [B, H, K, T, D], folded.
        query = leaves[0].permute(0, 3, 2, 1, 4).flatten(1, 2)
        key, value = (t.transpose(1, 2) for t in leaves[1:])
        out = stick_breaking_attention(query, key, value, backend=backend, **options)
        out = out.unflatten(1, (-1, experts)).permute(0, 3, 2, 1, 4)
        found = {"out": out}
        if "grad_out" in case.tensors:
            grads = torch.autograd.grad(out, leaves, case.tensors["grad_out"].to(dtype))
            found |= dict(zip(GRADIENTS, grads, strict=True))
        weights = stick_breaking_weights(query, key, **options)
        weights = weights.unflatten(1, (-1, experts)).transpose(1, 2)
        found |= {"att": weights, "att_rowsum": weights.sum(-1)}
        _compare(case, check, found, ("_f64", "_f32", ""), f"{backend} in {dtype}")
        for row, own in enumerate(weights.split(1)):
            _compare(case, check, {f"att_f64_b{row}": own}, ("",), f"row {row} in {dtype}")
    _finish(case, check)


def stickbreaking_attention_remainder(case: Case, check: Check) -> None:
    q, k, v = (case.tensors[name] for name in "qkv")
    options = _options(case, q.shape[-1], k.shape[0], k.shape[2])
    variants = [n for n in ("cur", "nocur") if any(t.endswith(f"_{n}") for t in case.tensors)]
    check.true(bool(variants), "no tensor ends with _cur or _nocur")
    for variant in variants:
        for backend, dtype in RUNS:
            leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
            out, rest = stick_breaking_attention(
                *leaves, attend_current=variant == "cur", return_remainder=True, backend=backend,
                **options,
            )  # fmt: skip
            found = {"out": out, "rem": rest}
            given = {n: case.tensors[f"grad_{n}"] for n in found if f"grad_{n}" in case.tensors}
            if given:
                sources = [found[n] for n in given]
                grads = torch.autograd.grad(sources, leaves, [g.to(dtype) for g in given.values()])
                found |= dict(zip(GRADIENTS, grads, strict=True))
            label = f"{variant}, {backend} in {dtype}"
            _compare(case, check, found, (f"_{variant}_f64", f"_{variant}"), label)
    _finish(case, check)


def _finish(case: Case, check: Check) -> None:
    """Note stored outputs that nobody compared; of two precisions one is enough."""
    said = case.data.get("segments")
    said = said.get("tensor") if isinstance(said, Mapping) else said
    given = INPUTS | ({said} if isinstance(said, str) else set())
    left = {_base(name) for name in case.tensors} - check.seen - given
    check.true(not left, f"not compared: {', '.join(sorted(left))}")
    check.true(any(name.startswith("out") for name in check.seen), "no output is stored")
    check.seen.update(case.data.get("expected", {}))


def _base(name: str) -> str:
    return name.removesuffix("_f64").removesuffix("_f32")


def _compare(
    case: Case, check: Check, found: Mapping[str, Tensor], endings: Sequence[str], label: str
) -> None:
    """Each tensor with the first stored one of its name and an ending."""
    said = case.data.get("tolerance", {})
    tolerance = float(next((said[n] for n in ("abs_vs_f64", "abs", "atol") if n in said), 1e-5))
    for name, got in found.items():
        stored = next((n for n in (name + e for e in endings) if n in case.tensors), None)
        if stored is None:
            continue
        check.seen.add(_base(stored))
        want, have = case.tensors[stored].double(), got.detach().double()
        if have.shape != want.shape:
            check.problems.append(
                f"{stored}, {label}: shape {tuple(have.shape)}, not {tuple(want.shape)}"
            )
            continue
        error = float((have - want).abs().max()) if want.numel() else 0.0
        check.largest = max(check.largest, error)
        # Not `error > tolerance`, which NaN is not.
        check.true(error <= tolerance, f"{stored}, {label}: off by {error:.3g}")


def _options(case: Case, width: int, batch: int, keys: int) -> dict[str, Any]:
    """What a case says of scale, padding and packing, as arguments."""
    said = case.data.get("scale", "1/sqrt(D)")
    scale = width**-0.5 if said in (None, "1/sqrt(D)") else float(said)
    mask = case.tensors.get("pad_mask")
    return {
        "scale": scale,
        "key_mask": None if mask is None else mask.bool(),
        "segments": _segments(case, batch, keys),
    }


def _segments(case: Case, batch: int, keys: int) -> Tensor | None:
    """Number of every position's segment, from any of the ways to say it."""
    said = case.data.get("segments", case.tensors.get("segments"))
    if isinstance(said, Mapping):
        said = said.get("tensor", next(iter(said.values()), None))
    if isinstance(said, str):
        said = case.tensors[said]
    if said is None:
        return None
    rows = said.tolist() if isinstance(said, Tensor) else list(said)
    per_row = isinstance(rows[0], Sequence) and len(rows) == batch
    per_row = per_row and not _are_ranges(rows, keys)
    numbered = [_numbers(row, keys) for row in (rows if per_row else [rows])]
    return torch.tensor(numbered).expand(batch, keys)


def _are_ranges(row: Sequence[Any], keys: int) -> bool:
    """Whether this is a list of [first, end] that covers all positions."""
    pairs = all(isinstance(r, Sequence) and len(r) == 2 for r in row)
    return pairs and row[0][0] == 0 and row[-1][1] == keys


def _numbers(row: Sequence[Any], keys: int) -> list[int]:
    """Segment of each position from ids, lengths, cumulative lengths or ranges."""
    if len(row) == keys and not isinstance(row[0], Sequence):
        return [int(i) for i in row]
    if _are_ranges(row, keys):
        lengths = [end - first for first, end in row]
    elif row[0] == 0 and row[-1] == keys:
        lengths = [end - first for first, end in pairwise(row)]
    else:
        lengths = [int(n) for n in row]
    numbers = [n for n, length in enumerate(lengths) for _ in range(length)]
    if len(numbers) != keys:
        raise ValueError(f"segments {row} do not cover {keys} positions")
    return numbers
