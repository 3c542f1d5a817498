"""The pointwise part of a cell's step as Triton programs, one from each matrix product to the next.
`triton.py` calls them.

T time  B batch  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates that are multiplied each
for itself

    a [G, T, B, H]      the gates: before their activation, then after it; `da` is their gradient
    p [G, B, H]         the recurrent products of this step
    enter [K, B, H]     what enters the recurrent products of the next step, m_h ∘ h, in the type that is
    multiplied in through [K, B, H]   what the products of step t + 1 gave back to h; zero at the last step
    h, c [T + 1, B, H]  the states, the first ones first
    dh, dc [B, H]       what else comes to their gradients
    mask_h [T, K, B, H], mask_c [T, B, H]

`a_g` is the stride of `a` along G, and so on; it is 0 in a mask that is the same for all steps or groups. A
pointer may be None where there is no mask, or no lengths. A program works on BLOCK elements of one sequence,
and calculates in the type ACC.
"""

import triton
import triton.language as tl

program = triton.jit(do_not_specialize=["t"])  # one program for all steps


@triton.jit
def sigmoid(x):
    """By an exponential that does not overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """By the exponential, and by the series where that would lose digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (
        1.0
        - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0))))
    )
    return tl.where(tl.abs(x) < 0.125, near, tl.where(x >= 0, far, -far))


@triton.jit
def place(batch, hidden, BLOCK: tl.constexpr):
    """The sequence b, the elements j of H, which of them are there, B·H, and the places of (b, j) in [B,
    H].
    """
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return b, j, j < hidden, tl.cast(batch, tl.int64) * hidden, b * hidden + j


@triton.jit
def read(ptr, at, there, ACC: tl.constexpr):
    return tl.load(ptr + at, there, other=0.0).to(ACC)


@triton.jit
def is_alive(lengths_ptr, b, t):
    """Whether step t lies before the sequence's end."""
    alive = t >= 0
    if lengths_ptr is not None:
        alive = t < tl.load(lengths_ptr + b)
    return alive


@triton.jit
def let_enter(
    h, enter_ptr, mask_ptr, t, mask_t, mask_k, size, at, there, GROUPS: tl.constexpr, ACC: tl.constexpr
):
    """Writes what of h enters the products of step t, for each group."""
    for k in tl.static_range(GROUPS):
        entering = h
        if mask_ptr is not None:
            entering = h * read(mask_ptr, t * mask_t + k * mask_k + at, there, ACC)
        tl.store(enter_ptr + k * size + at, entering, there)


