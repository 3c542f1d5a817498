"""The pointwise part of a cell's step as Triton programs, each from one matrix product to the next.
`loops.py` calls them.

T time  B batch  H hidden size  R size of an aligned row, at least H
G gates (LSTM i f g o; GRU r z n)  K groups of gates with one product each

    a [G, T, B, R]      the gates: before their activation, then after it; `da` is their gradient
    p [G, B, R]         the recurrent products of this step
    inputs [K, B, R]    the inputs of the next step's recurrent products, m_h ∘ h, in the type of products
    grad_h [K, B, R]    the gradient of these inputs from step t + 1; zero at the last step
    h, c [T + 1, B, H]  the states, beginning with those before the first step
    dh, dc [B, H]       the terms of the states' gradients that are not in grad_h
    mask_h [T, K, B, H], mask_c [T, B, H]

`a_g` is the stride of `a` along G, and so on; it is 0 in a mask that is the same for all steps or groups. A
pointer is None without a mask, or without lengths. A program works on BLOCK elements of one sequence, and
calculates in the type ACC.
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
def position(batch, hidden, BLOCK: tl.constexpr):
    """The sequence b, the elements j of H, whether each exists, B·H, and the offsets of (b, j) in [B, H]."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return b, j, j < hidden, tl.cast(batch, tl.int64) * hidden, b * hidden + j


@triton.jit
def aligned_position(batch, row, b, j):
    """R·B, and the offsets of (b, j) in [B, R]."""
    return tl.cast(batch, tl.int64) * row, b * row + j


@triton.jit
def read(ptr, at, exists, ACC: tl.constexpr):
    return tl.load(ptr + at, exists, other=0.0).to(ACC)


@triton.jit
def is_alive(lengths_ptr, b, t):
    """Whether step t lies before the sequence's end."""
    alive = t >= 0
    if lengths_ptr is not None:
        alive = t < tl.load(lengths_ptr + b)
    return alive


