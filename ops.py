"""Around the loss on sparse targets: checks of arguments, merge, and the dense form for those who need it."""
import math

import torch
import torch.nn.functional as F

from build_ext import compiled


def merge(indices, probs):
    """(N,K), (N,K) -> the same targets, each index once a row, its p added up; freed places hold -1 and 0."""
    i, order = indices.long().sort(1)
    p = probs.masked_fill(indices < 0, 0).gather(1, order)
    place = F.pad(i[:, 1:] != i[:, :-1], (1, 0)).cumsum(1)             # (N,K) distinct indices before this
    return torch.full_like(i, -1).scatter_(1, place, i), torch.zeros_like(p).scatter_add_(1, place, p)


def check_targets(name, rows, V, indices, probs, reduction, impl, check):
    """ValueErrors that name the argument, what was expected and what came."""
    op = {"logits": "vocab_kl", "hidden": "linear_vocab_kl", "out": "scatter_targets"}[name]

    def expect(ok, what, expected, got):
        if not ok:
            raise ValueError(f"{op}: {what}: expected {expected}, got {got}")
    expect(reduction in ("mean", "sum", "none"), "reduction", "mean, sum or none", reduction)
    expect(impl in ("auto", "torch", "ext"), "impl", "auto, torch or ext", impl)
    got = tuple(rows.shape), rows.dtype
    expect(rows.ndim == 2 and rows.is_floating_point(), name, "a floating-point matrix", got)
    shape, N = tuple(indices.shape), len(rows)
    expect(indices.ndim == 2 and shape[0] == N and shape[1] > 0, "indices", f"({N}, K), K > 0", shape)
    expect(indices.dtype in (torch.int32, torch.int64), "indices", "int32 or int64", indices.dtype)
    expect(probs.shape == indices.shape, "probs", f"{shape}, as indices", tuple(probs.shape))
    expect(probs.is_floating_point(), "probs", "a floating-point type", probs.dtype)
    expect(not probs.requires_grad, "probs", "constants", "requires_grad=True")
    check = rows.device.type == "cpu" and not torch.compiler.is_compiling() if check is None else check
    if check and indices.numel():
        low, high = (x.item() for x in indices.aminmax())
        expect(-1 <= low and high < V, "indices", f"-1 to V - 1 = {V - 1}", f"{low} to {high}")
        low, high = (x.item() for x in probs.aminmax())                # NaN is neither
        expect(low >= 0 and high < math.inf, "probs", "finite and not negative", f"{low} to {high}")


def scatter_targets(indices, probs, V=None, out=None, impl="auto", check=None):
    """Sparse targets as dense rows: q (N,V) of the type of probs, or, added to `out` (N,V) in place, out."""
    V = V if out is None else out.shape[1]
    rows = probs.new_empty(len(probs), 0) if out is None else out
    check_targets("out", rows, V, indices, probs, "none", impl, check)
    if compiled(impl, probs.device.type):
        if out is None:
            return torch.ops.t2t.scatter_targets(indices, probs, V)
        torch.ops.t2t.scatter_targets_(out, indices, probs)
        return out
    A = torch.float64 if rows.dtype == torch.float64 else torch.float32
    q = torch.zeros(len(rows), V + 1, dtype=A, device=rows.device)     # column V takes what is padding
    q = q.scatter_add_(1, indices.long().where(indices >= 0, V), probs.to(A))[:, :V]
    return q.to(probs.dtype) if out is None else out.copy_(q.add_(out))
