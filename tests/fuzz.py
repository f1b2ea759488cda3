"""Random calls of the C++ entry points: shapes, strides, types, values, also wrong ones.

    python tests/fuzz.py [--seconds 60] [--seed 0]

A right call must agree with the torch code of t2t.py. A wrong one must end in ValueError, RuntimeError or
TypeError: a wrong shape or type in C++, which is called without the Python that checks it too; a wrong value
in Python, since C++ leaves values to its caller. tests/sanitize.sh runs this under AddressSanitizer and UBSan
for FUZZ_SECONDS. It is random, not guided by coverage. By gcov, 90 s reach every line of kl.h, and of rows.h
and cpu.cpp all but the test of exp; in bind.cpp, what serves meta tensors, autocast and CUDA is not reached.
"""
import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import build_ext  # noqa: E402
from t2t import linear_vocab_kl, scatter_targets, vocab_kl  # noqa: E402

REFUSED = (ValueError, RuntimeError, TypeError)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 64, 100, 255, 257, 2047, 2048, 2049, 4100]
SPECIAL = [0.0, -0.0, 1e-30, 1e30, -1e30, 65504.0, float("inf"), float("-inf"), float("nan")]


def laid_out(x, rng):
    """The same values in memory of another shape: a slice, a transpose, an odd offset, repeated rows."""
    how = rng.choice(["plain", "columns", "rows", "transposed", "offset"])
    if how == "columns":
        wide = x.new_zeros(len(x), x.shape[1] + rng.randint(1, 9))
        return wide[:, 1:1 + x.shape[1]].copy_(x)
    if how == "rows":
        return x.new_zeros(2 * len(x), x.shape[1])[::2].copy_(x)
    if how == "transposed":
        return x.T.contiguous().T
    if how == "offset":
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return x


def operands(rng):
    N, V, K = rng.choice(SIZES[:12]), rng.choice(SIZES[1:]), rng.choice([1, 1, 2, 3, 8, 33, 65, 200])
    dtype = rng.choice(DTYPES)
    x = torch.randn(N, V, dtype=torch.float64) * rng.choice([0, 1, 30, 1000])
    i = torch.randint(-1, V, (N, K), dtype=rng.choice([torch.int32, torch.int64]))
    p = torch.rand(N, K, dtype=rng.choice(DTYPES[:3])) * (torch.rand(N, K) < 0.8)
    usual = rng.random() < 0.7
    if not usual and x.numel():
        for _ in range(rng.randint(1, 5)):
            x.view(-1)[rng.randrange(x.numel())] = rng.choice(SPECIAL)
    return laid_out(x.to(dtype), rng), laid_out(i, rng), laid_out(p, rng), usual


def spoil(args, rng):
    """One argument of a wrong shape, type or value."""
    args, n = list(args), rng.randrange(3)
    args[n] = rng.choice([
        lambda a: a[:, :-1] if a.shape[1] else a[None], lambda a: a[:-1] if len(a) else a[None],
        lambda a: a.bool(), lambda a: a[None], lambda a: a.to("meta"), lambda a: a.flatten(),
        lambda a: a + 10**6 if n else a.long(), lambda a: a - 10**6 if n else a.to(torch.complex64)])(args[n])
    return args


def right(rng):
    x, i, p, usual = operands(rng)
    reduction, inplace = rng.choice(["mean", "sum", "none"]), rng.random() < 0.3
    found = []
    for impl in ("ext", "torch"):
        leaf = x.detach().clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
        loss = vocab_kl(leaf * 1 if inplace else leaf, i, p, reduction, impl, inplace=inplace)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    if usual and x.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(*(f[0].float() for f in found), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(*(f[1].float() for f in found), rtol=1e-3, atol=1e-3)
    out = torch.randn(x.shape, dtype=x.dtype)
    scatter_targets(i, p.to(x.dtype) if rng.random() < 0.5 else p, out=out, impl="ext")


def linear(rng):
    x, i, p, _ = operands(rng)
    C = rng.choice([1, 3, 16, 65])
    h = torch.randn(len(x), C, dtype=x.dtype, requires_grad=True)
    U = torch.randn(x.shape[1], C, dtype=x.dtype, requires_grad=rng.random() < 0.7)
    bias = torch.randn(x.shape[1], dtype=x.dtype, requires_grad=True) if rng.random() < 0.4 else None
    softcap = 30.0 if rng.random() < 0.3 else None
    linear_vocab_kl(h, U, i, p, bias, "mean", "ext", scale=rng.choice([1.0, 0.3]), softcap=softcap,
                    chunk=rng.choice([1, 2, 64, 1024])).backward()


def wrong(rng):
    x, i, p = args = spoil(operands(rng)[:3], rng)
    values = i.dtype in (torch.int32, torch.int64) and i.device.type == "cpu" and i.numel() and x.ndim == 2
    if values and not (-1 <= i.min() and i.max() < x.shape[1]):
        return vocab_kl(*args, impl="ext")
    rng.choice([torch.ops.t2t.kl_loss, torch.ops.t2t.scatter_targets_,
                lambda *args: torch.ops.t2t.vocab_kl(*args, 1),
                lambda x, i, p: torch.ops.t2t.kl_loss_grad(x, i, p, torch.ones(1))])(*args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    module, rng = build_ext.load(build=False), random.Random(a.seed)
    torch.manual_seed(a.seed)
    kinds = [name for name in ("portable", "avx2", "avx512") if module.use_isa(name)]
    calls, refused, end = 0, 0, time.time() + a.seconds
    while time.time() < end:
        if calls % 50 == 0:
            module.use_isa(rng.choice(kinds))
        call = rng.choice([right, right, linear, wrong])
        try:
            call(rng)
        except REFUSED:
            if call is not wrong:
                raise
            refused += 1
        calls += 1
    print(f"fuzz: {calls:,} calls in {a.seconds:g} s, {refused:,} refused, {', '.join(kinds)}, seed {a.seed}")


if __name__ == "__main__":
    main()
