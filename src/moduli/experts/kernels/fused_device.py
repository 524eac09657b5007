# mypy: ignore-errors
"""What runs on the device for the kernel "triton"; imported by `fused` when it is first used.

Every program computes one tile of a result, in float32, and is the only one to write it: nothing
is added by several of them, so results do not depend on which comes first. Rows are those of slots
in the order of their experts. A tile of rows belongs to one expert; which one, and where it begins,
is in `tile_expert` and `tile_start`, since there are as many tiles as could be needed and the last
ones may have nothing to do.

Letters: T tokens, D width, E experts, N neurons of one expert, S slots. Steps (strides) are named
after what they step over. Products of float32 are exact float32 ("ieee").
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _activate(z, NAME: tl.constexpr):
    """The activation of z and its derivative."""
    if NAME == "gelu":
        phi = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        h = z * phi
        slope = phi + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif NAME == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        h = z * s
        slope = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif NAME == "quick_gelu":
        s = _sigmoid(1.702 * z)
        h = z * s
        slope = s + 1.702 * z * s * (1 - s)
    elif NAME == "silu":
        s = _sigmoid(z)
        h = z * s
        slope = s + z * s * (1 - s)
    elif NAME == "relu":
        h = tl.where(z < 0, 0.0, z)  # NaN stays, which a maximum may drop
        slope = tl.where(z > 0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "relu_squared")
        h = tl.where(z < 0, 0.0, z)
        slope = 2 * h
        h = h * h
    return h, slope


@triton.jit
def _product(
    acc, a, a_rows, a_mask, a_col, w, cols, cols_mask, w_in, w_out, inner, STEP: tl.constexpr
):
    """acc + a[a_rows] @ w; `w` points to the matrix of an expert."""
    for k in range(0, inner, STEP):
        ks = k + tl.arange(0, STEP)
        left = tl.load(
            a + a_rows[:, None] + ks[None, :] * a_col,
            mask=a_mask[:, None] & (ks < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            w + ks[:, None] * w_in + cols[None, :] * w_out,
            mask=(ks < inner)[:, None] & cols_mask[None, :],
            other=0.0,
        )
        acc += tl.dot(left, right, input_precision="ieee")
    return acc


@triton.jit
def first(
    x, gate, up, gate_bias, up_bias, z, h,
    tokens, tile_expert, tile_start, ends, E, D, N,
    x_t, x_d, gate_e, gate_n, gate_d, up_e, up_n, up_d,
    gate_bias_e, gate_bias_n, up_bias_e, up_bias_n, z_s,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """h [S, N] = act(x W + b) (* (x U + c)); pre-activations [S, N or 2 N] into z, if given."""
    e = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if e >= E:
        return
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, ROWS)
    mine = rows < tl.load(ends + e)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < N
    at = tl.load(tokens + rows, mask=mine, other=0).to(tl.int64) * x_t
    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _product(acc, x, at, mine, x_d, gate + e * gate_e, cols, inside, gate_d, gate_n, D, STEP)
    if gate_bias is not None:
        b = gate_bias + e * gate_bias_e + cols * gate_bias_n
        acc += tl.load(b, mask=inside, other=0.0).to(tl.float32)[None, :]
    mask = mine[:, None] & inside[None, :]
    rows = rows.to(tl.int64)
    if z is not None:
        tl.store(z + rows[:, None] * z_s + cols[None, :], acc, mask=mask)
    hidden, _ = _activate(acc, ACT)
    if up is not None:
        acc = tl.zeros((ROWS, COLS), tl.float32)
        acc = _product(acc, x, at, mine, x_d, up + e * up_e, cols, inside, up_d, up_n, D, STEP)
        if up_bias is not None:
            b = up_bias + e * up_bias_e + cols * up_bias_n
            acc += tl.load(b, mask=inside, other=0.0).to(tl.float32)[None, :]
        if z is not None:
            tl.store(z + rows[:, None] * z_s + N + cols[None, :], acc, mask=mask)
        hidden *= acc
    tl.store(h + rows[:, None] * N + cols[None, :], hidden, mask=mask)


@triton.jit
def second(
    a, w, b, v, bias, weights, out,
    slots, tile_expert, tile_start, ends, E, N, D,
    a_s, b_s, w_e, w_n, w_d, v_e, v_n, v_d, bias_e, bias_d,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [slot, D] = (a W (+ b V) (+ bias)) (* weight of the slot), from rows [S, N]."""
    e = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if e >= E:
        return
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, ROWS)
    mine = rows < tl.load(ends + e)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < D
    at = rows.to(tl.int64)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _product(acc, a, at * a_s, mine, 1, w + e * w_e, cols, inside, w_n, w_d, N, STEP)
    if b is not None:
        acc = _product(acc, b, at * b_s, mine, 1, v + e * v_e, cols, inside, v_n, v_d, N, STEP)
    if bias is not None:
        own = tl.load(bias + e * bias_e + cols * bias_d, mask=inside, other=0.0)
        acc += own.to(tl.float32)[None, :]
    slot = tl.load(slots + rows, mask=mine, other=0).to(tl.int64)
    if weights is not None:
        acc *= tl.load(weights + slot, mask=mine, other=0.0).to(tl.float32)[:, None]
    tl.store(out + slot[:, None] * D + cols[None, :], acc, mask=mine[:, None] & inside[None, :])