@triton.jit
def gathered(
    through_ptr,
    mask_ptr,
    t,
    mask_t,
    mask_k,
    size,
    at,
    there,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What comes to the gradient of h through the products of step t, of all groups."""
    total = tl.zeros((BLOCK,), ACC)
    for k in tl.static_range(GROUPS):
        came = read(through_ptr, k * size + at, there, ACC)
        if mask_ptr is not None:
            came = came * read(mask_ptr, t * mask_t + k * mask_k + at, there, ACC)
        total += came
    return total


@program
def lstm_forward(
    a_ptr, p_ptr, h_ptr, c_ptr, enter_ptr, mask_h_ptr, mask_c_ptr, lengths_ptr,
    t, time, batch, hidden, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k, mask_c_t,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    i = sigmoid(read(a_ptr, a_at, there, ACC) + read(p_ptr, p_at, there, ACC))
    f = sigmoid(read(a_ptr, a_at + a_g, there, ACC) + read(p_ptr, p_at + p_g, there, ACC))
    g = tanh(read(a_ptr, a_at + 2 * a_g, there, ACC) + read(p_ptr, p_at + 2 * p_g, there, ACC))
    o = sigmoid(read(a_ptr, a_at + 3 * a_g, there, ACC) + read(p_ptr, p_at + 3 * p_g, there, ACC))
    h_before, c_before = read(h_ptr, t * size + at, there, ACC), read(c_ptr, t * size + at, there, ACC)
    c = f * c_before + i * g
    if mask_c_ptr is not None:
        c = c * read(mask_c_ptr, t * mask_c_t + at, there, ACC)
    h = o * tanh(c)
    alive = is_alive(lengths_ptr, b, t)
    h, c = tl.where(alive, h, h_before), tl.where(alive, c, c_before)
    tl.store(a_ptr + a_at, i, there)
    tl.store(a_ptr + a_at + a_g, f, there)
    tl.store(a_ptr + a_at + 2 * a_g, g, there)
    tl.store(a_ptr + a_at + 3 * a_g, o, there)
    tl.store(h_ptr + (t + 1) * size + at, h, there)
    tl.store(c_ptr + (t + 1) * size + at, c, there)
    if t + 1 < time:
        let_enter(h, enter_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, size, at, there, GROUPS, ACC)


@program
def lstm_backward(
    a_ptr, c_ptr, dy_ptr, dcells_ptr, dh_ptr, dc_ptr, da_ptr, through_ptr, mask_h_ptr, mask_c_ptr,
    lengths_ptr, t, time, batch, hidden, a_g, a_t, a_b, mask_h_t, mask_h_k, mask_c_t,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at, now = t * a_t + b * a_b + j, t * size + at
    after = tl.minimum(
        t + 1, time - 1
    )  # nothing came through the products after the last step, under any mask
    dh = read(dh_ptr, at, there, ACC)
    dh += gathered(through_ptr, mask_h_ptr, after, mask_h_t, mask_h_k, size, at, there, GROUPS, ACC, BLOCK)
    dc = read(dc_ptr, at, there, ACC)
    alive = is_alive(lengths_ptr, b, t)
    dh += tl.where(alive, read(dy_ptr, now, there, ACC), 0.0)
    if dcells_ptr is not None:
        dc += tl.where(alive, read(dcells_ptr, now, there, ACC), 0.0)
    i, f = read(a_ptr, a_at, there, ACC), read(a_ptr, a_at + a_g, there, ACC)
    g, o = read(a_ptr, a_at + 2 * a_g, there, ACC), read(a_ptr, a_at + 3 * a_g, there, ACC)
    tanh_c = tanh(read(c_ptr, now + size, there, ACC))
    dc_new = dc + dh * o * (1.0 - tanh_c * tanh_c)
    if mask_c_ptr is not None:
        dc_new = dc_new * read(mask_c_ptr, t * mask_c_t + at, there, ACC)
    di = dc_new * g * i * (1.0 - i)
    df = dc_new * read(c_ptr, now, there, ACC) * f * (1.0 - f)
    dg = dc_new * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    tl.store(da_ptr + a_at, tl.where(alive, di, 0.0), there)
    tl.store(da_ptr + a_at + a_g, tl.where(alive, df, 0.0), there)
    tl.store(da_ptr + a_at + 2 * a_g, tl.where(alive, dg, 0.0), there)
    tl.store(da_ptr + a_at + 3 * a_g, tl.where(alive, do, 0.0), there)
    tl.store(dh_ptr + at, tl.where(alive, 0.0, dh), there)
    tl.store(dc_ptr + at, tl.where(alive, dc_new * f, dc), there)


@triton.jit
def gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, there, ACC: tl.constexpr):
    """The new state, written as z and the candidate are."""
    h_before = read(h_ptr, t * size + at, there, ACC)
    h = tl.where(is_alive(lengths_ptr, b, t), n + z * (h_before - n), h_before)
    tl.store(a_ptr + a_at + a_g, z, there)
    tl.store(a_ptr + a_at + 2 * a_g, n, there)
    tl.store(h_ptr + (t + 1) * size + at, h, there)
    return h


@program
def gru_reset_after(
    a_ptr, p_ptr, bias_ptr, h_ptr, inner_ptr, enter_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A whole step; `inner` is U_n (m_h ∘ h) + b_hh,n, of all steps."""
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    r = sigmoid(read(a_ptr, a_at, there, ACC) + read(p_ptr, p_at, there, ACC))
    z = sigmoid(read(a_ptr, a_at + a_g, there, ACC) + read(p_ptr, p_at + p_g, there, ACC))
    inner = read(p_ptr, p_at + 2 * p_g, there, ACC) + read(bias_ptr, j, there, ACC)
    n = tanh(read(a_ptr, a_at + 2 * a_g, there, ACC) + r * inner)
    tl.store(a_ptr + a_at, r, there)
    tl.store(inner_ptr + t * size + at, inner, there)
    h = gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, there, ACC)
    if t + 1 < time:
        let_enter(h, enter_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, size, at, there, GROUPS, ACC)


