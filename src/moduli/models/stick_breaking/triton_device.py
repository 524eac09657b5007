# mypy: ignore-errors
"""What runs on the device for the backend "triton"; imported by `triton` when it is first used.

Every program computes one tile of a result, in float32, and is the only one to write it: nothing
is added by several of them and nothing waits, so results do not depend on which comes first. Rows
are queries in the order of their times, those of a group side by side, so that a tile of keys is
read once for all of them.

Weights are formed from logarithms: log A_ij = z_ij - sum_{j <= l <= i} softplus(z_il). Where the
formula needs sums over the left side, they are formed from left to right, with what was left of
every stick taken from forward (see `blocked`).

Rows that are too wide for a program are cut into PARTS: a program forms logits from all of them,
its own part first, and writes results of its own part alone.

Letters: R rows of keys, G queries per key and time, T times, S keys, D width of keys, Dv width of
values. `kept` and `before` are [tiles of keys, R, G x T].
"""

import triton
import triton.language as tl

MOST = tl.constexpr(80.0)  # of a logarithm


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), to its own last digits: a logarithm next to 1 would lose them."""
    e = tl.exp(-tl.abs(z))
    series = e * (1 - e * (0.5 - e * (0.3333333333 - e * (0.25 - e * (0.2 - e * 0.1666666667)))))
    return tl.maximum(z, 0.0) + tl.where(e < 0.0625, series, tl.log(1 + e))


@triton.jit
def _part(base, rows, inside, width, part, WIDTH: tl.constexpr):
    """A part [rows, WIDTH] of contiguous rows of a width, zero outside."""
    cols = part * WIDTH + tl.arange(0, WIDTH)
    mask = inside[:, None] & (cols < width)[None, :]
    return tl.load(base + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _put(base, rows, inside, width, part, what, WIDTH: tl.constexpr):
    """Write such a part."""
    cols = part * WIDTH + tl.arange(0, WIDTH)
    mask = inside[:, None] & (cols < width)[None, :]
    tl.store(base + rows[:, None] * width + cols[None, :], what, mask=mask)


@triton.jit
def _products(
    a, b, base_a, base_b, rows_a, rows_b, inside_a, inside_b, width, part,
    WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Products of rows with rows, of which `part` is in a and b already."""
    found = tl.dot(a, tl.trans(b), input_precision="ieee")
    for step in range(1, PARTS):
        other = (part + step) % PARTS
        a = _part(base_a, rows_a, inside_a, width, other, WIDTH)
        b = _part(base_b, rows_b, inside_b, width, other, WIDTH)
        found += tl.dot(a, tl.trans(b), input_precision="ieee")
    return found


@triton.jit
def _tile(z, keys, limit, own, left, mask, segments, S):
    """Where logits are seen, weights of a tile, and what it takes from every stick."""
    seen = keys[None, :] < limit[:, None]
    if mask is not None:
        real = tl.load(mask + keys, mask=keys < S, other=0) != 0
        seen = seen & real[None, :]
    if segments is not None:
        theirs = tl.load(segments + keys, mask=keys < S, other=0)
        seen = seen & (own[:, None] == theirs[None, :])
    spent = tl.where(seen, _softplus(z), 0.0)
    share = z - spent
    # Sums are of small numbers, so that large logits leave digits to those of others: nothing is
    # left behind a key that takes so much.
    spent = tl.where(spent > MOST, MOST, spent)
    right = tl.cumsum(spent, axis=1, reverse=True) - spent
    weights = tl.where(seen, tl.exp(share - right + left[:, None]), 0.0)
    return seen, weights, tl.sum(spent, axis=1)


