"""The compiled vocab_kl on a CPU: values, gradients, layouts, autograd, torch.compile, threads, memory.

test_loss.py has what both implementations promise, test_gpu.py what needs a GPU, test_build.py building."""
import itertools
import math
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.testing import assert_close

import t2t
from t2t import linear_vocab_kl, scatter_targets, vocab_kl

pytestmark = pytest.mark.ext
ISAS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
name = lambda dtype: str(dtype)[6:]
ops = torch.ops.t2t


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def case(N, V, K, dtype=torch.float64, seed=0, device="cpu"):
    """x, i, p and one upstream gradient a row. K = 0: one column of padding."""
    r = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(N, V, generator=r, dtype=torch.float64)).to(dtype)
    i = torch.randint(-1, V, (N, max(K, 1)), generator=r)              # padding, duplicates
    i = i if K else i.fill_(-1)
    p = torch.rand(i.shape, generator=r, dtype=torch.float64).to(acc(dtype))     # sums to about K / 2
    if N > 2:
        i[1], p[2] = -1, 0                                             # rows without a target
    g = (torch.rand(N, generator=r, dtype=torch.float64) + 0.5).to(acc(dtype))
    return tuple(t.to(device) for t in (x, i, p, g))


def oracle(x, i, p, g=None):
    """The definition in float64, with dense targets: loss (N,), dx (N,V), and sum |terms of loss| (N,)."""
    x, p, V = x.double(), p.double(), x.shape[1]
    i = torch.where((i >= 0) & (i < V), i, V).long()
    q = torch.zeros(len(x), V + 1, dtype=torch.float64, device=x.device).scatter_add_(1, i, p)[:, :V]
    z = x - x.amax(1, keepdim=True)
    s = z.exp().sum(1, keepdim=True)
    sum_of = lambda log_q, z: torch.where(q > 0, q * (log_q + s.log() - z), 0).sum(1)
    dx = q.sum(1, keepdim=True) * z.exp() / s - q
    dx = dx if g is None else g.double()[:, None] * dx
    return sum_of(q.log(), z), dx, sum_of(q.log().abs(), -z.abs())


