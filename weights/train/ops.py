"""The three mixing operations in plain PyTorch, many tokens at once: exact, differentiable, any device.

Sessions may begin anywhere inside a row. `segment` [B, T] numbers them: 0 is the session whose
state was carried in, each start adds one, and nothing is seen across a change of number.

Letters: B rows, T tokens, D hidden size, H heads, KV key and value heads, M latents per head,
d head width, w window, P rows carried in.
"""
import torch
import torch.nn.functional as F

LATENT_CHUNK = 64
WINDOW_CHUNK = 256


def rglru(h, recurrence, gate, decay, z0, start):
    """RG-LRU (Griffin). h [B, T, D]; recurrence and gate [B, T, D] before the sigmoid;
    decay [D] = 8 softplus(lambda); z0 [B, D] f32; start [B, T]. Returns z [B, T, D] f32 and the last state."""
    h = h.float()
    log_a = -decay * torch.sigmoid(recurrence.float())
    fresh = start.bool()[..., None]
    a = torch.exp(log_a).masked_fill(fresh, 0.0)
    multiplier = torch.sqrt(-torch.expm1(2 * log_a).clamp(max=-1e-12)).masked_fill(fresh, 1.0)
    z = multiplier * torch.sigmoid(gate.float()) * h
    z = torch.cat([(z[:, :1] + a[:, :1] * z0[:, None]), z[:, 1:]], dim=1)
    step = 1
    while step < z.shape[1]:                    # log-depth scan: each pass doubles the span of every row
        z = torch.cat([z[:, :step], z[:, step:] + a[:, step:] * z[:, :-step]], dim=1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], dim=1)
        step *= 2
    return z, z[:, -1]


def latent(theta, p, v, segment, state):
    """Latent attention, P(eq 8-12, 19). theta, p [B, T, H, M]; v [B, T, H, d]; state (m, alpha, s).

    Every row has its own running maximum over the tokens and the carried state it may see, so no
    weight is above one and the largest is one: no overflow, no 0/0, whatever theta is.
    """
    m, alpha, s = state
    out = []
    carried = torch.zeros_like(segment[:, :1])
    for t in range(0, theta.shape[1], LATENT_CHUNK):
        part = slice(t, t + LATENT_CHUNK)
        th, v_part, seg = theta[:, part].float(), v[:, part].float(), segment[:, part]
        n = th.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=th.device).tril() & (seg[:, :, None] == seg[:, None, :])
        scores = th[:, None].expand(-1, n, -1, -1, -1).masked_fill(~mask[..., None, None], -torch.inf)
        past = m[:, None].expand(-1, n, -1, -1).masked_fill((seg != carried)[..., None, None], -torch.inf)
        top = torch.maximum(scores.amax(2), past)                       # [B, n, H, M]
        weights = torch.exp(scores - top[:, :, None])                   # [B, n, n, H, M]
        past = torch.exp(past - top)
        total = weights.sum(2) + past * alpha[:, None]
        q = p[:, part].float() / total
        local = torch.einsum("btshm,bthm->bths", weights, q)
        y = torch.einsum("bths,bshd->bthd", local, v_part)
        out.append(y + torch.einsum("bthm,bhmd->bthd", q * past, s))
        s = past[:, -1, :, :, None] * s + torch.einsum("bshm,bshd->bhmd", weights[:, -1], v_part)
        m, alpha, carried = top[:, -1], total[:, -1], seg[:, -1:]
    return torch.cat(out, dim=1), (m, alpha, s)


def window(q, k, v, segment, size, scale, softcap=None):
    """Sliding-window attention, P(eq 13-14). q [B, T, H, d]; k, v [B, P + T, KV, d], the P carried rows
    first; segment [B, P + T], below 0 for rows that hold nothing. Queries see the last `size` tokens."""
    T = q.shape[1]
    P = k.shape[1] - T
    groups = q.shape[2] // k.shape[2]
    out = []
    for t in range(0, T, WINDOW_CHUNK):
        end = min(t + WINDOW_CHUNK, T)
        first = max(0, t + P - size + 1)
        part = slice(first, end + P)
        k_part = k[:, part].float().repeat_interleave(groups, 2)
        v_part = v[:, part].float().repeat_interleave(groups, 2)
        scores = torch.einsum("bthd,bshd->bhts", q[:, t:end].float(), k_part) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(t + P, end + P, device=q.device)[:, None]
        key = torch.arange(first, end + P, device=q.device)[None, :]
        mask = (key <= at) & (key > at - size) & (segment[:, t + P:end + P, None] == segment[:, None, part])
        weights = torch.softmax(scores.masked_fill(~mask[:, None], -torch.inf), -1)
        out.append(torch.einsum("bhts,bshd->bthd", weights, v_part))
    return torch.cat(out, dim=1)


def rotate(x, cos, sin):
    """Turn pairs (i, i + d/2) of x [B, T, H, d] by the angles behind cos and sin, broadcast to [B, T, H, d/2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def activation(name):
    return {"silu": F.silu, "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