@triton.jit
def _slopes(z, seen, weights, slope, before):
    """Slopes of the logits, and the sum of weight x slope of the weight."""
    gain = weights * slope
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
    WIDTH: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Outputs and remainders of one tile of queries, walking over the keys from right to left."""
    tiles, part = tl.cdiv(G * T, QUERIES), tl.program_id(1)
    r = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    inside = i < G * T
    mine = i < tl.where(part == 0, G * T, 0)  # of what all parts know, the first one writes
    place = (i % G) * T + i // G
    limit = tl.where(inside, S - T + i // G + CURRENT, 0)
    if mask is not None:
        mask += r * S
    own = i
    if segments is not None:
        segments += r * S
        own = tl.load(segments + S - T + i // G, mask=inside, other=0)
    q += r * G * T * D
    k += r * S * D
    query = _part(q, place, inside, D, part, WIDTH)
    left = tl.where(inside, 0.0, float("-inf"))
    acc = tl.zeros((QUERIES, VALUES), tl.float32)
    steps = tl.cdiv(tl.max(limit, axis=0), KEYS)
    for step in range(steps):
        if tl.max(left, axis=0) > least:
            n = steps - 1 - step
            if kept is not None:
                at = kept + (n * R + r) * G * T + i
                tl.store(at, tl.exp(left), mask=mine)
            keys = n * KEYS + tl.arange(0, KEYS)
            real = keys < S
            key = _part(k, keys, real, D, part, WIDTH)
            value = _part(v + r * S * Dv, keys, real, Dv, part, VALUES)
            z = scale * _products(
                query, key, q, k, place, keys, inside, real, D, part, WIDTH, PARTS
            )
            _, weights, spent = _tile(z, keys, limit, own, left, mask, segments, S)
            acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            left -= spent
    _put(out + r * G * T * Dv, place, inside, Dv, part, acc, VALUES)
    tl.store(rest + r * G * T + place, tl.exp(left), mask=mine)


@triton.jit
def query_gradient(
    q, k, v, mask, segments, dout, rest, drest, kept, before, dq,
    R, G, T, S, D, Dv, scale,
    CURRENT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, walking from left to right; leaves sums in `before`."""
    tiles, part = tl.cdiv(G * T, QUERIES), tl.program_id(1)
    r = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    inside = i < G * T
    mine = i < tl.where(part == 0, G * T, 0)  # of what all parts know, the first one writes
    place = (i % G) * T + i // G
    limit = tl.where(inside, S - T + i // G + CURRENT, 0)
    if mask is not None:
        mask += r * S
    own = i
    if segments is not None:
        segments += r * S
        own = tl.load(segments + S - T + i // G, mask=inside, other=0)
    q += r * G * T * D
    k += r * S * D
    v += r * S * Dv
    dout += r * G * T * Dv
    query = _part(q, place, inside, D, part, WIDTH)
    do = _part(dout, place, inside, Dv, part, VALUES)
    total = tl.load(rest + r * G * T + place, mask=inside, other=0.0)
    total *= tl.load(drest + r * G * T + place, mask=inside, other=0.0)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    for n in range(tl.cdiv(tl.max(limit, axis=0), KEYS)):
        at = (n * R + r) * G * T + i
        share = tl.load(kept + at, mask=inside, other=0.0)
        if tl.max(share, axis=0) > 0:
            tl.store(before + at, total, mask=mine)
            keys = n * KEYS + tl.arange(0, KEYS)
            real = keys < S
            key = _part(k, keys, real, D, part, WIDTH)
            value = _part(v, keys, real, Dv, part, VALUES)
            z = scale * _products(
                query, key, q, k, place, keys, inside, real, D, part, WIDTH, PARTS
            )
            slope = _products(
                do, value, dout, v, place, keys, inside, real, Dv, part, VALUES, PARTS
            )
            seen, weights, _ = _tile(z, keys, limit, own, tl.log(share), mask, segments, S)
            slope, gain = _slopes(z, seen, weights, slope, total)
            total += gain
            acc += tl.dot(slope.to(key.dtype), key, input_precision="ieee")
    _put(dq + r * G * T * D, place, inside, D, part, acc * scale, WIDTH)


@triton.jit
def key_gradient(
    q, k, v, mask, segments, dout, kept, before, dk, dv,
    R, G, T, S, D, Dv, scale,
    CURRENT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all queries that see it."""
    tiles, part = tl.cdiv(S, KEYS), tl.program_id(1)
    r, n = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    keys = n * KEYS + tl.arange(0, KEYS)
    real = keys < S
    if mask is not None:
        mask += r * S
    if segments is not None:
        segments += r * S
    q += r * G * T * D
    k += r * S * D
    v += r * S * Dv
    dout += r * G * T * Dv
    key = _part(k, keys, real, D, part, WIDTH)
    value = _part(v, keys, real, Dv, part, VALUES)
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
            query = _part(q, place, inside, D, part, WIDTH)
            do = _part(dout, place, inside, Dv, part, VALUES)
            sums = tl.load(before + at, mask=inside, other=0.0)
            z = scale * _products(
                query, key, q, k, place, keys, inside, real, D, part, WIDTH, PARTS
            )
            slope = _products(
                do, value, dout, v, place, keys, inside, real, Dv, part, VALUES, PARTS
            )
            seen, weights, _ = _tile(z, keys, limit, own, tl.log(share), mask, segments, S)
            slope, _ = _slopes(z, seen, weights, slope, sums)
            dvalue += tl.dot(tl.trans(weights).to(do.dtype), do, input_precision="ieee")
            dkey += tl.dot(tl.trans(slope).to(query.dtype), query, input_precision="ieee")
    _put(dk + r * S * D, keys, real, D, part, dkey * scale, WIDTH)
    _put(dv + r * S * Dv, keys, real, Dv, part, dvalue, VALUES)
