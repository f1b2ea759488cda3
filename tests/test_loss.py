"""vocab_kl and linear_vocab_kl: against a dense float64 oracle, invariants, and a case worked by hand.

Both implementations, torch and ext (compiled), pass the same tests; test_ext.py asks ext for more."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from t2t import Head, coalesce, linear_vocab_kl, vocab_kl


def dense(logits, indices, probs):
    """The definition, with a dense (N,V) target: per-row losses in float64."""
    q = torch.zeros(logits.shape, dtype=torch.float64)
    for n, k in (indices >= 0).nonzero().tolist():
        q[n, indices[n, k]] += probs[n, k].double()
    return F.kl_div(F.log_softmax(logits.double(), 1), q, reduction="none").sum(1)


def case(N=7, V=50, K=9, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(N, V, generator=g, dtype=torch.float64)).to(dtype)
    i = torch.randint(-1, V, (N, K), generator=g)               # with padding and duplicates
    p = torch.rand(N, K, generator=g, dtype=torch.float64)      # sums to about K/2, not to 1
    return x, i, p


# float32 sums V terms, in any order, of error 6e-8 (torch) or 6e-6 (ext: its exp, where a product and
# sum are not fused); half precision rounds the input, and the oracle sees it rounded
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5),
                                        (torch.float16, 1e-5)])
@pytest.mark.parametrize("N, V, K", [(1, 1, 1), (7, 50, 9), (5, 999, 32), (3, 7, 7)])
def test_equals_dense_oracle(N, V, K, dtype, tol, impl):
    x, i, p = case(N, V, K, dtype)
    got = vocab_kl(x, i, p, "none", impl)
    assert_close(got.double(), dense(x, i, p), rtol=tol, atol=tol)


def test_by_hand(impl):
    # softmax([0, ln 3]) = [1/4, 3/4]. Target all on 1: -ln(3/4).
    # Target (1/2, 1/2): ln(1/2) - (ln(1/4) + ln(3/4))/2.
    x = torch.tensor([[0, math.log(3)]] * 2, dtype=torch.float64)
    i, p = torch.tensor([[1, -1], [0, 1]]), torch.tensor([[1.0, 9.0], [0.5, 0.5]])
    want = torch.tensor([math.log(4 / 3), math.log(2 / math.sqrt(3))], dtype=torch.float64)
    for reduction, value in ("none", want), ("sum", want.sum()), ("mean", want.mean()):
        assert_close(vocab_kl(x, i, p, reduction, impl), value)


def test_gradcheck(impl):
    x, i, p = case(4, 11, 5)
    assert torch.autograd.gradcheck(lambda x: vocab_kl(x, i, p, "none", impl), x.requires_grad_())
    h, W, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (11, 6), (11,)))
    for reduction in ("none", "mean", "sum"):
        loss = lambda h, W, b: linear_vocab_kl(h, W, i, p, b, reduction, impl, None, 0.7, 2.0, 3)
        assert torch.autograd.gradcheck(loss, (h, W, b))


def test_invariants(impl):
    x, i, p = case(50, 30, 6)
    i, p = coalesce(i, p)
    p = p / p.sum(1, keepdim=True)
    assert (vocab_kl(x, i, p, "none", impl) >= 0).all()                              # KL of distributions
    full = torch.arange(30).expand(50, 30)
    zero = torch.zeros(50, dtype=torch.float64)
    assert_close(vocab_kl(x, full, F.softmax(x, 1), "none", impl), zero, atol=1e-14, rtol=0)
    # a constant added to a row changes nothing, though it is as large as float32 can carry with these logits
    x = (torch.randint(-40, 40, (50, 30)) / 8).float()
    assert_close(vocab_kl(x + 1e4, i, p, "none", impl), vocab_kl(x, i, p, "none", impl), rtol=0, atol=0)
    order = torch.randperm(6)
    assert_close(vocab_kl(x, i[:, order], p[:, order], impl=impl), vocab_kl(x, i, p, impl=impl))


def test_minus_infinity_and_zero_probability(impl):
    x = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    loss = vocab_kl(x, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), impl=impl)
    loss.backward()
    assert_close(loss, torch.tensor(math.log(2)))
    assert_close(x.grad, torch.tensor([[-0.5, 0.0, 0.5]]))
    assert vocab_kl(x.detach(), torch.tensor([[1]]), torch.tensor([[1.0]]), impl=impl).item() == math.inf


def test_rows_without_targets(impl):
    x, i, p = case(6, 20, 4)
    i[2], p[4] = -1, 0
    x.requires_grad_()
    rows = vocab_kl(x, i, p, "none", impl)
    assert_close(rows[[2, 4]], torch.zeros(2, dtype=torch.float64))
    assert_close(vocab_kl(x, i, p, impl=impl), rows.sum() / 4)                 # four rows count, not six
    i[:] = -1
    head = torch.eye(20).double()
    for loss in (vocab_kl(x, i, p, impl=impl), linear_vocab_kl(x, head, i, p, impl=impl)):
        x.grad = None
        loss.backward()
        assert loss.item() == 0 and x.grad.abs().max().item() == 0
    assert vocab_kl(x[:0], i[:0], p[:0], impl=impl).item() == 0
    assert linear_vocab_kl(x[:0], head, i[:0], p[:0], impl=impl).item() == 0


def test_merge_by_hand():
    i, p = coalesce(torch.tensor([[5, -1, 5, 2]]), torch.tensor([[0.1, 0.7, 0.2, 0.4]]))
    assert i.tolist() == [[-1, 2, 5, -1]]
    assert_close(p, torch.tensor([[0.0, 0.4, 0.3, 0.0]]))


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("softcap, scale, bias", [(None, 1.0, False), (3.0, 0.5, True)])
def test_linear_equals_dense_logits(chunk, softcap, scale, bias, impl):
    _, i, p = case(7, 50, 9)
    h = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    W = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(50, dtype=torch.float64, requires_grad=True) if bias else None
    wrt = [h, W] + ([b] if bias else [])
    want = vocab_kl(Head(W, b, scale, softcap)(h), i, p, impl="torch")
    got = linear_vocab_kl(h, W, i, p, b, impl=impl, scale=scale, softcap=softcap, chunk=chunk)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, wrt), torch.autograd.grad(want, wrt))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_allocates_a_chunk(impl, softcap):
    """The largest allocation: one chunk of logits, not all of (N,V)."""
    h, W = torch.randn(64, 12, requires_grad=True), torch.randn(777, 12)
    i, p = torch.randint(0, 777, (64, 5)), torch.rand(64, 5)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        linear_vocab_kl(h, W, i, p, impl=impl, softcap=softcap, chunk=8).backward()
    largest = max(e.self_cpu_memory_usage for e in seen.events())
    assert 8 * 777 * 4 <= largest < 16 * 777 * 4


@pytest.mark.parametrize("change, says", [
    (dict(indices=torch.tensor([[0, 50]])), "indices: expected -1 to V - 1 = 49, got 0 to 50"),
    (dict(indices=torch.tensor([[-2, 0]])), "indices: expected -1 to V - 1"),
    (dict(indices=torch.tensor([[0.0, 1.0]])), "indices: expected int32 or int64, got torch.float32"),
    (dict(indices=torch.tensor([[0, 1], [0, 1]])), r"indices: expected \(1, K\), K > 0, got \(2, 2\)"),
    (dict(probs=torch.tensor([[0.5]])), r"probs: expected \(1, 2\), as indices, got \(1, 1\)"),
    (dict(probs=torch.tensor([[0.5, -0.1]])), "probs: expected finite and not negative, got"),
    (dict(probs=torch.tensor([[0.5, math.nan]])), "probs: expected finite and not negative, got"),
    (dict(probs=torch.tensor([[1, 1]])), "probs: expected a floating-point type, got torch.int64"),
    (dict(logits=torch.zeros(1, 2, 3)), "logits: expected a floating-point matrix"),
    (dict(reduction="average"), "reduction: expected mean, sum or none, got average"),
    (dict(impl="fast"), "impl: expected auto, torch or ext, got fast"),
    (dict(logits=torch.zeros(1, 50, requires_grad=True), inplace=True),
     "logits: expected the result of an operation for inplace=True, got a leaf")])
def test_bad_arguments_are_named(change, says, impl):
    good = dict(logits=torch.zeros(1, 50), indices=torch.tensor([[0, 1]]), probs=torch.tensor([[0.5, 0.5]]),
                impl=impl)
    assert vocab_kl(**good).item() == pytest.approx(math.log(50) - math.log(2))
    with pytest.raises(ValueError, match=says):
        vocab_kl(**{**good, **change})


def test_inputs_are_left_alone(impl):
    x, i, p = case(dtype=torch.float32)
    copies = x.clone(), i.clone(), p.clone()
    with torch.no_grad():
        vocab_kl(x.requires_grad_(), i, p, impl=impl, inplace=True)
        linear_vocab_kl(x, torch.eye(50), i, p, impl=impl)
    vocab_kl(x.detach(), i, p, impl=impl)
    vocab_kl(x, i, p, impl=impl).backward()
    assert_close((x.detach(), i, p), copies, rtol=0, atol=0)