@triton.jit
def write_inputs(
    h, inputs_ptr, mask_ptr, t, mask_t, mask_k, at, rows, row_at, exists,
    GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the inputs of the products of step t for each group, m_h ∘ h."""
    for k in tl.static_range(GROUPS):
        masked = h
        if mask_ptr is not None:
            masked = h * read(mask_ptr, t * mask_t + k * mask_k + at, exists, ACC)
        tl.store(inputs_ptr + k * rows + row_at, masked, exists)


@triton.jit
def recurrent_gradient(
    grad_h_ptr, mask_ptr, t, mask_t, mask_k, at, rows, row_at, exists,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of h through the products of step t, summed over groups."""
    total = tl.zeros((BLOCK,), ACC)
    for k in tl.static_range(GROUPS):
        grad_h = read(grad_h_ptr, k * rows + row_at, exists, ACC)
        if mask_ptr is not None:
            grad_h = grad_h * read(mask_ptr, t * mask_t + k * mask_k + at, exists, ACC)
        total += grad_h
    return total


@program
def lstm_forward(
    a_ptr, p_ptr, h_ptr, c_ptr, inputs_ptr, mask_h_ptr, mask_c_ptr, lengths_ptr,
    t, time, batch, hidden, row, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k, mask_c_t,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    rows, row_at = aligned_position(batch, row, b, j)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    i = sigmoid(read(a_ptr, a_at, exists, ACC) + read(p_ptr, p_at, exists, ACC))
    f = sigmoid(read(a_ptr, a_at + a_g, exists, ACC) + read(p_ptr, p_at + p_g, exists, ACC))
    g = tanh(read(a_ptr, a_at + 2 * a_g, exists, ACC) + read(p_ptr, p_at + 2 * p_g, exists, ACC))
    o = sigmoid(read(a_ptr, a_at + 3 * a_g, exists, ACC) + read(p_ptr, p_at + 3 * p_g, exists, ACC))
    h_before, c_before = read(h_ptr, t * size + at, exists, ACC), read(c_ptr, t * size + at, exists, ACC)
    c = f * c_before + i * g
    if mask_c_ptr is not None:
        c = c * read(mask_c_ptr, t * mask_c_t + at, exists, ACC)
    h = o * tanh(c)
    alive = is_alive(lengths_ptr, b, t)
    h, c = tl.where(alive, h, h_before), tl.where(alive, c, c_before)
    tl.store(a_ptr + a_at, i, exists)
    tl.store(a_ptr + a_at + a_g, f, exists)
    tl.store(a_ptr + a_at + 2 * a_g, g, exists)
    tl.store(a_ptr + a_at + 3 * a_g, o, exists)
    tl.store(h_ptr + (t + 1) * size + at, h, exists)
    tl.store(c_ptr + (t + 1) * size + at, c, exists)
    if t + 1 < time:
        write_inputs(
            h, inputs_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, at, rows, row_at, exists, GROUPS, ACC
        )


@program
def lstm_backward(
    a_ptr, c_ptr, dy_ptr, dcells_ptr, dh_ptr, dc_ptr, da_ptr, grad_h_ptr, mask_h_ptr, mask_c_ptr,
    lengths_ptr, t, time, batch, hidden, row, a_g, a_t, a_b, mask_h_t, mask_h_k, mask_c_t,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    rows, row_at = aligned_position(batch, row, b, j)
    a_at, now = t * a_t + b * a_b + j, t * size + at
    # At the last step the gradient through the products is zero, under any mask.
    after = tl.minimum(t + 1, time - 1)
    dh = read(dh_ptr, at, exists, ACC)
    dh += recurrent_gradient(
        grad_h_ptr, mask_h_ptr, after, mask_h_t, mask_h_k, at, rows, row_at, exists, GROUPS, ACC, BLOCK
    )
    dc = read(dc_ptr, at, exists, ACC)
    alive = is_alive(lengths_ptr, b, t)
    dh += tl.where(alive, read(dy_ptr, now, exists, ACC), 0.0)
    if dcells_ptr is not None:
        dc += tl.where(alive, read(dcells_ptr, now, exists, ACC), 0.0)
    i, f = read(a_ptr, a_at, exists, ACC), read(a_ptr, a_at + a_g, exists, ACC)
    g, o = read(a_ptr, a_at + 2 * a_g, exists, ACC), read(a_ptr, a_at + 3 * a_g, exists, ACC)
    tanh_c = tanh(read(c_ptr, now + size, exists, ACC))
    dc_new = dc + dh * o * (1.0 - tanh_c * tanh_c)
    if mask_c_ptr is not None:
        dc_new = dc_new * read(mask_c_ptr, t * mask_c_t + at, exists, ACC)
    di = tl.where(alive, dc_new * g * i * (1.0 - i), 0.0)
    df = tl.where(alive, dc_new * read(c_ptr, now, exists, ACC) * f * (1.0 - f), 0.0)
    dg = tl.where(alive, dc_new * i * (1.0 - g * g), 0.0)
    do = tl.where(alive, dh * tanh_c * o * (1.0 - o), 0.0)
    tl.store(da_ptr + a_at, di, exists)
    tl.store(da_ptr + a_at + a_g, df, exists)
    tl.store(da_ptr + a_at + 2 * a_g, dg, exists)
    tl.store(da_ptr + a_at + 3 * a_g, do, exists)
    tl.store(dh_ptr + at, tl.where(alive, 0.0, dh), exists)
    tl.store(dc_ptr + at, tl.where(alive, dc_new * f, dc), exists)


@triton.jit
def gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, exists, ACC: tl.constexpr):
    """The new state; writes it, z and the candidate."""
    h_before = read(h_ptr, t * size + at, exists, ACC)
    h = tl.where(is_alive(lengths_ptr, b, t), n + z * (h_before - n), h_before)
    tl.store(a_ptr + a_at + a_g, z, exists)
    tl.store(a_ptr + a_at + 2 * a_g, n, exists)
    tl.store(h_ptr + (t + 1) * size + at, h, exists)
    return h


@program
def gru_reset_after(
    a_ptr, p_ptr, bias_ptr, h_ptr, inner_ptr, inputs_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, row, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A whole step; `inner` is U_n (m_h ∘ h) + b_hh,n, of all steps."""
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    rows, row_at = aligned_position(batch, row, b, j)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    r = sigmoid(read(a_ptr, a_at, exists, ACC) + read(p_ptr, p_at, exists, ACC))
    z = sigmoid(read(a_ptr, a_at + a_g, exists, ACC) + read(p_ptr, p_at + p_g, exists, ACC))
    inner = read(p_ptr, p_at + 2 * p_g, exists, ACC) + read(bias_ptr, j, exists, ACC)
    n = tanh(read(a_ptr, a_at + 2 * a_g, exists, ACC) + r * inner)
    tl.store(a_ptr + a_at, r, exists)
    tl.store(inner_ptr + t * size + at, inner, exists)
    h = gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, exists, ACC)
    if t + 1 < time:
        write_inputs(
            h, inputs_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, at, rows, row_at, exists, GROUPS, ACC
        )


@program
def gru_gates(
    a_ptr, p_ptr, h_ptr, inputs_ptr, mask_h_ptr,
    t, batch, hidden, row, a_g, a_t, a_b, p_g, p_b, mask_h_t, mask_h_k,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r and z, and the input of the candidate's product of the same step, [B, R]: r ∘ m_h,n ∘ h."""
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    _, row_at = aligned_position(batch, row, b, j)
    a_at, p_at = t * a_t + b * a_b + j, b * p_b + j
    r = sigmoid(read(a_ptr, a_at, exists, ACC) + read(p_ptr, p_at, exists, ACC))
    z = sigmoid(read(a_ptr, a_at + a_g, exists, ACC) + read(p_ptr, p_at + p_g, exists, ACC))
    tl.store(a_ptr + a_at, r, exists)
    tl.store(a_ptr + a_at + a_g, z, exists)
    masked = r * read(h_ptr, t * size + at, exists, ACC)
    if mask_h_ptr is not None:
        masked = masked * read(mask_h_ptr, t * mask_h_t + 2 * mask_h_k + at, exists, ACC)
    tl.store(inputs_ptr + row_at, masked, exists)


@program
def gru_candidate(
    a_ptr, p_ptr, h_ptr, inputs_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, row, a_g, a_t, a_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidate, whose product is `p` [B, R], and the new state; `inputs` are those of r and z of the
    next step.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    rows, row_at = aligned_position(batch, row, b, j)
    a_at = t * a_t + b * a_b + j
    n = tanh(read(a_ptr, a_at + 2 * a_g, exists, ACC) + read(p_ptr, row_at, exists, ACC))
    z = read(a_ptr, a_at + a_g, exists, ACC)
    h = gru_end(a_ptr, a_at, a_g, h_ptr, lengths_ptr, z, n, t, b, size, at, exists, ACC)
    if t + 1 < time:
        write_inputs(
            h, inputs_ptr, mask_h_ptr, t + 1, mask_h_t, mask_h_k, at, rows, row_at, exists, GROUPS, ACC
        )


@program
def gru_backward(
    a_ptr, h_ptr, inner_ptr, dy_ptr, dh_ptr, da_ptr, dp_ptr, grad_h_ptr, mask_h_ptr, lengths_ptr,
    t, time, batch, hidden, row, a_g, a_t, a_b, mask_h_t, mask_h_k,
    GROUPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward pass of z and the candidate, and where the reset gate comes after the product (`inner` is
    not None), of r.

    `dp`, with the strides of `a`, is then the gradient of the recurrent products, equal to `da` except for
    the candidate. Where the reset gate comes before the product, `gru_gates_backward` continues with the
    gradient of the candidate's product.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    rows, row_at = aligned_position(batch, row, b, j)
    a_at, now = t * a_t + b * a_b + j, t * size + at
    # At the last step the gradient through the products is zero, under any mask.
    after = tl.minimum(t + 1, time - 1)
    dh = read(dh_ptr, at, exists, ACC)
    dh += recurrent_gradient(
        grad_h_ptr, mask_h_ptr, after, mask_h_t, mask_h_k, at, rows, row_at, exists, GROUPS, ACC, BLOCK
    )
    alive = is_alive(lengths_ptr, b, t)
    dh += tl.where(alive, read(dy_ptr, now, exists, ACC), 0.0)
    z, n = read(a_ptr, a_at + a_g, exists, ACC), read(a_ptr, a_at + 2 * a_g, exists, ACC)
    dz = tl.where(alive, dh * (read(h_ptr, now, exists, ACC) - n) * z * (1.0 - z), 0.0)
    dn = tl.where(alive, dh * (1.0 - z) * (1.0 - n * n), 0.0)
    tl.store(da_ptr + a_at + a_g, dz, exists)
    tl.store(da_ptr + a_at + 2 * a_g, dn, exists)
    tl.store(dh_ptr + at, tl.where(alive, dh * z, dh), exists)
    if inner_ptr is not None:
        r = read(a_ptr, a_at, exists, ACC)
        dr = dn * read(inner_ptr, now, exists, ACC) * r * (1.0 - r)
        tl.store(da_ptr + a_at, dr, exists)
        tl.store(dp_ptr + a_at, dr, exists)
        tl.store(dp_ptr + a_at + a_g, dz, exists)
        tl.store(dp_ptr + a_at + 2 * a_g, dn * r, exists)


@program
def gru_gates_backward(
    a_ptr, h_ptr, dh_ptr, da_ptr, grad_h_ptr, mask_h_ptr,
    t, batch, hidden, row, a_g, a_t, a_b, mask_h_t, mask_h_k,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward pass of r, from the gradient of the input of the candidate's product, `grad_h` [B, R]:
    zero beyond the end of a sequence.
    """
    t, a_g = tl.cast(t, tl.int64), tl.cast(a_g, tl.int64)
    b, j, exists, size, at = position(batch, hidden, BLOCK)
    _, row_at = aligned_position(batch, row, b, j)
    a_at = t * a_t + b * a_b + j
    grad_h = read(grad_h_ptr, row_at, exists, ACC)
    if mask_h_ptr is not None:
        grad_h = grad_h * read(mask_h_ptr, t * mask_h_t + 2 * mask_h_k + at, exists, ACC)
    r = read(a_ptr, a_at, exists, ACC)
    tl.store(da_ptr + a_at, grad_h * read(h_ptr, t * size + at, exists, ACC) * r * (1.0 - r), exists)
    tl.store(dh_ptr + at, read(dh_ptr, at, exists, ACC) + grad_h * r, exists)


# With TRITON_INTERPRET set the programs run on any machine, slowly.
INTERPRETED = not isinstance(lstm_forward, triton.JITFunction)
