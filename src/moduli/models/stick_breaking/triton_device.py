# mypy: ignore-errors
"""What runs on the device for the backend "triton"; imported by `triton` when it is first used.

Every program computes one tile of a result, in float32, and is the only one to write it: nothing
is added by several of them and nothing waits, so results do not depend on which comes first. Rows
are queries in the order of their times, those of a group side by side, so that a tile of keys is
read once for all of them.

Weights are formed from logarithms: log A_ij = z_ij - sum_{j <= l <= i} softplus(z_il). Where the
formula needs sums over the left side, they are formed from left to right, with what was left of
every stick taken from forward (see `blocked`).

Letters: R rows of keys, G queries per key and time, T times, S keys, D width of keys, Dv width of
values. `kept` and `before` are [tiles of keys, R, G x T].
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), to its own last digits: a logarithm next to 1 would lose them."""
    e = tl.exp(-tl.abs(z))
    series = e * (1 - e * (0.5 - e * (0.3333333333 - e * (0.25 - e * (0.2 - e * 0.1666666667)))))
    return tl.maximum(z, 0.0) + tl.where(e < 0.0625, series, tl.log(1 + e))


@triton.jit
def _matrix(base, rows, row_step, inside, width, WIDTH: tl.constexpr):
    """Rows [rows, WIDTH] of a matrix with contiguous columns, zero outside."""
    cols = tl.arange(0, WIDTH)
    mask = inside[:, None] & (cols < width)[None, :]
    return tl.load(base + rows[:, None] * row_step + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _tile(
    q, k, keys, limit, own, left, mask, segments, S, scale,
):  # fmt: skip
    """Logits of a tile, where they are seen, its weights, and what it takes from every stick."""
    z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = keys[None, :] < limit[:, None]
    if mask is not None:
        real = tl.load(mask + keys, mask=keys < S, other=0) != 0
        seen = seen & real[None, :]
    if segments is not None:
        theirs = tl.load(segments + keys, mask=keys < S, other=0)
        seen = seen & (own[:, None] == theirs[None, :])
    spent = tl.where(seen, _softplus(z), 0.0)
    up_to = tl.cumsum(spent, axis=1, reverse=True)
    weights = tl.where(seen, tl.exp(z - up_to + left[:, None]), 0.0)
    return z, seen, weights, tl.sum(spent, axis=1)


@triton.jit
def _slopes(z, seen, weights, dout, v, before):
    """Slopes of the logits, and the sum of weight x slope of the weight."""
    gain = weights * tl.dot(dout, tl.trans(v), input_precision="ieee")
    e = tl.exp(-tl.abs(z))
    large, small = 1 / (1 + e), e / (1 + e)
    share, rest = tl.where(z < 0, small, large), tl.where(z < 0, large, small)
    left = before[:, None] + (tl.cumsum(gain, axis=1) - gain)
    return tl.where(seen, rest * gain - share * left, 0.0), tl.sum(gain, axis=1)


@triton.jit
def forward(
    q, k, v, mask, segments, out, rest, kept,
    R, G, T, S, D, Dv, scale, least,
    CURRENT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Outputs and remainders of one tile of queries, walking over the keys from right to left."""
    r = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = i < G * T
    place = (i % G) * T + i // G
    limit = tl.where(inside, S - T + i // G + CURRENT, 0)
    if mask is not None:
        mask += r * S
    own = i
    if segments is not None:
        segments += r * S
        own = tl.load(segments + S - T + i // G, mask=inside, other=0)
    query = _matrix(q + r * G * T * D, place, D, inside, D, WIDTH)
    left = tl.where(inside, 0.0, float("-inf"))
    acc = tl.zeros((QUERIES, VALUES), tl.float32)
    tiles = tl.cdiv(tl.max(limit, axis=0), KEYS)
    for step in range(tiles):
        if tl.max(left, axis=0) > least:
            n = tiles - 1 - step
            if kept is not None:
                tl.store(kept + (n * R + r) * G * T + i, tl.exp(left), mask=inside)
            keys = n * KEYS + tl.arange(0, KEYS)
            key = _matrix(k + r * S * D, keys, D, keys < S, D, WIDTH)
            value = _matrix(v + r * S * Dv, keys, Dv, keys < S, Dv, VALUES)
            _, _, weights, spent = _tile(
                query, key, keys, limit, own, left, mask, segments, S, scale
            )
            acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            left -= spent
    cols = tl.arange(0, VALUES)
    to = out + r * G * T * Dv + place[:, None] * Dv + cols[None, :]
    tl.store(to, acc, mask=inside[:, None] & (cols < Dv)[None, :])
    tl.store(rest + r * G * T + place, tl.exp(left), mask=inside)


@triton.jit
def query_gradient(
    q, k, v, mask, segments, dout, rest, drest, kept, before, dq,
    R, G, T, S, D, Dv, scale,
    CURRENT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, walking from left to right; leaves sums in `before`."""
    r = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = i < G * T
    place = (i % G) * T + i // G
    limit = tl.where(inside, S - T + i // G + CURRENT, 0)
    if mask is not None:
        mask += r * S
    own = i
    if segments is not None:
        segments += r * S
        own = tl.load(segments + S - T + i // G, mask=inside, other=0)
    query = _matrix(q + r * G * T * D, place, D, inside, D, WIDTH)
    do = _matrix(dout + r * G * T * Dv, place, Dv, inside, Dv, VALUES)
    total = tl.load(rest + r * G * T + place, mask=inside, other=0.0)
    total *= tl.load(drest + r * G * T + place, mask=inside, other=0.0)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    for n in range(tl.cdiv(tl.max(limit, axis=0), KEYS)):
        at = (n * R + r) * G * T + i
        share = tl.load(kept + at, mask=inside, other=0.0)
        if tl.max(share, axis=0) > 0:
            tl.store(before + at, total, mask=inside)
            keys = n * KEYS + tl.arange(0, KEYS)
            key = _matrix(k + r * S * D, keys, D, keys < S, D, WIDTH)
            value = _matrix(v + r * S * Dv, keys, Dv, keys < S, Dv, VALUES)
            z, seen, weights, _ = _tile(
                query, key, keys, limit, own, tl.log(share), mask, segments, S, scale
            )
            slope, gain = _slopes(z, seen, weights, do, value, total)
            total += gain
            acc += tl.dot(slope.to(key.dtype), key, input_precision="ieee")
    cols = tl.arange(0, WIDTH)
    to = dq + r * G * T * D + place[:, None] * D + cols[None, :]
    tl.store(to, acc * scale, mask=inside[:, None] & (cols < D)[None, :])


@triton.jit
def key_gradient(
    q, k, v, mask, segments, dout, kept, before, dk, dv,
    R, G, T, S, D, Dv, scale,
    CURRENT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all queries that see it."""
    n, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys = n * KEYS + tl.arange(0, KEYS)
    if mask is not None:
        mask += r * S
    if segments is not None:
        segments += r * S
    key = _matrix(k + r * S * D, keys, D, keys < S, D, WIDTH)
    value = _matrix(v + r * S * Dv, keys, Dv, keys < S, Dv, VALUES)
    dkey = tl.zeros((KEYS, WIDTH), tl.float32)
    dvalue = tl.zeros((KEYS, VALUES), tl.float32)
    first = tl.maximum(0, n * KEYS - (S - T) + 1 - CURRENT) * G // QUERIES * QUERIES
    for start in range(first, G * T, QUERIES):
        i = start + tl.arange(0, QUERIES)
        inside = i < G * T
        at = (n * R + r) * G * T + i
        share = tl.load(kept + at, mask=inside, other=0.0)
        if tl.max(share, axis=0) > 0:
            place = (i % G) * T + i // G
            limit = tl.where(inside, S - T + i // G + CURRENT, 0)
            own = i
            if segments is not None:
                own = tl.load(segments + S - T + i // G, mask=inside, other=0)
            query = _matrix(q + r * G * T * D, place, D, inside, D, WIDTH)
            do = _matrix(dout + r * G * T * Dv, place, Dv, inside, Dv, VALUES)
            sums = tl.load(before + at, mask=inside, other=0.0)
            z, seen, weights, _ = _tile(
                query, key, keys, limit, own, tl.log(share), mask, segments, S, scale
            )
            slope, _ = _slopes(z, seen, weights, do, value, sums)
            dvalue += tl.dot(tl.trans(weights).to(do.dtype), do, input_precision="ieee")
            dkey += tl.dot(tl.trans(slope).to(query.dtype), query, input_precision="ieee")
    cols = tl.arange(0, WIDTH)
    to = dk + r * S * D + keys[:, None] * D + cols[None, :]
    tl.store(to, dkey * scale, mask=(keys < S)[:, None] & (cols < D)[None, :])
    cols = tl.arange(0, VALUES)
    to = dv + r * S * Dv + keys[:, None] * Dv + cols[None, :]
    tl.store(to, dvalue, mask=(keys < S)[:, None] & (cols < Dv)[None, :])
