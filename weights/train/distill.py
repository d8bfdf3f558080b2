"""Losses of distillation over a large vocabulary, a chunk of tokens at a time.

The head is frozen, so the gradient with respect to what it multiplies is known as soon as the logits
are: it is computed in the forward pass, and logits of more than one chunk never exist.
"""
import torch
import torch.nn.functional as F

CHUNK = 4096                                    # tokens


def head_chunk(student, teacher, weight, targets, kl_weight, ce_weight):
    """student, teacher [n, D], weight [V, D], targets [n] to (sums of KL, student's and teacher's
    cross entropy, gradient of the weighted sum with respect to student [n, D])."""
    s = F.linear(student, weight).float()
    s = s - torch.logsumexp(s, -1, keepdim=True)
    t = F.linear(teacher, weight).float()
    t = t - torch.logsumexp(t, -1, keepdim=True)
    p, q = torch.exp(s), torch.exp(t)
    kl = (q * (t - s)).sum()
    picked = targets[:, None]
    one_hot = (torch.arange(weight.shape[0], device=weight.device) == picked).float()
    grad = kl_weight * (p - q) + ce_weight * (p - one_hot)
    return kl, -s.gather(1, picked).sum(), -t.gather(1, picked).sum(), grad.to(weight.dtype) @ weight


def plain_chunk(student, weight, targets):
    """The same without a teacher: (sum of cross entropy, its gradient)."""
    s = F.linear(student, weight).float()
    s = s - torch.logsumexp(s, -1, keepdim=True)
    picked = targets[:, None]
    one_hot = (torch.arange(weight.shape[0], device=weight.device) == picked).float()
    return -s.gather(1, picked).sum(), (torch.exp(s) - one_hot).to(weight.dtype) @ weight


class _Attach(torch.autograd.Function):
    """A loss whose gradient is already known."""

    @staticmethod
    def forward(ctx, x, grad, loss):
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, outer):
        return ctx.saved_tensors[0] * outer, None, None


class HeadLoss:
    def __init__(self, weight, compiled=False):
        self.weight = weight
        self.chunk = torch.compile(head_chunk, dynamic=False) if compiled else head_chunk
        self.plain = torch.compile(plain_chunk, dynamic=False) if compiled else plain_chunk

    def __call__(self, student, teacher, targets, kl_weight, ce_weight):
        """student [B, T, D]; teacher the same or None; targets [B, T]. Returns the mean loss to
        differentiate, and means a token: {"kl", "ce", "teacher"} (those that exist)."""
        n = targets.numel()
        with torch.no_grad():
            x, t = student.detach().flatten(0, 1), targets.flatten()
            y = None if teacher is None else teacher.flatten(0, 1)
            grad, sums = torch.empty_like(x), 0
            for a in range(0, n, CHUNK):
                part = slice(a, min(a + CHUNK, n))
                if y is None:
                    *got, g = self.plain(x[part], self.weight, t[part])
                else:
                    *got, g = self.chunk(x[part], y[part], self.weight, t[part], kl_weight, ce_weight)
                grad[part] = g / n
                sums = sums + torch.stack(got)
            sums = sums / n
        parts = {"ce": sums[0]} if y is None else {"kl": sums[0], "ce": sums[1], "teacher": sums[2]}
        loss = parts["ce"] if y is None else kl_weight * parts["kl"] + ce_weight * parts["ce"]
        return _Attach.apply(student, grad.view_as(student), loss), parts