# Each number: half types round once, to store, by at most 2^-8 and 2^-11 of it (float16 below 6e-5: 3e-8).
# A gradient as a vector: that is 1.6e-3 and 2e-4 on average. float32: sums, and exp, 3e-7 where it matters
# (portable: 6e-7, and 6e-6 for the smallest). float64: V additions of 1e-16, one after the other.
ROUNDING = {torch.float64: 0, torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
GATE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def check_each(got, want, scale=1.0):
    """`scale`: the largest g P."""
    e = 1e-12 if got.dtype == torch.float64 else 1e-5
    tiny = 3.1e-8 if got.dtype == torch.float16 else 0
    assert_close(got.double(), want, rtol=1.01 * ROUNDING[got.dtype] + e, atol=1e-2 * e * scale + tiny)


def check_gradient(got, want, scale=1.0):
    error = (got.double() - want).norm()
    assert error <= GATE[got.dtype] * (want.norm() + 1e-3 * scale), error / want.norm()
    check_each(got, want, scale)                     # a wrong place among 128,256 might hide in the norm


def check_loss(got, want, terms):
    """Up to 999 terms are added one after the other, and may cancel: their errors do not."""
    e = 1e-13 if got.dtype == torch.float64 else 2e-6
    error = (got.double() - want).abs()
    assert (error <= e * terms + e * 1e-3).all(), (error / terms).max()


def choose_isa(ext, isa):
    if not ext.use_isa(isa):
        pytest.skip(f"this machine has no {isa}")


def gradient(x, i, p, g=None, reduction="sum", inplace=False, **how):
    """-> loss, dx. In place on a copy that is not a leaf."""
    leaf = x.detach().requires_grad_()
    y = leaf if not inplace else leaf.clone()
    loss = vocab_kl(y, i, p, reduction, "ext", inplace, **how)
    assert loss.dtype == acc(x.dtype)
    dx, = torch.autograd.grad(loss, leaf, g)
    return loss.detach(), dx


# ------------------------------------------------------------------------------------- values and gradients
# No whole block, one, many, with and without a remainder; the vocabularies of GPT-2 and Llama 3
SHAPES = [(1, 1, 1), (33, 7, 7), (33, 64, 32), (33, 999, 999), (33, 999, 0), (0, 64, 32), (4096, 64, 1),
          (5, 2048, 9), (5, 16391, 32), (2, 50257, 32), (3, 128256, 32)]


@pytest.mark.parametrize("N, V, K", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_oracle(ext, isa, dtype, N, V, K):
    """The three ways to a gradient: with the loss, in place, and afterwards with a weight for each row."""
    choose_isa(ext, isa)
    x, i, p, g = case(N, V, K, dtype)
    want, dx, terms = oracle(x, i, p)
    check_loss(vocab_kl(x, i, p, "none", "ext"), want, terms)
    scale = max(1, 0.5 * K)
    for inplace in False, True:
        loss, got = gradient(x, i, p, inplace=inplace)
        assert_close(loss.double(), want.sum(), rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-6)
        check_gradient(got, dx, scale)
    loss, got = gradient(x, i, p, g, "none")
    check_loss(loss, want, terms)
    check_gradient(got, g.double()[:, None] * dx, 1.5 * scale)


@pytest.mark.parametrize("isa", ISAS)
def test_all_instruction_sets_see_every_remainder(ext, isa):
    """V around multiples of 8, 16, 32 lanes and of a block of 2,048: no element left out or taken twice."""
    choose_isa(ext, isa)
    for dtype, V in itertools.product(DTYPES[1:], [*range(1, 67), *range(2040, 2058), 4095, 4096, 4097]):
        x, i, p, g = case(2, V, 3, dtype, seed=V)
        want, dx, terms = oracle(x, i, p)
        loss, got = gradient(x, i, p)
        check_each(got, dx, 1.5)
        loss, got = gradient(x, i, p, g, "none")
        check_loss(loss, want, terms)
        check_each(got, g.double()[:, None] * dx, 2.0)


@pytest.mark.parametrize("isa, near, deep", [("portable", 6e-7, 6e-6), ("avx2", 3e-7, 1.4e-6),
                                             ("avx512", 3e-7, 1.4e-6)])
def test_exp(ext, isa, near, deep):
    """The one approximation, as csrc/rows.h states its error, by float64. portable fuses nothing on x86."""
    choose_isa(ext, isa)
    for least, error in (-8, near), (-87.3, deep):
        x = torch.linspace(least, 0, 400_001).tolist()
        got, x = torch.tensor(ext.exp(x), dtype=torch.float64), torch.tensor(x, dtype=torch.float64)
        assert ((got - x.exp()).abs() / x.exp()).max() <= error
    assert ext.exp([0.0, -0.0, -88.0, -1e4, -math.inf] * 9) == [1, 1, 0, 0, 0] * 9
    assert all(math.isnan(y) for y in ext.exp([math.nan] * 17))


# ------------------------------------------------------------------------------------------------ gradcheck
class Again(torch.autograd.Function):
    """f(*inputs), and a forward for each backward: gradcheck asks for many, a fused loss gives one."""

    @staticmethod
    def forward(ctx, f, *inputs):
        ctx.f, ctx.inputs = f, inputs
        return f(*(x.detach().requires_grad_() for x in inputs)).detach()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.inputs]
            return None, *torch.autograd.grad(ctx.f(*inputs), inputs, g)


@pytest.mark.parametrize("reduction, inplace", [("none", False), ("mean", False), ("mean", True)])
@pytest.mark.parametrize("N, V, K", [(4, 11, 5), (3, 7, 300)])
def test_gradcheck(ext, N, V, K, reduction, inplace):
    """Against finite differences, not against formulas of ours; 300 targets are merged before."""
    x, i, p, _ = case(N, V, K)
    f = lambda x: vocab_kl(2 * x, i, p, reduction, "ext", inplace)
    assert torch.autograd.gradcheck(lambda x: Again.apply(f, x), x.requires_grad_())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (None, 0.7), (2.0, 0.7)])
