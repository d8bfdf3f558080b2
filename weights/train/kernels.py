"""Triton kernels for training: RG-LRU scan, latent attention, window attention; forward and backward.

They compute what ops.py computes, for the shapes that training uses (see `supported`), without
writing score matrices or states of single tokens to memory. Sessions may begin anywhere inside a
row: `segment` numbers the sessions of a row, and the state carried in belongs to segment 0.

Letters: B rows, T tokens, D hidden size, H heads, M latents per head, d head width, w window.

The latent kernels keep sums of exp(theta) without a running maximum: theta is clamped to +-60, where
float32 and bf16 hold them, sums of any length too, as well as the gradients, which divide by them once.
evaluate.py uses the exact form of ops.py instead.
"""
import os

import torch
import triton
import triton.language as tl

THETA_LIMIT = 60.0
# What the matrix units multiply; Triton's interpreter has no bf16 products.
OPERAND = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16


@triton.jit
def _combine(a_left, b_left, a_right, b_right):
    """Composition of two steps z -> a z + b, left first."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _gates(h, recurrence, gate, decay, fresh):
    """r, i, log a, a and the input multiplier of one tile; `fresh` rows have no past."""
    r = tl.sigmoid(recurrence)
    i = tl.sigmoid(gate)
    log_a = -decay[None, :] * r
    a = tl.exp(log_a)
    twice = 2 * log_a
    # -expm1(2 log a): the series where exp would cancel
    one_minus = tl.where(twice > -0.02, -twice * (1 + twice * 0.5 * (1 + twice / 3)), 1 - tl.exp(twice))
    multiplier = tl.sqrt(tl.maximum(one_minus, 1e-12))
    a = tl.where(fresh[:, None], 0.0, a)
    multiplier = tl.where(fresh[:, None], 1.0, multiplier)
    return r, i, a, multiplier


@triton.jit
def _rglru_forward(h_ptr, r_ptr, i_ptr, decay_ptr, z0_ptr, start_ptr, z_ptr, last_ptr,
                   T, D, h_b, h_t, r_b, r_t, i_b, i_t,
                   BT: tl.constexpr, BC: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.arange(0, BT)
    decay = tl.load(decay_ptr + c)
    carry = tl.load(z0_ptr + b * D + c)
    for t0 in range(0, T, BT):
        t = t0 + row
        h = tl.load(h_ptr + b * h_b + t[:, None] * h_t + c[None, :]).to(tl.float32)
        recurrence = tl.load(r_ptr + b * r_b + t[:, None] * r_t + c[None, :]).to(tl.float32)
        gate = tl.load(i_ptr + b * i_b + t[:, None] * i_t + c[None, :]).to(tl.float32)
        fresh = tl.load(start_ptr + b * T + t) != 0
        r, i, a, multiplier = _gates(h, recurrence, gate, decay, fresh)
        through, z = tl.associative_scan((a, multiplier * i * h), 0, _combine)
        z += through * carry[None, :]
        carry = tl.sum(tl.where(row[:, None] == BT - 1, z, 0.0), 0)
        tl.store(z_ptr + (b * T + t[:, None]) * D + c[None, :], z.to(z_ptr.dtype.element_ty))
    tl.store(last_ptr + b * D + c, carry)


@triton.jit
def _rglru_backward(h_ptr, r_ptr, i_ptr, decay_ptr, z0_ptr, start_ptr, z_ptr, dz_ptr,
                    dh_ptr, dr_ptr, di_ptr, ddecay_ptr,
                    T, D, h_b, h_t, r_b, r_t, i_b, i_t,
                    BT: tl.constexpr, BC: tl.constexpr):
    """Time runs backwards: row 0 of a tile is its last token."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.arange(0, BT)
    decay = tl.load(decay_ptr + c)
    carry = tl.zeros([BC], tl.float32)          # gradient of the state after this tile's last token ...
    ddecay = tl.zeros([BC], tl.float32)
    for t0 in range(0, T, BT):
        t = T - 1 - t0 - row
        later = t + 1 < T
        after = tl.where(later, t + 1, t)       # ... reaches it through a of the token after it
        recurrence = tl.load(r_ptr + b * r_b + after[:, None] * r_t + c[None, :]).to(tl.float32)
        fresh = tl.load(start_ptr + b * T + after) != 0
        a_after = tl.where((fresh | (t + 1 >= T))[:, None], 0.0,
                           tl.exp(-decay[None, :] * tl.sigmoid(recurrence)))
        dz = tl.load(dz_ptr + (b * T + t[:, None]) * D + c[None, :]).to(tl.float32)
        through, grad = tl.associative_scan((a_after, dz), 0, _combine)
        grad += through * carry[None, :]
        carry = tl.sum(tl.where(row[:, None] == BT - 1, grad, 0.0), 0)

        h = tl.load(h_ptr + b * h_b + t[:, None] * h_t + c[None, :]).to(tl.float32)
        recurrence = tl.load(r_ptr + b * r_b + t[:, None] * r_t + c[None, :]).to(tl.float32)
        gate = tl.load(i_ptr + b * i_b + t[:, None] * i_t + c[None, :]).to(tl.float32)
        fresh = tl.load(start_ptr + b * T + t) != 0
        r, i, a, multiplier = _gates(h, recurrence, gate, decay, fresh)
        before = tl.where(t > 0, t - 1, 0)
        z_before = tl.load(z_ptr + (b * T + before[:, None]) * D + c[None, :]).to(tl.float32)
        z0 = tl.load(z0_ptr + b * D + c)
        z_before = tl.where((t == 0)[:, None], z0[None, :], z_before)

        dlog_a = grad * (a * z_before - i * h * a * a / multiplier)     # a = 0 where fresh
        ddecay += tl.sum(-dlog_a * r, 0)
        out = (b * T + t[:, None]) * D + c[None, :]
        dtype = dh_ptr.dtype.element_ty
        tl.store(dr_ptr + out, (-dlog_a * decay[None, :] * r * (1 - r)).to(dtype))
        tl.store(di_ptr + out, (grad * multiplier * h * i * (1 - i)).to(dtype))
        tl.store(dh_ptr + out, (grad * multiplier * i).to(dtype))
    tl.store(ddecay_ptr + b * D + c, ddecay)