@program
def gru_gates(
    a_ptr, p_ptr, h_ptr, enter_ptr, mask_h_ptr,
    t, batch, hidden, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r and z, and what enters the product of the candidate of the same step, [B, H]: r ∘ m_h,n ∘ h."""
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    r = sigmoid(read(a_ptr, a_at, there, ACC) + read(p_ptr, p_at, there, ACC))
    z = sigmoid(read(a_ptr, a_at + a_g, there, ACC) + read(p_ptr, p_at + p_g, there, ACC))
    tl.store(a_ptr + a_at, r, there)
    tl.store(a_ptr + a_at + a_g, z, there)
    entering = r * read(h_ptr, t * size + at, there, ACC)
    if mask_h_ptr is not None:
        entering = entering * read(mask_h_ptr, t * mask_h_t + 2 * mask_h_k + at, there, ACC)
    tl.store(enter_ptr + at, entering, there)


@program
def gru_candidate(
    a_ptr, p_ptr, h_ptr, enter_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, a_g, a_t, a_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidate, whose product is `p` [B, H], and the new state; `enter` is for r and z of the next
    step.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at = t * a_t + b * a_b + j
    n = tanh(read(a_ptr, a_at + 2 * a_g, there, ACC) + read(p_ptr, at, there, ACC))
    z = read(a_ptr, a_at + a_g, there, ACC)
    h = gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, there, ACC)
    if t + 1 < time:
        let_enter(h, enter_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, size, at, there, GROUPS, ACC)


@program
def gru_backward(
    a_ptr, h_ptr, inner_ptr, dy_ptr, dh_ptr, da_ptr, dp_ptr, through_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, a_g, a_t, a_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through z and the candidate, and where the reset gate comes after the product (`inner` is not
    None), through r.

    `dp`, like `a`, is then the gradient of the recurrent products: that of `a` but for the candidate's. Where
    the reset gate comes before the product, `gru_gates_backward` continues with the gradient of the
    candidate's product.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at, now = t * a_t + b * a_b + j, t * size + at
    after = tl.minimum(
        t + 1, time - 1
    )  # nothing came through the products after the last step, under any mask
    dh = read(dh_ptr, at, there, ACC)
    dh += gathered(through_ptr, mask_h_ptr, after, mask_h_t, mask_h_k, size, at, there, GROUPS, ACC, BLOCK)
    alive = is_alive(lengths_ptr, b, t)
    dh += tl.where(alive, read(dy_ptr, now, there, ACC), 0.0)
    z, n = read(a_ptr, a_at + a_g, there, ACC), read(a_ptr, a_at + 2 * a_g, there, ACC)
    dz = tl.where(alive, dh * (read(h_ptr, now, there, ACC) - n) * z * (1.0 - z), 0.0)
    dn = tl.where(alive, dh * (1.0 - z) * (1.0 - n * n), 0.0)
    tl.store(da_ptr + a_at + a_g, dz, there)
    tl.store(da_ptr + a_at + 2 * a_g, dn, there)
    tl.store(dh_ptr + at, tl.where(alive, dh * z, dh), there)
    if inner_ptr is not None:
        r = read(a_ptr, a_at, there, ACC)
        dr = dn * read(inner_ptr, now, there, ACC) * r * (1.0 - r)
        tl.store(da_ptr + a_at, dr, there)
        tl.store(dp_ptr + a_at, dr, there)
        tl.store(dp_ptr + a_at + a_g, dz, there)
        tl.store(dp_ptr + a_at + 2 * a_g, dn * r, there)


@program
def gru_gates_backward(
    a_ptr, h_ptr, dh_ptr, da_ptr, through_ptr, mask_h_ptr,
    t, batch, hidden, a_g, a_t, a_b, mask_h_t, mask_h_k,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through r, from what the candidate's product of this step gave back, `through` [B, H]: zero beyond
    a sequence's end.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, there, size, at = place(batch, hidden, BLOCK)
    a_at = t * a_t + b * a_b + j
    came = read(through_ptr, at, there, ACC)
    if mask_h_ptr is not None:
        came = came * read(mask_h_ptr, t * mask_h_t + 2 * mask_h_k + at, there, ACC)
    r = read(a_ptr, a_at, there, ACC)
    tl.store(da_ptr + a_at, came * read(h_ptr, t * size + at, there, ACC) * r * (1.0 - r), there)
    tl.store(dh_ptr + at, read(dh_ptr, at, there, ACC) + came * r, there)


INTERPRETED = not isinstance(
    lstm_forward, triton.JITFunction
)  # TRITON_INTERPRET was set: the programs run on any machine, slowly