def test_gradcheck_linear(ext, reduction, softcap, scale):
    _, i, p, _ = case(4, 11, 5)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (11, 6), (11,))]
    f = lambda h, W, b: linear_vocab_kl(h, W, i, p, b, reduction, "ext", None, scale, softcap, 3)
    assert torch.autograd.gradcheck(f, inputs)
    for n in range(3):                                                 # one learns, the others do not
        one = [x if m == n else x.detach() for m, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(f, one)


# ----------------------------------------------------------------------------- as torch sees the operations
def samples():
    x, i, p, g = case(5, 40, 6, torch.float32)
    h, W, b = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    grad = lambda *ts: tuple(t.clone().requires_grad_() for t in ts)
    one = torch.ones(1)
    for r in range(3):
        yield "vocab_kl", (*grad(x), i, p, r)
        yield "vocab_kl", (x, i.int(), p, r)
        # The inputs of the mutable operations have no gradient: torch forbids writing over a leaf that has
        # one, and opcheck makes only leaves. With one they are compiled below, in test_compile.
        yield "vocab_kl_", (x, i, p, r)
        yield "linear_vocab_kl", (*grad(h, W), i, p, *grad(b), r, 0.7, 3.0, 2)
        yield "linear_vocab_kl", (*grad(h), W, i, p, None, r)
    yield "kl_loss", (x, i, p)
    yield "kl_loss_grad", (x, i, p, one)
    yield "kl_loss_grad_", (x, i, p, one)
    yield "linear_kl", (h, W, b, i, p, one, 0.7, 3.0, 2, True, True, True)
    yield "linear_kl", (h, W, None, i, p, one, 1.0, None, 2, True, False, False)
    yield "scatter_targets_", (x, i, p, 0.5)
    yield "scale_", (x, torch.tensor(0.5))


@pytest.mark.parametrize("op, args", samples(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck(ext, op, args):
    """Schema (what is written, what aliased), autograd, shapes without data, compiled dynamically."""
    result = library.opcheck(getattr(ops, op).default, args)
    assert set(result) == {"test_schema", "test_autograd_registration", "test_faketensor",
                           "test_aot_dispatch_dynamic"}
    assert set(result.values()) == {"SUCCESS"}


def test_parts_have_no_gradient(ext):
    """They say so, where silence would be a gradient of nothing."""
    x, i, p, _ = case(5, 40, 6, torch.float32)
    for op, args in ((ops.kl_loss, (x, i, p)), (ops.kl_loss_grad, (x, i, p, torch.ones(1)))):
        with pytest.raises(RuntimeError, match="not implemented"):
            op(x.requires_grad_(), *args[1:])[0].sum().backward()


def losses(h, W, b, i, p, reduction):
    x = h @ W.T
    return (vocab_kl(x, i, p, reduction, "ext"), vocab_kl(2 * x, i, p, reduction, "ext", True),
            linear_vocab_kl(h, W, i, p, b, reduction, "ext", None, 0.7, 3.0, 4))


def compiles(backend, dynamic, reduction, shapes):
    torch._dynamo.reset()
    compiled = torch.compile(losses, backend=backend, fullgraph=True, dynamic=dynamic)
    for N, V in shapes:
        _, i, p, _ = case(N, V, 6, torch.float32)
        wrt = [torch.randn(s, requires_grad=True) for s in ((N, 8), (V, 8), (V,))]
        (got, d), (want, e) = ((x, torch.autograd.grad(sum(c * y.sum() for c, y in enumerate(x, 1)), wrt))
                               for x in (f(*wrt, i, p, reduction) for f in (compiled, losses)))
        assert_close(got, want)
        assert_close(d, e)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dynamic, shapes", [(False, [(9, 40)]), (True, [(9, 40), (14, 53)])])
def test_compile(ext, reduction, dynamic, shapes):
    """In one graph, forward and backward, in place and not, equal to eager."""
    compiles("aot_eager", dynamic, reduction, shapes)


def test_compile_inductor(ext):
    compiles("inductor", False, "mean", [(9, 40)])


# ------------------------------------------------------------------------------------------------ semantics
def test_duplicates_padding_and_unnormalised(ext):
    x = torch.randn(2, 9, dtype=torch.float64)
    once = torch.tensor([[3, 5], [0, 8]]), torch.tensor([[0.75, 2.0], [0.0, 0.5]], dtype=torch.float64)
    again = (torch.tensor([[3, -1, 5, 3, 5], [8, 8, -1, -1, 0]]),
             torch.tensor([[0.5, 9, 1, 0.25, 1], [0.25, 0.25, 9, 9, 0]], dtype=torch.float64))
    for a, b in zip(gradient(x, *once), gradient(x, *again)):
        assert_close(a, b, rtol=1e-15, atol=1e-16)
    for many in 1, 60:                                         # times 5: compared by pairs, and merged
        i, p = again[0].repeat(1, many), again[1].repeat(1, many) / many
        for a, b in zip(gradient(x, *once), gradient(x, i, p)):
            assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("index, prob", [(50, 0.5), (-2, 0.5), (2**40, 0.5), (0, -0.5), (0, math.nan),
                                         (0, math.inf)])
def test_bad_values_are_named(ext, index, prob):
    x, W = torch.zeros(2, 50), torch.eye(50)
    i, p = torch.tensor([[1, 2], [3, index]]), torch.tensor([[0.5, 0.5], [0.5, prob]])
    says = "indices: expected -1 to V - 1" if prob == 0.5 else "probs: expected"
    for call in (lambda: vocab_kl(x, i, p, impl="ext"), lambda: linear_vocab_kl(x, W, i, p, impl="ext"),
                 lambda: scatter_targets(i, p, 50, impl="ext"),
                 lambda: scatter_targets(i, p, out=x, impl="ext")):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("repeat", [1, 60])
def test_unchecked_indices_touch_no_memory_of_others(ext, wide, repeat):
    """check=False and the bare operations: what is outside 0..V-1 is ignored, and NaN there with it."""
    x, i, p, g = case(4, 50, 5)
    i = i.repeat(1, repeat)
    p = p.repeat(1, repeat) / repeat
    bad = [50, 51, -2, 2**31 - 1, -2**31, *([2**40, -2**63, 2**63 - 1] if wide else [])]
    j = torch.cat([i, torch.tensor([bad] * 4)], 1).to(torch.int64 if wide else torch.int32)
    r = torch.cat([p, torch.full((4, len(bad)), math.nan, dtype=p.dtype)], 1)
    want, dx, terms = oracle(x, i, p)
    loss, got = gradient(x, j, r, g, "none", check=False)
    check_loss(loss, want, terms)
    check_gradient(got, g[:, None] * dx)
    around = torch.full((6, 50), math.nan, dtype=x.dtype)
    around[1:5] = 0
    ops.scatter_targets_(around[1:5], j, r)
    assert_close(around[1:5], scatter_targets(i, p, 50, impl="torch"))
    assert around[[0, 5]].isnan().all()


def test_no_targets_at_all(ext):
    """(N,0): every row is without a target."""
    x, i, p, g = case(5, 40, 6)
    i, p = i[:, :0], p[:, :0]
    assert not ops.vocab_kl(x, i, p, 1).item() and not ops.kl_loss_grad(x, i, p, g)[1].any()
    out = torch.zeros(5, 40)
    ops.scatter_targets_(out, i, p)
    assert not out.any()


BARE = {
    "rows": lambda x, i, p, g: ops.vocab_kl(x[:4], i, p),
    "probs": lambda x, i, p, g: ops.vocab_kl(x, i[:, :2], p),
    "float indices": lambda x, i, p, g: ops.vocab_kl(x, i.float(), p),
    "integer probs": lambda x, i, p, g: ops.vocab_kl(x, i, p.long()),
    "no columns": lambda x, i, p, g: ops.vocab_kl(x[:, :0], i, p),
    "integer logits": lambda x, i, p, g: ops.vocab_kl(x.long(), i, p),
    "a vector": lambda x, i, p, g: ops.vocab_kl(x[0], i, p),
    "scatter: rows": lambda x, i, p, g: ops.scatter_targets_(x[:4], i, p),
    "scatter: columns far apart": lambda x, i, p, g: ops.scatter_targets_(x.T.contiguous().T, i, p),
    "scatter: rows on each other": lambda x, i, p, g: ops.scatter_targets_(x[:1].expand(5, 40), i, p),
    "in place: columns far apart": lambda x, i, p, g: ops.kl_loss_grad_(x.T.contiguous().T, i, p, g),
    "in place: rows on each other": lambda x, i, p, g: ops.kl_loss_grad_(x[:1].expand(5, 40), i, p, g),
    "short g": lambda x, i, p, g: ops.kl_loss_grad(x, i, p, g[:2].clone()),
    "no g": lambda x, i, p, g: ops.kl_loss_grad_(x, i, p, g[:0].clone()),
    "scale: g": lambda x, i, p, g: ops.scale_(x, g[:0].clone()),
    "linear: rows": lambda x, i, p, g: linear_kl(x, x[:9], None, i[:2], p[:2], g),
    "linear: short g": lambda x, i, p, g: linear_kl(x, x[:9], None, i, p, g[:3].clone()),
    "linear: bias": lambda x, i, p, g: linear_kl(x, x[:9], x[0, :8], i, p, g),
    "linear: chunk": lambda x, i, p, g: linear_kl(x, x[:9], None, i, p, g, chunk=0)}


def linear_kl(h, W, b, i, p, g, chunk=2):
    return ops.linear_kl(h, W, b, i, p, g, 1.0, None, chunk, True, True, True)


@pytest.mark.parametrize("call", BARE.values(), ids=BARE)
def test_bare_operations_check_shapes(ext, call):
    """Whoever calls torch.ops.t2t itself gets an error, not somebody else's memory."""
    x, i, p, g = case(5, 40, 6, torch.float32)
    with pytest.raises((ValueError, RuntimeError)):
        call(x, i, p, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_minus_infinity_before_a_low_maximum(ext, dtype):
    """exp(-m) overflows for m = -200: a first block of -inf must not be rescaled by it."""
    x = torch.full((1, 4096), -200.0, dtype=dtype)
    x[:, :2048] = -math.inf
    loss, dx = ops.kl_loss_grad(x, torch.tensor([[3000]]), torch.ones(1, 1), torch.ones(1))
    assert_close(loss.double(), torch.tensor([math.log(2048)], dtype=torch.float64), rtol=1e-6, atol=0)
    assert not dx[:, :2048].any() and dx[0, 3000] < 0
    assert_close(dx[0, 4095].double(), torch.tensor(1 / 2048, dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_minus_infinity(ext, dtype):
    """-inf is a token that cannot be: gradient exactly 0. Also a whole block of 2,048, the first or not."""
    x, i, p, g = case(5, 6000, 9, dtype)
    x[0, ::3] = x[1, :2048] = x[3, 2048:4096] = x[4, 2:] = -math.inf
    i = i.where(x.gather(1, i.clamp_min(0)) > -math.inf, -1)
    i[4, 0], i[4, 1] = 0, 1
    want, dx, terms = oracle(x, i, p)
    for loss, got in (gradient(x, i, p, torch.ones_like(g), "none"), gradient(x, i, p)):
        check_loss(loss, *(t if loss.ndim else t.sum() for t in (want, terms)))
        check_gradient(got, dx, 4)
        assert (got[x == -math.inf] == 0).all()
    i[0, 0], p[0, 0] = 0, 0.5                                  # but wanted all the same: infinitely wrong
    loss, got = gradient(x, i, p, torch.ones_like(g), "none")
    assert loss[0] == math.inf and loss[1:].isfinite().all() and got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_common_offset(ext, dtype):
    """x + 1e4 is exact for multiples of 2^-3: then so are loss and gradient the same, to the bit."""
    r = torch.Generator().manual_seed(0)
    x = (torch.randint(-80, 80, (9, 5000), generator=r) / 8).to(dtype)
    _, i, p, g = case(9, 5000, 12, dtype)
    for offset, reduction in itertools.product((1e4, -1e4), ("none", "sum")):
        up = g if reduction == "none" else None
        for a, b in zip(gradient(x + offset, i, p, up, reduction), gradient(x, i, p, up, reduction)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_confident_rows(ext, dtype):
    """One logit 50 above the rest: softmax is 1 there and 1e-22 elsewhere, as target and not as target."""
    x, i, p, g = case(6, 3000, 4, dtype)
    x[:, 77] = 50 + x[:, 77].clamp(-3, 3)
    i[3:, 0], p[3:, 0] = 77, 1
    want, dx, terms = oracle(x, i, p)
    loss, got = gradient(x, i, p, torch.ones_like(g), "none")
    check_loss(loss, want, terms)
    check_gradient(got, dx, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_cancellation_at_targets(ext, dtype):
    """p ~ softmax: P softmax - q is the small difference of two numbers; neither must be rounded before."""
    x = case(4, 500, 1, dtype)[0]
    r = torch.Generator().manual_seed(1)
    softmax = F.softmax(x.double(), 1)
    i = torch.arange(500).repeat(4, 1)
    p = (softmax * (1 + 0.01 * torch.randn(4, 500, generator=r, dtype=torch.float64))).to(acc(dtype))
    _, want, _ = oracle(x, i, p)
    # 1e-6 of the softmax for the arithmetic; and one rounding of the result, which is 100 times smaller
    for _, got in (gradient(x, i, p), gradient(x, i, p, torch.ones(4).to(p), "none")):
        error, limit = (got.double() - want).norm(), 1e-15 if dtype == torch.float64 else 1e-6
        assert error <= limit * softmax.norm() + GATE[dtype] * want.norm(), error / softmax.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_without_targets_and_nan(ext, dtype):
    """Loss and gradient of a row depend on no other row, and on no logit if there is no target."""
    x, i, p, g = case(6, 5000, 9, dtype)
    clean = gradient(x, i, p, g, "none")
    x[1], x[4, 3333] = math.nan, math.nan                      # row 1 has only padding, row 2 only p = 0
    loss, dx = gradient(x, i, p, g, "none")
    assert torch.equal(loss[[1, 2]], torch.zeros(2, dtype=p.dtype)) and (dx[[1, 2]] == 0).all()
    assert loss[4].isnan() and dx[4].isnan().all()
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(loss[rest], clean[0][rest]) and torch.equal(dx[rest], clean[1][rest])
    for inplace in False, True:
        _, dx = gradient(x, i, p, inplace=inplace)
        assert dx[4].isnan().all() and dx[rest].isfinite().all() and (dx[[1, 2]] == 0).all()
    mean, _ = gradient(x[rest], i[rest], p[rest], reduction="mean")
    assert_close(mean, clean[0][rest].sum() / 3)


# ------------------------------------------------------------------------------------------- layouts, types
def layouts(x):
    """The same numbers, elsewhere."""
    N, V = x.shape
    for offset, pad in (0, 3), (1, 0), (3, 5):                         # rows far apart; no row aligned
        yield torch.full((offset + N * (V + pad),), math.nan, dtype=x.dtype).as_strided(
            (N, V), (V + pad, 1), offset).copy_(x)
    yield x.T.contiguous().T                                           # columns far apart
    yield torch.stack([x, x], 2)[:, :, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("V", [999, 4096])
def test_layouts(ext, dtype, V):
    x, i, p, g = case(5, V, 9, dtype)
    for y in layouts(x):
        for up, reduction, inplace in (None, "sum", False), (None, "sum", True), (g, "none", False):
            for a, b in zip(gradient(y, i, p, up, reduction, inplace), gradient(x, i, p, up, reduction)):
                assert torch.equal(a, b)
    for y in list(layouts(x))[:3]:                                     # in place, and nothing beside it
        loss = ops.kl_loss_grad_(y, i, p, g)
        want, dx = ops.kl_loss_grad(x, i, p, g)
        assert torch.equal(y, dx) and torch.equal(loss, want)
        store = torch.tensor([], dtype=dtype).set_(y.untyped_storage())
        y.fill_(math.nan)
        assert store.isnan().all()


def test_expanded(ext):
    """One row for all, one number for a row; in place cannot be, and is not."""
    x, i, p, _ = case(5, 30, 9)
    for y in x[:1], x[:, :1], x[:1, :1]:
        for inplace in False, True:
            grads = []
            for impl in "ext", "torch":
                leaf = y.clone().requires_grad_()
                vocab_kl((leaf * 1).expand(5, 30), i, p, "sum", impl, inplace and impl == "ext").backward()
                grads.append(leaf.grad)
            assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_types_of_targets(ext, dtype):
    x, i, p, g = case(5, 300, 9, dtype)
    want = gradient(x, i, p, g, "none")
    wide = torch.stack([i, i + 1], 2)[:, :, 0], torch.stack([p, p + 1], 2)[:, :, 0]
    for j, r in ((i.int(), p), wide, (wide[0].int(), wide[1]), (i.T.contiguous().T, p.T.contiguous().T)):
        for a, b in zip(gradient(x, j, r, g, "none"), want):
            assert torch.equal(a, b)
    for low in torch.bfloat16, torch.float16, torch.float32, torch.float64:
        r = p.to(low)
        want_loss, dx, terms = oracle(x, i, r.to(acc(dtype)))
        loss, got = gradient(x, i, r)
        assert loss.dtype == acc(dtype) and got.dtype == dtype
        check_loss(loss, want_loss.sum(), terms.sum())
        check_gradient(got, dx, 5)


def free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 12e9, reason="needs 12 GB of free memory")
def test_more_than_2_to_the_31_elements(ext):
    N, V = 17_000, 128_256
    x = torch.zeros(N, V, dtype=torch.bfloat16)
    last, i, p, _ = case(3, V, 9, torch.bfloat16)
    last, i, p = last[[0, 0]], i[[0, 0]], p[[0, 0]]
    x[-2:] = last
    some = torch.full((N, 9), -1)
    some[-2:] = i
    probs = torch.zeros(N, 9)
    probs[-2:] = p
    want, dx, terms = oracle(last, i, p)
    check_loss(ops.kl_loss(x, some, probs)[-2:], want, terms)
    check_gradient(ops.kl_loss_grad(x, some, probs, torch.ones(1))[1][-2:], dx, 5)
    loss = ops.kl_loss_grad_(x, some, probs, torch.ones(1))
    assert (loss[:-2] == 0).all()
    check_gradient(x[-2:], dx, 5)


# ------------------------------------------------------------------------------------- gradients from above
def test_gradients_from_above(ext):
    x, i, p, g = case(6, 300, 9)
    _, dx, _ = oracle(x, i, p)
    for scale in 3.0, 1024.0, -0.5, 0.0, 1.0:                          # 1024: as a GradScaler does
        for inplace in False, True:
            y = x.clone().requires_grad_()
            (vocab_kl(y * 1, i, p, "sum", "ext", inplace) * scale).backward()
            check_gradient(y.grad, scale * dx, 5 * abs(scale) + 1)
    one = torch.ones((), dtype=g.dtype).expand(6)
    for up, weight in (g, g), (one, one), (torch.stack([g, g], 1)[:, 0], g):
        _, got = gradient(x, i, p, up, "none")
        check_gradient(got, weight[:, None] * dx, 5)
    y = x.clone().requires_grad_()
    vocab_kl(y, i, p, "none", "ext").sum().backward()
    check_gradient(y.grad, dx, 5)
    y = x.clone().requires_grad_()                                     # two losses of one tensor add up
    (vocab_kl(y, i, p, "sum", "ext") + 2 * vocab_kl(y, i, p, "sum", "ext")).backward()
    check_gradient(y.grad, 3 * dx, 15)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_from_above_linear(ext, reduction):
    _, i, p, g = case(7, 50, 9)
    up, results = g if reduction == "none" else 3 * g[0], []
    for impl in "ext", "torch":
        torch.manual_seed(0)
        wrt = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 6), (50, 6), (50,))]
        loss = linear_vocab_kl(*wrt[:2], i, p, wrt[2], reduction, impl, None, 0.7, 2.0, 3)
        results.append((loss.detach(), torch.autograd.grad(loss, wrt, up)))
    assert_close(*results)


def test_in_place_is_told_to_autograd(ext):
    """Whoever needs the logits for a backward of their own hears that they are gone."""
    x, i, p, _ = case(5, 40, 6)
    y = x.requires_grad_() * 1
    square, before = y.square(), y._version
    loss = vocab_kl(y, i, p, impl="ext", inplace=True)
    assert y._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    y.zero_()                                                  # and the gradient itself is not for others
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y = x.tanh()                                                       # whose backward needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vocab_kl(y, i, p, impl="ext", inplace=True).backward()


def test_inputs_are_left_alone(ext):
    """Without a gradient inplace does nothing; out of place nothing is ever written, nor by backward."""
    x, i, p, g = case(5, 3000, 9, torch.float32)
    copies = x.clone(), i.clone(), p.clone(), g.clone()
    with torch.no_grad():
        vocab_kl(x, i, p, impl="ext", inplace=True)
        vocab_kl(x.requires_grad_(), i, p, impl="ext", inplace=True)
    x.requires_grad_(False)
    vocab_kl(x, i, p, impl="ext", inplace=True)
    with torch.inference_mode():
        vocab_kl(x, i, p, impl="ext", inplace=True)
    for up, reduction in (None, "mean"), (g, "none"):
        gradient(x, i, p, up, reduction)
    h, W = x[:, :8].clone().requires_grad_(), torch.randn(3000, 8, requires_grad=True)
    head, version = (h.detach().clone(), W.detach().clone()), (x._version, h._version, W._version)
    (3 * linear_vocab_kl(h, W, i, p, impl="ext", chunk=2)).backward()
    for now, before in zip((x, i, p, g, h.detach(), W.detach()), copies + head):
        assert torch.equal(now, before)
    assert (x._version, h._version, W._version) == version


# --------------------------------------------------------------------------------------------- fresh memory
@pytest.fixture
def poison():
    """All memory that torch hands out is full of NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("N, V, K", [(1, 1, 1), (5, 37, 6), (4, 2050, 300)])
def test_all_of_the_result_is_written(ext, poison, dtype, N, V, K):
    x, i, p, g = case(N, V, K, dtype)
    parts = [ops.kl_loss(x, i, p), *ops.kl_loss_grad(x, i, p, g), scatter_targets(i, p, V, impl="ext")]
    h, W, b = (torch.ones(s, dtype=dtype) for s in ((N, 3), (V, 3), (V,)))
    for wants in itertools.product([False, True], repeat=3):
        for softcap, bias in itertools.product([None, 2.0], [None, b]):
            parts += ops.linear_kl(h, W, bias, i, p, g, 0.7, softcap, 2, *wants)
    assert all(part.isfinite().all() for part in parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_scatter(ext, dtype):
    """Only at targets, and added to what is there; duplicates are added before they are rounded."""
    x, i, p, _ = case(5, 300, 40, dtype)
    out = torch.randn(5, 300).to(dtype)
    q = torch.zeros(5, 301, dtype=torch.float64).scatter_add_(1, i.where(i >= 0, 300), p.double())[:, :300]
    got = out.clone()
    assert scatter_targets(i, p, out=got, impl="ext") is got
    e = 1e-14 if dtype == torch.float64 else 1e-6
    assert_close(got.double(), out.double() + q, rtol=ROUNDING[dtype] + e, atol=30 * e)
    assert torch.equal(got[q == 0], out[q == 0])
    assert_close(scatter_targets(i, p, 300, impl="ext").double(), q, rtol=1e-6, atol=1e-6)
    got = out.clone()
    ops.scatter_targets_(got, i, p, -2.5)
    assert_close(got.double(), out.double() - 2.5 * q, rtol=ROUNDING[dtype] + e, atol=100 * e)
    nan = torch.full((5, 300), math.nan, dtype=dtype)
    nan[q > 0] = 0
    scatter_targets(i, p, out=nan, impl="ext")
    assert torch.equal(nan.isnan(), q == 0)
    assert_close(nan[q > 0], q[q > 0].to(dtype), rtol=2 * ROUNDING[dtype] + e, atol=0)
    # dense targets are what F.kl_div takes
    dense = F.kl_div(F.log_softmax(x.double(), 1), q, reduction="none").sum(1)
    check_loss(vocab_kl(x, i, p, "none", "ext"), dense, oracle(x, i, p)[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_scale(ext, dtype):
    x = torch.randn(5, 300).to(dtype)
    for y in layouts(x):
        for g in 0.3, 1.0:
            want = (y.to(acc(dtype)) * torch.tensor(g, dtype=acc(dtype))).to(dtype)
            ops.scale_(y, torch.tensor(g, dtype=acc(dtype)))
            assert_close(y, want, rtol=2 * ROUNDING[dtype], atol=0)


# ----------------------------------------------------------------------------------- more than one backward
@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_says_what_to_do(ext, inplace):
    x, i, p, g = case(5, 40, 6)
    y = x.clone().requires_grad_()
    loss = vocab_kl(y * 1, i, p, "sum", "ext", inplace)
    (3 * loss).backward(retain_graph=True)
    check_gradient(y.grad, 3 * oracle(x, i, p)[1], 10)
    with pytest.raises(RuntimeError, match="reduction='none'.*impl='torch'"):
        loss.backward()
    check_gradient(y.grad, 3 * oracle(x, i, p)[1], 10)                 # the first gradient is as it was
    loss = vocab_kl(y, i, p, "none", "ext")                            # as it says
    y.grad = None
    loss.backward(g, retain_graph=True)
    loss.backward(g)
    check_gradient(y.grad, 2 * oracle(x, i, p, g)[1], 10)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_second_backward_of_linear_is_right(ext, reduction):
    _, i, p, g = case(7, 50, 9)
    wrt = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 6), (50, 6), (50,))]
    for b in None, wrt[2]:
        loss = linear_vocab_kl(*wrt[:2], i, p, b, reduction, "ext", scale=0.7, chunk=3)
        up, inputs = g if reduction == "none" else g[0], wrt[:2] if b is None else wrt
        first, second = (torch.autograd.grad(loss, inputs, c * up, retain_graph=True) for c in (1, 2))
        loss = linear_vocab_kl(*wrt[:2], i, p, b, reduction, "torch", scale=0.7, chunk=3)
        want = torch.autograd.grad(loss, inputs, up)
        assert_close(first, want)
        assert_close(second, tuple(2 * w for w in want))


def test_gradient_of_the_gradient_is_refused(ext):
    x, i, p, g = case(5, 40, 6)
    x.requires_grad_()
    W = torch.randn(40, 40, dtype=torch.float64, requires_grad=True)
    for loss in (vocab_kl(x, i, p, impl="ext"), vocab_kl(x, i, p, "none", "ext"),
                 linear_vocab_kl(x, W, i, p, impl="ext")):
        with pytest.raises(RuntimeError, match="gradient of the gradient is not supported.*impl='torch'"):
            torch.autograd.grad(loss.sum(), x, create_graph=True)


# -------------------------------------------------------------------------- linear, half types and autocast
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_linear_half(ext, dtype, reduction, softcap):
    """Not further from float64 than twice torch in the same type: the logits are rounded either way."""
    torch.manual_seed(0)
    _, i, p, g = case(40, 500, 9, torch.float32)
    p = p / p.sum(1, keepdim=True).clamp_min(1e-9)
    inputs = [torch.randn(40, 32), torch.randn(500, 32) / 4, torch.randn(500)]
    grads = {}
    for impl, t in ("ext", dtype), ("torch", dtype), ("torch", torch.float64):
        wrt = [x.to(dtype).to(t).requires_grad_() for x in inputs]
        loss = linear_vocab_kl(*wrt[:2], i, p, wrt[2], reduction, impl, None, 0.5, softcap, 16)
        assert loss.dtype == acc(t)
        grads[impl, t] = [loss.detach(), *torch.autograd.grad(loss, wrt, g.to(loss) if loss.ndim else None)]
        assert [x.dtype for x in grads[impl, t][1:]] == [t] * 3
    for ours, theirs, exact in zip(*grads.values()):
        error, usual = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 2 * usual + GATE[dtype], (error, usual)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(ext, reduction):
    torch.manual_seed(0)
    _, i, p, g = case(40, 500, 9, torch.float32)
    inputs = [torch.randn(40, 32), torch.randn(500, 32) / 4, torch.randn(500)]
    results = []
    for impl in "ext", "torch":
        wrt = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_vocab_kl(*wrt[:2], i, p, wrt[2], reduction, impl, chunk=16)
            assert loss.dtype == torch.float32
        (loss * g if loss.ndim else loss).sum().mul(1024).backward()
        assert all(x.grad.dtype == torch.float32 for x in wrt)
        results.append([loss.detach(), *(x.grad for x in wrt)])
    for a, b in zip(*results):         # both round logits and gradients to bfloat16, in another order
        assert (a - b).norm() <= 2 * 2**-8 * b.norm()


# -------------------------------------------------------------------------------------------------- threads
def test_two_threads_at_once(ext):
    """Python lets go of its lock inside: the calls do run at the same time, and share nothing."""
    jobs = [(gradient, case(40, 9000, 32, dtype, seed)) for seed, dtype in enumerate(DTYPES * 2)]
    run = lambda job: job[0](*job[1], "none")
    want, got = [run(job) for job in jobs], [None] * len(jobs)

    def work(n):
        for _ in range(5):
            got[n] = run(jobs[n])
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, want):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_number_of_threads_changes_no_bit(ext, dtype):
    x, i, p, g = case(33, 16391, 32, dtype)
    results = []
    for threads in 1, 2, 3:
        torch.set_num_threads(threads)
        results.append([*gradient(x, i, p, g, "none"), *gradient(x, i, p), *gradient(x, i, p, inplace=True),
                        scatter_targets(i, p, 16391, impl="ext")])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ------------------------------------------------------------------------------------------------- training
def test_training_by_either(ext, backbone, texts_file, tmp_path, capsys):
    """Losses equal to round-off, and the line that says which implementation runs tells the truth."""
    from test_train import config, log
    runs = {}
    for impl, says in ("ext", "loss by ext\n"), ("torch", "loss by torch\n"):
        out = t2t.train(config(backbone, texts_file, tmp_path / impl, impl=impl, steps=4))
        runs[impl] = [(r["loss"], r["grad_norm"]) for r in log(out)]
        assert says in capsys.readouterr().out
    assert_close(torch.tensor(runs["ext"]), torch.tensor(runs["torch"]), rtol=1e-4, atol=0)


def test_step_that_bench_times():
    """bench.py takes a step as t2t.train does: it runs, and both implementations agree on its losses."""
    import bench
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True))
    table = bench.step_table("a test", model, 4, 2, 8, "cpu", 0.1)
    assert table["N"] == [2, 2]                                       # a call a micro-batch
    assert all(row["median"] is not None for row in table["rows"].values())