@triton.jit
def hidden_gradient(
    dy, w, z, weights, dz, h, dot,
    tokens, slots, tile_expert, tile_start, ends, E, D, N,
    dy_t, dy_d, w_e, w_n, w_d, z_s,
    GATED: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """From the gradient of y: dz [S, N or 2 N] of pre-activations, the weighted activations h
    [S, N], and this tile's share of what every slot's weight is multiplied with, dot [slot, tile].
    """
    e = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if e >= E:
        return
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, ROWS)
    mine = rows < tl.load(ends + e)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < N
    at = tl.load(tokens + rows, mask=mine, other=0).to(tl.int64) * dy_t
    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _product(acc, dy, at, mine, dy_d, w + e * w_e, cols, inside, w_d, w_n, D, STEP)
    mask = mine[:, None] & inside[None, :]
    rows = rows.to(tl.int64)
    place = rows[:, None] * z_s + cols[None, :]
    hidden, slope = _activate(tl.load(z + place, mask=mask, other=0.0).to(tl.float32), ACT)
    slot = tl.load(slots + rows, mask=mine, other=0).to(tl.int64)
    weight = tl.load(weights + slot, mask=mine, other=0.0).to(tl.float32)[:, None]
    grad = acc * weight
    if GATED:
        other = tl.load(z + place + N, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz + place + N, grad * hidden, mask=mask)
        grad *= other
        hidden *= other
    tl.store(dz + place, grad * slope, mask=mask)
    tl.store(h + rows[:, None] * N + cols[None, :], hidden * weight, mask=mask)
    share = tl.sum(acc * hidden, axis=1)
    tl.store(dot + slot * tl.num_programs(1) + tl.program_id(1), share, mask=mine)


@triton.jit
def outer(
    a, b, out, sums,
    tokens, starts, ends, N, D, a_s, b_t, b_d, out_e, out_n, out_d, sums_e, sums_n,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [E, N, D] = sum over an expert's rows of a[s] (x) b[token of s]; sums [E, N] of a."""
    e = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + e)
    ns = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ds = tl.program_id(2) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for row in range(tl.load(starts + e), end, STEP):
        rows = row + tl.arange(0, STEP)
        mine = rows < end
        left = tl.load(
            a + rows.to(tl.int64)[None, :] * a_s + ns[:, None],
            mask=mine[None, :] & (ns < N)[:, None],
            other=0.0,
        )
        at = tl.load(tokens + rows, mask=mine, other=0).to(tl.int64) * b_t
        right = tl.load(
            b + at[:, None] + ds[None, :] * b_d,
            mask=mine[:, None] & (ds < D)[None, :],
            other=0.0,
        )
        acc += tl.dot(left, right, input_precision="ieee")
        total += tl.sum(left.to(tl.float32), axis=1)
    mask = (ns < N)[:, None] & (ds < D)[None, :]
    tl.store(out + e * out_e + ns[:, None] * out_n + ds[None, :] * out_d, acc, mask=mask)
    if sums is not None:  # noqa: SIM102 - decided when it is compiled, the other when it runs
        if tl.program_id(2) == 0:
            tl.store(sums + e * sums_e + ns * sums_n, total, mask=ns < N)
