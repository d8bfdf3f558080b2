"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (K. Jordan et al., 2024): the momentum of a matrix is replaced by the nearest matrix whose
singular values are all one, found with a few Newton-Schulz steps. Matrices of one shape are
handled together, so an update is a handful of batched products.
"""
import torch


def orthogonalise(g, steps=5):
    """g [n, rows, columns] to roughly U V^T of each matrix's singular value decomposition."""
    a, b, c = 3.4445, -4.7750, 2.0315           # the quintic whose iteration pulls [0, 1] to about 1 fastest
    x = g.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Parameters are matrices; `lr` is the spectral norm of an update of a square one."""

    def __init__(self, parameters, lr=0.02, momentum=0.95, weight_decay=0.0):
        shapes = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = group["params"]
            state = self.state[parameters[0]]
            grads = torch.stack([parameter.grad for parameter in parameters])
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            velocity = state["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalise(grads.lerp_(velocity, group["momentum"])).float()
            rows, columns = grads.shape[1:]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind(0)),
                                alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def optimisers(model, args):
    """Muon and AdamW over the model's parameters, by name."""
    matrices, embeddings, rest = [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            embeddings.append(parameter)
        elif parameter.ndim == 2 and name.endswith("weight") and ".conv." not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)              # norms, RG-LRU gates, lambda, biases, angles
    adam = torch.optim.AdamW([
        {"params": embeddings, "lr": args.lr_embed, "weight_decay": args.decay_embed},
        {"params": rest, "lr": args.lr_rest, "weight_decay": 0.0},
    ], betas=(0.9, 0.98), eps=1e-10, fused=embeddings[0].is_cuda)
    return [Muon(matrices, args.lr_matrix, weight_decay=args.decay_matrix), adam]