def _tile(n, most):
    """The largest power of two that divides n, at most `most`."""
    return min(n & -n, most)


@torch.library.custom_op("latte::rglru", mutates_args=())
def rglru(h: torch.Tensor, recurrence: torch.Tensor, gate: torch.Tensor, decay: torch.Tensor,
          z0: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h, recurrence, gate [B, T, D] (gates before the sigmoid), decay [D] = 8 softplus(lambda),
    z0 [B, D] f32, start [B, T] int32 (1: no past). Returns z [B, T, D] and the last state [B, D]."""
    B, T, D = h.shape
    z = torch.empty((B, T, D), dtype=h.dtype, device=h.device)
    last = torch.empty((B, D), dtype=torch.float32, device=h.device)
    bc = _tile(D, 64)
    _rglru_forward[(B, D // bc)](
        h, recurrence, gate, decay, z0, start, z, last, T, D, h.stride(0), h.stride(1),
        recurrence.stride(0), recurrence.stride(1), gate.stride(0), gate.stride(1),
        BT=_tile(T, 64), BC=bc, num_warps=4)
    return z, last


@rglru.register_fake
def _(h, recurrence, gate, decay, z0, start):
    B, T, D = h.shape
    return h.new_empty((B, T, D)), h.new_empty((B, D), dtype=torch.float32)


@torch.library.custom_op("latte::rglru_grad", mutates_args=())
def rglru_grad(h: torch.Tensor, recurrence: torch.Tensor, gate: torch.Tensor, decay: torch.Tensor,
               z0: torch.Tensor, start: torch.Tensor, z: torch.Tensor, dz: torch.Tensor,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, D = h.shape
    dz = dz.contiguous()
    dh, dr, di = (torch.empty((B, T, D), dtype=h.dtype, device=h.device) for _ in range(3))
    ddecay = torch.empty((B, D), dtype=torch.float32, device=h.device)
    bc = _tile(D, 64)
    _rglru_backward[(B, D // bc)](
        h, recurrence, gate, decay, z0, start, z, dz, dh, dr, di, ddecay, T, D,
        h.stride(0), h.stride(1), recurrence.stride(0), recurrence.stride(1),
        gate.stride(0), gate.stride(1), BT=_tile(T, 32), BC=bc, num_warps=4)
    return dh, dr, di, ddecay.sum(0)


@rglru_grad.register_fake
def _(h, recurrence, gate, decay, z0, start, z, dz):
    def like():
        return torch.empty(h.shape, dtype=h.dtype, device=h.device)
    return like(), like(), like(), torch.empty_like(decay)


def _rglru_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


def _rglru_back(ctx, dz, dlast):
    return *rglru_grad(*ctx.saved_tensors, dz), None, None


rglru.register_autograd(_rglru_back, setup_context=_rglru_setup)


@triton.jit
def _latent_chunk(theta_ptr, p_ptr, segment_ptr, alpha, b, t, theta_t, p_t, carried,
                  LIMIT: tl.constexpr, M: tl.constexpr, DT: tl.constexpr):
    """What both directions need of one chunk: k = exp(theta), p, normalisers A, mask, segments."""
    m = tl.arange(0, M)
    theta = tl.load(theta_ptr + t[:, None] * theta_t + m[None, :]).to(tl.float32)
    inside = (theta > -LIMIT) & (theta < LIMIT)
    k = tl.exp(tl.minimum(tl.maximum(theta, -LIMIT), LIMIT)).to(DT)
    p = tl.load(p_ptr + t[:, None] * p_t + m[None, :]).to(tl.float32)
    segment = tl.load(segment_ptr + t)
    mask = (t[:, None] >= t[None, :]) & (segment[:, None] == segment[None, :])
    past = segment == carried                   # tokens that see the state carried in
    normaliser = tl.dot(mask.to(DT), k) + tl.where(past[:, None], alpha[None, :], 0.0)
    return inside, k, p, segment, mask, past, normaliser


@triton.jit
def _latent_forward(theta_ptr, p_ptr, v_ptr, segment_ptr, alpha0_ptr, s0_ptr,
                    y_ptr, alpha_ptr, s_ptr, T, H, theta_b, theta_t, p_b, p_t, v_b, v_t,
                    C: tl.constexpr, M: tl.constexpr, d: tl.constexpr, LIMIT: tl.constexpr, DT: tl.constexpr):
    """One program per row and head. alpha, s [B, H, T/C + 1, ...]: the states before each chunk and the last."""
    pid = tl.program_id(0)
    b = (pid // H).to(tl.int64)
    head = pid % H
    m = tl.arange(0, M)
    x = tl.arange(0, d)
    row = tl.arange(0, C)
    n_chunks = T // C
    state = pid.to(tl.int64) * (n_chunks + 1)
    alpha = tl.load(alpha0_ptr + pid * M + m)
    s = tl.load(s0_ptr + pid.to(tl.int64) * M * d + m[:, None] * d + x[None, :])
    carried = 0
    for chunk in range(0, n_chunks):
        t = chunk * C + row
        tl.store(alpha_ptr + (state + chunk) * M + m, alpha)
        tl.store(s_ptr + (state + chunk) * M * d + m[:, None] * d + x[None, :], s)
        inside, k, p, segment, mask, past, normaliser = _latent_chunk(
            theta_ptr + b * theta_b + head * M, p_ptr + b * p_b + head * M, segment_ptr + b * T,
            alpha, b, t, theta_t, p_t, carried, LIMIT, M, DT)
        v = tl.load(v_ptr + b * v_b + head * d + t[:, None] * v_t + x[None, :]).to(DT)
        q = (p / normaliser).to(DT)
        weights = tl.where(mask, tl.dot(q, tl.trans(k)), 0.0).to(DT)
        y = tl.dot(weights, v)
        y += tl.where(past[:, None], tl.dot(q, s.to(DT)), 0.0)
        tl.store(y_ptr + ((b * T + t[:, None]) * H + head) * d + x[None, :], y.to(y_ptr.dtype.element_ty))

        ending = tl.max(segment, 0)             # only the session that is still open is carried on
        kept = tl.where((segment == ending)[:, None], k, 0.0).to(DT)
        on = tl.where(ending == carried, 1.0, 0.0)
        s = s * on + tl.dot(tl.trans(kept), v)
        alpha = alpha * on + tl.sum(kept.to(tl.float32), 0)
        carried = ending
    tl.store(alpha_ptr + (state + n_chunks) * M + m, alpha)
    tl.store(s_ptr + (state + n_chunks) * M * d + m[:, None] * d + x[None, :], s)


@triton.jit
def _latent_backward(theta_ptr, p_ptr, v_ptr, segment_ptr, alpha_ptr, s_ptr, dy_ptr,
                     dtheta_ptr, dp_ptr, dv_ptr, T, H, theta_b, theta_t, p_b, p_t, v_b, v_t,
                     C: tl.constexpr, M: tl.constexpr, d: tl.constexpr, LIMIT: tl.constexpr, DT: tl.constexpr):
    pid = tl.program_id(0)
    b = (pid // H).to(tl.int64)
    head = pid % H
    m = tl.arange(0, M)
    x = tl.arange(0, d)
    row = tl.arange(0, C)
    n_chunks = T // C
    state = pid.to(tl.int64) * (n_chunks + 1)
    ds = tl.zeros([M, d], tl.float32)           # gradient of the state after the chunk
    dalpha = tl.zeros([M], tl.float32)
    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step
        t = chunk * C + row
        alpha = tl.load(alpha_ptr + (state + chunk) * M + m)
        s = tl.load(s_ptr + (state + chunk) * M * d + m[:, None] * d + x[None, :])
        carried = tl.load(segment_ptr + b * T + tl.maximum(chunk * C - 1, 0))
        carried = tl.where(chunk == 0, 0, carried)
        inside, k, p, segment, mask, past, normaliser = _latent_chunk(
            theta_ptr + b * theta_b + head * M, p_ptr + b * p_b + head * M, segment_ptr + b * T,
            alpha, b, t, theta_t, p_t, carried, LIMIT, M, DT)
        v = tl.load(v_ptr + b * v_b + head * d + t[:, None] * v_t + x[None, :]).to(DT)
        dy = tl.load(dy_ptr + ((b * T + t[:, None]) * H + head) * d + x[None, :]).to(DT)
        q32 = p / normaliser
        q = q32.to(DT)
        weights = tl.where(mask, tl.dot(q, tl.trans(k)), 0.0).to(DT)
        dweights = tl.where(mask, tl.dot(dy, tl.trans(v)), 0.0).to(DT)
        ending = tl.max(segment, 0)
        kept = segment == ending
        on = tl.where(ending == carried, 1.0, 0.0)
        ds16 = ds.to(DT)

        dq = tl.dot(dweights, k) + tl.where(past[:, None], tl.dot(dy, tl.trans(s.to(DT))), 0.0)
        dnormaliser = -dq * q32 / normaliser
        dk = tl.dot(tl.trans(dweights), q) + tl.dot(tl.trans(mask.to(DT)), dnormaliser.to(DT))
        dk += tl.where(kept[:, None], tl.dot(v, tl.trans(ds16)) + dalpha[None, :], 0.0)
        dv = tl.dot(tl.trans(weights), dy) + tl.where(kept[:, None], tl.dot(k, ds16), 0.0)

        q_past = tl.where(past[:, None], q, 0.0).to(DT)
        ds = ds * on + tl.dot(tl.trans(q_past), dy)
        dalpha = dalpha * on + tl.sum(tl.where(past[:, None], dnormaliser, 0.0), 0)

        latent = ((b * T + t[:, None]) * H + head) * M + m[None, :]
        dtheta = tl.where(inside, dk * k.to(tl.float32), 0.0)
        tl.store(dtheta_ptr + latent, dtheta.to(dtheta_ptr.dtype.element_ty))
        tl.store(dp_ptr + latent, (dq / normaliser).to(dp_ptr.dtype.element_ty))
        tl.store(dv_ptr + ((b * T + t[:, None]) * H + head) * d + x[None, :], dv.to(dv_ptr.dtype.element_ty))


def _rows(x):
    """x [B, T, H, n] with the last two dimensions dense, as the kernels read it."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


@torch.library.custom_op("latte::latent", mutates_args=())
def latent(theta: torch.Tensor, p: torch.Tensor, v: torch.Tensor, segment: torch.Tensor,
           alpha0: torch.Tensor, s0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """theta, p [B, T, H, M], v [B, T, H, d], segment [B, T] int32, alpha0 [B, H, M], s0 [B, H, M, d] f32
    (sums of exp(theta), maximum 0). Returns y [B, T, H, d] and the states before each chunk and after the last."""
    B, T, H, M = theta.shape
    d = v.shape[3]
    theta, p, v = _rows(theta), _rows(p), _rows(v)
    chunk = _tile(T, 64)
    y = torch.empty((B, T, H, d), dtype=v.dtype, device=v.device)
    alpha = torch.empty((B, H, T // chunk + 1, M), dtype=torch.float32, device=v.device)
    s = torch.empty((B, H, T // chunk + 1, M, d), dtype=torch.float32, device=v.device)
    _latent_forward[(B * H,)](
        theta, p, v, segment, alpha0, s0, y, alpha, s, T, H, theta.stride(0), theta.stride(1),
        p.stride(0), p.stride(1), v.stride(0), v.stride(1),
        C=chunk, M=M, d=d, LIMIT=THETA_LIMIT, DT=OPERAND, num_warps=4)
    return y, alpha, s


@latent.register_fake
def _(theta, p, v, segment, alpha0, s0):
    B, T, H, M = theta.shape
    n = T // _tile(T, 64) + 1
    return (v.new_empty((B, T, H, v.shape[3])), v.new_empty((B, H, n, M), dtype=torch.float32),
            v.new_empty((B, H, n, M, v.shape[3]), dtype=torch.float32))


@torch.library.custom_op("latte::latent_grad", mutates_args=())
def latent_grad(theta: torch.Tensor, p: torch.Tensor, v: torch.Tensor, segment: torch.Tensor,
                alpha: torch.Tensor, s: torch.Tensor, dy: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, M = theta.shape
    d = v.shape[3]
    theta, p, v, dy = _rows(theta), _rows(p), _rows(v), dy.contiguous()
    dtheta = torch.empty((B, T, H, M), dtype=theta.dtype, device=v.device)
    dp = torch.empty((B, T, H, M), dtype=p.dtype, device=v.device)
    dv = torch.empty((B, T, H, d), dtype=v.dtype, device=v.device)
    _latent_backward[(B * H,)](
        theta, p, v, segment, alpha, s, dy, dtheta, dp, dv, T, H, theta.stride(0), theta.stride(1),
        p.stride(0), p.stride(1), v.stride(0), v.stride(1),
        C=_tile(T, 64), M=M, d=d, LIMIT=THETA_LIMIT, DT=OPERAND, num_warps=4)
    return dtheta, dp, dv


@latent_grad.register_fake
def _(theta, p, v, segment, alpha, s, dy):
    return (theta.new_empty(theta.shape), p.new_empty(p.shape), v.new_empty(v.shape))


def _latent_setup(ctx, inputs, output):
    theta, p, v, segment, _, _ = inputs
    ctx.save_for_backward(theta, p, v, segment, output[1], output[2])


def _latent_back(ctx, dy, dalpha, ds):
    return *latent_grad(*ctx.saved_tensors, dy), None, None, None


latent.register_autograd(_latent_back, setup_context=_latent_setup)


@triton.jit
def _window_scores(q, k_ptr, segment_ptr, own_segment, t, j, k_t, scale, w: tl.constexpr, d: tl.constexpr):
    """Scores of queries t against keys j (both counted from the oldest carried key); masked -1e30."""
    x = tl.arange(0, d)
    k = tl.load(k_ptr + j[:, None] * k_t + x[None, :])
    segment = tl.load(segment_ptr + j)
    allowed = (j[None, :] <= t[:, None]) & (j[None, :] > t[:, None] - w)
    allowed &= own_segment[:, None] == segment[None, :]
    return k, tl.where(allowed, tl.dot(q, tl.trans(k)) * scale, -1e30)


@triton.jit
def _window_forward(q_ptr, k_ptr, v_ptr, segment_ptr, o_ptr, lse_ptr, T, H,
                    q_b, q_t, k_b, k_t, v_b, v_t, scale,
                    BQ: tl.constexpr, BK: tl.constexpr, w: tl.constexpr, d: tl.constexpr):
    b = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    t = tl.program_id(0) * BQ + tl.arange(0, BQ)
    x = tl.arange(0, d)
    q = tl.load(q_ptr + b * q_b + head * d + t[:, None] * q_t + x[None, :])
    k_ptr += b * k_b + head * d
    v_ptr += b * v_b + head * d
    segment_ptr += b * (T + w)
    own = tl.load(segment_ptr + w + t)
    top = tl.full([BQ], -1e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, d], tl.float32)
    for j0 in range(0, w + BQ, BK):
        j = tl.program_id(0) * BQ + j0 + tl.arange(0, BK)
        k, scores = _window_scores(q, k_ptr, segment_ptr, own, t + w, j, k_t, scale, w, d)
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + j[:, None] * v_t + x[None, :])
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        top = higher
    out = (b * T + t) * H + head
    tl.store(o_ptr + out[:, None] * d + x[None, :], (acc / total[:, None]).to(o_ptr.dtype.element_ty))
    tl.store(lse_ptr + out, top + tl.log(total))


@triton.jit
def _window_backward_q(q_ptr, k_ptr, v_ptr, segment_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr, T, H,
                       q_b, q_t, k_b, k_t, v_b, v_t, scale,
                       BQ: tl.constexpr, BK: tl.constexpr, w: tl.constexpr, d: tl.constexpr):
    b = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    t = tl.program_id(0) * BQ + tl.arange(0, BQ)
    x = tl.arange(0, d)
    q = tl.load(q_ptr + b * q_b + head * d + t[:, None] * q_t + x[None, :])
    k_ptr += b * k_b + head * d
    v_ptr += b * v_b + head * d
    segment_ptr += b * (T + w)
    own = tl.load(segment_ptr + w + t)
    out = (b * T + t) * H + head
    do = tl.load(do_ptr + out[:, None] * d + x[None, :])
    o = tl.load(o_ptr + out[:, None] * d + x[None, :])
    lse = tl.load(lse_ptr + out)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + out, delta)
    dq = tl.zeros([BQ, d], tl.float32)
    for j0 in range(0, w + BQ, BK):
        j = tl.program_id(0) * BQ + j0 + tl.arange(0, BK)
        k, scores = _window_scores(q, k_ptr, segment_ptr, own, t + w, j, k_t, scale, w, d)
        weights = tl.exp(scores - lse[:, None])
        v = tl.load(v_ptr + j[:, None] * v_t + x[None, :])
        dscores = weights * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k)
    tl.store(dq_ptr + out[:, None] * d + x[None, :], (dq * scale).to(dq_ptr.dtype.element_ty))


@triton.jit
def _window_backward_kv(q_ptr, k_ptr, v_ptr, segment_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, T, H,
                        q_b, q_t, k_b, k_t, v_b, v_t, scale,
                        BQ: tl.constexpr, BK: tl.constexpr, w: tl.constexpr, d: tl.constexpr):
    """Only the keys of this segment: those carried in are constants. Works on transposed scores."""
    b = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    first = tl.program_id(0) * BK
    j = w + first + tl.arange(0, BK)
    x = tl.arange(0, d)
    k = tl.load(k_ptr + b * k_b + head * d + j[:, None] * k_t + x[None, :])
    v = tl.load(v_ptr + b * v_b + head * d + j[:, None] * v_t + x[None, :])
    segment_ptr += b * (T + w)
    segment = tl.load(segment_ptr + j)
    dk = tl.zeros([BK, d], tl.float32)
    dv = tl.zeros([BK, d], tl.float32)
    for t0 in range(first, min(first + w + BK, T), BQ):
        t = t0 + tl.arange(0, BQ)
        q = tl.load(q_ptr + b * q_b + head * d + t[:, None] * q_t + x[None, :])
        own = tl.load(segment_ptr + w + t)
        out = (b * T + t) * H + head
        do = tl.load(do_ptr + out[:, None] * d + x[None, :])
        lse = tl.load(lse_ptr + out)
        delta = tl.load(delta_ptr + out)
        at = t + w
        allowed = (j[:, None] <= at[None, :]) & (j[:, None] > at[None, :] - w)
        allowed &= segment[:, None] == own[None, :]
        scores = tl.dot(k, tl.trans(q)) * scale
        weights = tl.where(allowed, tl.exp(scores - lse[None, :]), 0.0)
        dv += tl.dot(weights.to(do.dtype), do)
        dscores = weights * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q)
    out = (b * (T + w) + j[:, None]) * H + head
    tl.store(dk_ptr + out * d + x[None, :], (dk * scale).to(dk_ptr.dtype.element_ty))
    tl.store(dv_ptr + out * d + x[None, :], dv.to(dv_ptr.dtype.element_ty))


@torch.library.custom_op("latte::window", mutates_args=())
def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: torch.Tensor,
           scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, T, H, d], k and v [B, w + T, H, d] (w carried rows first), segment [B, w + T] int32.
    Returns the attention output [B, T, H, d] and the log sum of exp [B, T, H]."""
    B, T, H, d = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty((B, T, H, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    bq = _tile(T, 128)
    _window_forward[(T // bq, B * H)](
        q, k, v, segment, o, lse, T, H, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), scale, BQ=bq, BK=_tile(k.shape[1] - T, min(bq, 64)), w=k.shape[1] - T, d=d,
        num_warps=4, num_stages=3)
    return o, lse


@window.register_fake
def _(q, k, v, segment, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("latte::window_grad", mutates_args=())
def window_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: torch.Tensor, o: torch.Tensor,
                lse: torch.Tensor, do: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, d = q.shape
    w = k.shape[1] - T
    q, k, v, do = _rows(q), _rows(k), _rows(v), do.contiguous()
    dq = torch.empty((B, T, H, d), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((B, w + T, H, d), dtype=q.dtype, device=q.device) for _ in range(2))
    dk[:, :w].zero_()
    dv[:, :w].zero_()
    delta = torch.empty_like(lse)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    bq = _tile(T, 128)
    bk = _tile(w, min(bq, 64))
    _window_backward_q[(T // bq, B * H)](q, k, v, segment, o, lse, do, dq, delta, T, H, *strides, scale,
                                         BQ=bq, BK=bk, w=w, d=d, num_warps=4, num_stages=3)
    _window_backward_kv[(T // bk, B * H)](q, k, v, segment, lse, do, delta, dk, dv, T, H, *strides, scale,
                                          BQ=bk, BK=bk, w=w, d=d, num_warps=4, num_stages=3)
    return dq, dk, dv


@window_grad.register_fake
def _(q, k, v, segment, o, lse, do, scale):
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))


def _window_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale = inputs[4]


def _window_back(ctx, do, dlse):
    return *window_grad(*ctx.saved_tensors, do, ctx.scale), None, None


window.register_autograd(_window_back, setup_context=_window_setup)
