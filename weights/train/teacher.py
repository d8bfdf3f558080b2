"""The frozen Transformer that an adapted model came from, run on the adapted model's own base weights.

The Macchiato keeps every weight of its Transformer, so the teacher needs no copy: this reads q, k, v,
o and the MLP from the student's layers and puts ordinary attention where the student has its mix.
Its norms are its own: training may let the student's move.
"""
import copy

import torch
import torch.nn.functional as F

import ops
from model import kernels, linear, rope_frequencies


def _attention(q, k, v, scale, window):
    """q [B, T, H, d], k and v [B, T, KV, d]: causal softmax attention over all keys, or the last `window`."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    if not window:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           is_causal=True, scale=scale)
        return y.transpose(1, 2)
    B, T = q.shape[:2]
    segment = torch.zeros(B, window + T, dtype=torch.int32, device=q.device)
    segment[:, :window] = -1                    # the rows before the text hold nothing
    k, v = (F.pad(x, (0, 0, 0, 0, window, 0)) for x in (k, v))
    if kernels is not None and q.is_cuda and q.dtype == torch.bfloat16 and T % 64 == 0 and window % 64 == 0:
        return kernels.window(q, k, v, segment, scale)[0]
    return ops.window(q, k, v, segment, window, scale)


def teacher_layer(layer, norms, x, cos, sin, window):
    """(the layer's output, what its attention added to the residual)."""
    mix, c = layer.mix, layer.mix.config
    B, T, _ = x.shape
    h = norms[0](x)
    H, KV, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    rows = torch.cat([mix.q_proj.weight, mix.k_proj.weight, mix.v_proj.weight])
    q, k, v = linear(h, rows).split([H * d, KV * d, KV * d], -1)
    q, k = q.reshape(B, T, H, d), k.reshape(B, T, KV, d)
    q, k = mix.normed(q, "q_norm"), mix.normed(k, "k_norm")
    q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
    y = _attention(q, k, v.reshape(B, T, KV, d), mix.scale, window)
    y = linear(y.to(x.dtype).reshape(B, T, H * d), mix.o_proj.weight)
    x = x + y
    return x + layer.mlp(norms[1](x)), y


class Teacher:
    """Made before training or loading an adapter: it keeps copies of the norms, which the student may change.
    `window` 0: full attention. Plain pre-norm models without biases, post norms or softcaps."""

    def __init__(self, student, window=0, compiled=False):
        c = student.config
        if c.post_norms or c.bias or c.attn_logit_softcapping or c.rope_scaling:
            raise ValueError("the teacher's fast path has no post norms, biases, softcaps or scaled RoPE")
        self.student, self.window = student, window
        self.layer = torch.compile(teacher_layer, dynamic=False) if compiled else teacher_layer
        self.norms = [copy.deepcopy((layer.norm1, layer.norm2)) for layer in student.model.layers]
        self.angles = {}

    def rope(self, n, length, device):
        theta = self.student.config.rope_theta_of(n)
        if (theta, length) not in self.angles:
            angle = torch.arange(length, dtype=torch.float64)[:, None] * rope_frequencies(self.student.config, n)
            self.angles[theta, length] = tuple(f(angle).float()[:, None].to(device) for f in (torch.cos, torch.sin))
        return self.angles[theta, length]

    @torch.no_grad()
    def layers(self, tokens, dtype):
        """Yields for each layer (its input, what its attention added), then (what the head multiplies, None)."""
        x = self.student.embed(tokens, None, dtype)
        for n, layer in enumerate(self.student.model.layers):
            after, y = self.layer(layer, self.norms[n], x, *self.rope(n, tokens.shape[1], tokens.device), self.window)
            yield x, y
            x = after
        yield self.student.model.norm(x), None

    def hidden(self, tokens, dtype):
        """tokens [B, T] to what the head multiplies [B, T, D]."""
        for x, _ in self.layers(tokens, dtype):
            pass
        return x
