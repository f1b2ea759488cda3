"""The compiled vocab_kl on a GPU: the oracle of test_ext.py, streams, devices, graphs, 2^31 elements.

The arithmetic of the kernels is also tested without a GPU, in test_cuda.py."""
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ext import DTYPES, case, check_gradient, check_loss, gradient, name, oracle
from torch.testing import assert_close

import build_ext

from t2t import linear_vocab_kl, scatter_targets, vocab_kl

pytestmark = [pytest.mark.ext, pytest.mark.gpu]
ops = torch.ops.t2t
DTYPES = DTYPES[1:]                                                   # float64 is refused, see below
SHAPES = [(1, 1, 1), (33, 7, 7), (33, 64, 32), (33, 999, 999), (33, 999, 0), (0, 64, 32), (4096, 64, 1),
          (5, 16391, 32), (64, 32000, 32), (300, 50257, 32), (300, 128256, 32), (5, 262144, 300)]


@pytest.fixture(autouse=True)
def cuda(ext):
    if not ext.cuda:
        pytest.skip("the extension is built without CUDA")


@pytest.mark.parametrize("N, V, K", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_equals_the_oracle(dtype, N, V, K):
    x, i, p, g = case(N, V, K, dtype, device="cuda")
    want, dx, terms = oracle(x, i, p)
    check_loss(vocab_kl(x, i, p, "none", "ext"), want, terms)
    scale = max(1, 0.5 * K)
    for inplace in False, True:
        check_gradient(gradient(x, i, p, inplace=inplace)[1], dx, scale)
        check_gradient(gradient(x, i, p, torch.tensor(3.0).to(g), inplace=inplace)[1], 3 * dx, 3 * scale)
    loss, got = gradient(x, i, p, g, "none")
    check_loss(loss, want, terms)
    check_gradient(got, g.double()[:, None] * dx, 1.5 * scale)
    check_gradient(gradient(x, i, p, torch.ones((), device="cuda").to(g).expand(N), "none")[1], dx, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("V", [1, 37, 4096, 50257, 128256])
def test_layouts(dtype, V):
    """Rows far apart, no row aligned, columns far apart: all is read, and nothing written beside."""
    x, i, p, g = case(9, V, 5, dtype, device="cuda")
    want, dx, terms = oracle(x, i, p, g)
    for offset, pad in (0, 0), (0, 3), (1, 0), (3, 5), (8, 8):
        around = torch.full((offset + 9 * (V + pad) + 16,), math.nan, dtype=dtype, device="cuda")
        y = around.as_strided(x.shape, (V + pad, 1), offset)
        y.copy_(x)
        loss, got = ops.kl_loss_grad(y, i.int(), p, g)
        check_loss(loss, want, terms)
        check_gradient(got, dx, 5)
        check_loss(ops.kl_loss_grad_(y, i, p, g), want, terms)
        check_gradient(y, dx, 5)
        y.fill_(math.nan)
        assert around.isnan().all()
    y = x.T.contiguous().T
    check_gradient(gradient(y, i, p, g, "none")[1], dx, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype):
    """-inf, whole slices of it, NaN, rows without targets, duplicates, indices outside, a common offset."""
    x, i, p, g = case(8, 40_000, 9, dtype, device="cuda")
    x[0, ::3] = x[3, :20_000] = x[4, 20_000:] = -math.inf
    i = i.where(x.gather(1, i.clamp_min(0)) > -math.inf, -1)
    x[5] = x[5] + (1e4 if dtype == torch.float32 else 8)
    i[6] = i[6, 0].clone()
    i[7, ::2] = torch.tensor([40_000, -7, 2**40, -2**40, 2**63 - 1], device="cuda")
    want, dx, terms = oracle(x, i, p)
    loss, got = gradient(x, i, p, torch.ones_like(g), "none", check=False)
    check_loss(loss, want, terms)
    check_gradient(got, dx, 5)
    assert (got[x == -math.inf] == 0).all() and (got[[1, 2]] == 0).all()
    x[4, 7] = x[1, 7] = math.nan
    loss, again = gradient(x, i, p, torch.ones_like(g), "none", check=False)
    rest = [0, 1, 2, 3, 5, 6, 7]
    assert loss[4].isnan() and again[4].isnan().all() and torch.equal(again[rest], got[rest])


def test_determinism():
    """Two runs are equal to the bit: no atomics decide an order."""
    for dtype in DTYPES:
        x, i, p, g = case(300, 50257, 64, dtype, device="cuda")
        runs = [[*gradient(x, i, p, g, "none"), *gradient(x, i, p), *gradient(x, i, p, inplace=True),
                 scatter_targets(i, p, 50257, impl="ext")] for _ in range(3)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_a_stream_of_its_own():
    """Work goes where torch's current stream is: behind what that stream has still to do."""
    x, i, p, g = case(300, 50257, 32, torch.bfloat16, device="cuda")
    want = ops.kl_loss_grad(x, i, p, g)
    stream, y = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)                                  # some tens of milliseconds
        y.copy_(x)
        got = ops.kl_loss_grad(y, i, p, g)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    with torch.cuda.device(0):
        x, i, p, g = case(33, 999, 9, torch.float32, device="cuda:1")
        loss, dx = gradient(x, i, p, g, "none")
    assert loss.device == dx.device == torch.device("cuda:1")
    check_gradient(dx, oracle(x, i, p, g)[1], 5)
    with pytest.raises(ValueError, match="expected on"):
        ops.vocab_kl(x, i.cuda(0), p)


def test_other_devices_are_refused():
    x, i, p, _ = case(5, 40, 3, torch.float32)
    with pytest.raises(ValueError, match="expected on"):
        ops.vocab_kl(x.cuda(), i, p)


@pytest.mark.parametrize("dtype, K", [(torch.float64, 3), (torch.float32, 1025)])
def test_what_only_torch_takes_says_so(dtype, K):
    x, i, p, _ = case(2, 2000, K, dtype, device="cuda")
    with pytest.raises(ValueError, match="float16 and at most 1024 targets.*impl='torch'"):
        vocab_kl(x, i, p, impl="ext")
    assert vocab_kl(x, i, p, impl="torch").isfinite()


def test_graph():
    """Captured once, replayed on other numbers in the same memory: the host decides nothing."""
    x, i, p, g = case(64, 32000, 32, torch.bfloat16, device="cuda")
    one, y = torch.ones(1, device="cuda"), x.clone()
    ops.kl_loss_grad_(y, i, p, one)                    # a first call may set up what a graph may not
    ops.scale_(y, one)
    torch.cuda.synchronize()
    graph, factor = torch.cuda.CUDAGraph(), torch.ones(1, device="cuda")
    with torch.cuda.graph(graph):
        loss = ops.kl_loss_grad_(y, i, p, one)
        ops.scale_(y, factor)
    for seed, by in (1, 1.0), (2, 0.5):
        x, j, q, _ = case(64, 32000, 32, torch.bfloat16, seed=seed, device="cuda")
        y.copy_(x), i.copy_(j), p.copy_(q), factor.fill_(by)
        graph.replay()
        want, dx, terms = oracle(x, j, q)
        check_loss(loss, want, terms)
        check_gradient(y, by * dx, 16)


def test_nothing_waits():
    """No call makes the host wait for the GPU (check=False: values can only be checked by waiting)."""
    x, i, p, g = case(64, 32000, 32, torch.bfloat16, device="cuda")
    h, W = torch.randn(64, 16, device="cuda", requires_grad=True), torch.randn(32000, 16, device="cuda")
    x.requires_grad_()
    calls = [lambda: vocab_kl(x, i, p, impl="ext", check=False).backward(),
             lambda: vocab_kl(x * 1, i, p, impl="ext", inplace=True, check=False).backward(),
             lambda: vocab_kl(x, i, p, "none", "ext", check=False).sum().backward(),
             lambda: linear_vocab_kl(h, W, i, p, impl="ext", check=False).backward(),
             lambda: scatter_targets(i, p, 32000, impl="ext", check=False)]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_linear_equals_torch(dtype, reduction):
    torch.manual_seed(0)
    _, i, p, g = case(70, 5000, 9, torch.float32, device="cuda")
    inputs = [torch.randn(70, 32), torch.randn(5000, 32) / 4, torch.randn(5000)]
    grads = {}
    for impl, t in ("ext", dtype), ("torch", dtype), ("torch", torch.float64):
        wrt = [x.to(dtype).to(t).cuda().requires_grad_() for x in inputs]
        loss = linear_vocab_kl(*wrt[:2], i, p, wrt[2], reduction, impl, None, 0.5, 10.0, 16)
        grads[impl, t] = [loss.detach(), *torch.autograd.grad(loss, wrt, g.to(loss) if loss.ndim else None)]
    for ours, theirs, exact in zip(*grads.values()):           # not further away than torch, within 2
        error, usual = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 2 * usual + 1e-3 * (dtype == torch.bfloat16) + 1e-6, (error, usual)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_scatter(dtype):
    x, i, p, _ = case(33, 50257, 32, dtype, device="cuda")
    got = scatter_targets(i, p, out=x.clone(), impl="ext")
    assert_close(got, scatter_targets(i, p, out=x.clone(), impl="torch"))
    assert torch.equal(got[1:3], x[1:3])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    N, V = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free memory on the GPU")
    x = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda")
    last, i, p, _ = case(3, V, 9, torch.bfloat16, device="cuda")
    x[-1] = last[0]
    some = torch.full((N, 9), -1, device="cuda")
    probs = torch.zeros(N, 9, device="cuda")
    some[-1], probs[-1] = i[0], p[0]
    want, dx, terms = (t[:1] for t in oracle(last, i, p))
    check_loss(ops.kl_loss(x, some, probs)[-1:], want, terms)
    one = torch.ones(1, device="cuda")
    check_gradient(ops.kl_loss_grad(x, some, probs, one)[1][-1:], dx, 5)
    loss = ops.kl_loss_grad_(x, some, probs, one)
    assert (loss[:-1] == 0).all() and not x[:-1].any()
    check_gradient(x[-1:], dx, 5)
    ops.scale_(x, 2 * one)
    check_gradient(x[-1:], 2 * dx, 10)


# --------------------------------------------------------------------------------------------------- memory
SANITIZED = """
import torch, build_ext
build_ext.load(build=False)
ops = torch.ops.t2t
for dtype in (torch.bfloat16, torch.float32):
    for N, V, K in ((3, 1, 1), (5, 37, 3), (9, 4103, 9), (5, 33000, 32), (3, 128256, 300)):
        for offset in (0, 1):
            store = torch.randn(offset + N * V, device="cuda").to(dtype)
            x = store[offset:].view(N, V)
            i, p = torch.randint(-1, V, (N, K), device="cuda"), torch.rand(N, K, device="cuda")
            g = torch.rand(N, device="cuda")
            ops.kl_loss(x, i, p)
            ops.kl_loss_grad(x, i.int(), p, g[:1])
            ops.kl_loss_grad_(x, i, p, g)
            ops.scatter_targets_(x, i, p)
            ops.scale_(x, g[:1])
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Accesses out of bounds; races in shared memory."""
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}    # each tensor an allocation of its own
    run = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    root = Path(build_ext.__file__).parent
    done = subprocess.run(run, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


def test_memory():
    """In place the logits are held once, out of place twice; nothing else is of that size."""
    x, i, p, _ = case(256, 128256, 32, torch.bfloat16, device="cuda")
    leaf, size = x.requires_grad_(), x.numel() * x.element_size()
    for inplace, times in (True, 0), (False, 1):
        y = leaf * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vocab_kl(y, i, p, impl="ext", inplace=inplace, check=False).mul(1.0)
        assert torch.cuda.max_memory_allocated() - before <= (times + 0.01) * size


def test_dtypes_of_results():
    for dtype in DTYPES:
        x, i, p, g = case(5, 300, 9, dtype, device="cuda")
        loss, dx = gradient(x, i, p, g, "none")
        assert loss.dtype == torch.float32 and dx.dtype == dtype
