"""Two operations beside t2t.vocab_kl, for other users: training has few rows in a micro-batch, and its
targets stay sparse. A few lines of torch each, which specify it, and a kernel in csrc/."""
import torch
from torch.utils.checkpoint import checkpoint as recomputed

from build_ext import compiled
from plumbing.arguments import check_targets


def linear_vocab_kl(hidden, weight, indices, probs, bias=None, reduction="mean", impl="auto", check=None,
                    scale=1.0, softcap=None, chunk=1024):
    """vocab_kl(H(hidden), indices, probs) that never holds more than `chunk` rows of the logits.

    hidden (N,C), weight (V,C), bias (V,), scale (its logit_scale) and softcap as in Head. The torch code
    computes the logits again in backward, the compiled one makes the gradient with the loss."""
    import t2t                             # here, since t2t imports this file
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("linear_vocab_kl: hidden and weight: expected (N,C) and (V,C), got "
                         f"{tuple(hidden.shape)} and {tuple(weight.shape)}")
    check_targets("hidden", hidden, len(weight), indices, probs, reduction, impl, check)
    if compiled(impl, hidden.device.type):
        return torch.ops.t2t.linear_vocab_kl(hidden, weight, indices, probs, bias,
                                             t2t.REDUCTIONS.index(reduction), scale, softcap, chunk)

    def rows(h, i, p, *U_and_bias):
        return t2t.vocab_kl(t2t.Head(*U_and_bias, scale, softcap)(h), i, p, "none", "torch", check=False)

    chunks = zip(hidden.split(chunk), indices.split(chunk), probs.split(chunk))
    loss = torch.cat([recomputed(rows, *x, weight, bias, use_reentrant=False, preserve_rng_state=False)
                      for x in chunks])
    return t2t.reduce(loss, ((indices >= 0) & (probs > 0)).any(1), reduction)


def scatter_targets(indices, probs, V=None, out=None, impl="auto", check=None):
    """Sparse targets as dense rows: q (N,V) of the type of probs, or, added to `out` (N,V) in place, out."""
    V = V if out is None else out.shape[1]
    rows = probs.new_empty(len(probs), 0) if out is None else out
    check_targets("out", rows, V, indices, probs, "none", impl, check)
    if compiled(impl, probs.device.type):
        out = probs.new_zeros(len(probs), V) if out is None else out
        torch.ops.t2t.scatter_targets_(out, indices, probs)
        return out
    A = torch.float64 if rows.dtype == torch.float64 else torch.float32
    q = torch.zeros(len(rows), V + 1, dtype=A, device=rows.device)     # column V takes what is padding
    q = q.scatter_add_(1, indices.long().where(indices >= 0, V), probs.to(A))[:, :V]
    return q.to(probs.dtype) if out is None else out.copy_(q.add_(out))
