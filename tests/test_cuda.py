"""The CUDA kernels without a GPU: nvcc compiles them, and g++ the same source to run on CPU threads.

What needs a GPU is elsewhere. Here: indices, barriers, exchanges, alignment, arithmetic, registers."""
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
LOSS, KEEP, REREAD = range(3)
TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


# -------------------------------------------------------------------------------------------------- compile
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    """{architecture: its compiler, running, and the file of what it says}: all at once."""
    from build_ext import NVCC
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS       # among them: no conversions of half types
    command = ["nvcc", "-c", *COMMON_NVCC_FLAGS, *NVCC, "-Xptxas", "-v", CSRC / "cuda.cu", "-o"]
    folder = tmp_path_factory.mktemp("nvcc")
    run = lambda a, log: subprocess.Popen([*command, folder / f"{a}.o", f"-arch={a}"], stderr=log.open("w"))
    return {a: (run(a, folder / f"{a}.log"), folder / f"{a}.log") for a in ARCHITECTURES}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills(arch, nvcc, record_property):
    compiler, log = nvcc[arch]
    status, said = compiler.wait(), log.read_text()
    assert status == 0, said
    kernels = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                         r"(\d+) bytes spill loads.*?Used (\d+) registers", said, re.S)
    assert len(kernels) == 15, said                                  # 3 types of 3 modes, scatter and scale
    for name, *local, registers in kernels:
        assert local == ["0", "0", "0"], (name, local)
        record_property(name, registers)
        print(f"{arch} {registers:>4} registers  {name}")


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_bindings_compile_with_cuda(tmp_path):
    """bind.cpp with T2T_CUDA against torch's headers, of which the build for CPU lacks one."""
    from torch.utils.cpp_extension import include_paths
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (headers / "cuda_runtime.h").exists():
        pytest.skip(f"no cuda_runtime.h in {headers}: set CUDA_HOME")
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [*include_paths(), sysconfig.get_paths()["include"], headers, tmp_path]
    done = subprocess.run(
        ["g++", "-fsyntax-only", "-std=c++20", "-DT2T_CUDA", "-DTORCH_EXTENSION_NAME=t2t_ext",
         *(f"-I{f}" for f in folders), CSRC / "bind.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- run on a CPU
class Rows(ctypes.Structure):                                          # as in csrc/kl.h
    _fields_ = [("type", ctypes.c_int), *((n, ctypes.c_int64) for n in "NVK"),
                ("x", ctypes.c_void_p), ("dx", ctypes.c_void_p),
                ("x_stride", ctypes.c_int64), ("dx_stride", ctypes.c_int64),
                ("indices", ctypes.c_void_p), ("wide", ctypes.c_bool), ("merged", ctypes.c_bool),
                ("probs", ctypes.c_void_p), ("g", ctypes.c_void_p), ("g_stride", ctypes.c_int64),
                ("loss", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("host") / "kernels.so"
    command = ["g++", "-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-pthread", "-shared", "-fPIC",
               HERE / "cuda_on_host.cpp", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    if "std=c++20" in done.stderr or "barrier: No such file" in done.stderr:
        pytest.skip("g++ is older than C++20 with <barrier>")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(library)


def laid_out(x, offset, pad):
    """x (N,V) as a view whose rows begin anywhere, and the buffer around it, full of NaN."""
    N, V = x.shape
    buffer = torch.full((offset + N * (V + pad) + 16,), torch.nan, dtype=x.dtype)
    view = buffer.as_strided((N, V), (V + pad, 1), offset)
    return buffer, view.copy_(x)


def case(V, K, dtype, seed=0):
    """Nine rows (x, i, p, g), each with something that went wrong in a kernel somewhere."""
    r = torch.Generator().manual_seed(seed)
    N = 9
    x = 3 * torch.randn(N, V, generator=r, dtype=torch.float64)
    i = torch.randint(-1, V, (N, K), generator=r)                      # padding, duplicates
    p = torch.rand(N, K, generator=r, dtype=torch.float64)
    i[1] = -1                                                          # no target
    p[2] = 0                                                           # no mass
    x[3, ::2] = -torch.inf if V > 1 else 0                           # also at targets: the loss is infinite
    x[4, :V // 2] = x[5, V // 8:] = -torch.inf                         # whole slices
    x[5, 0] = 1
    x[6] += 1e4
    i[7, ::3] = torch.tensor([V, V + 5, -7, 2**31 - 1, -2**31]).repeat(K)[:K][::3]        # outside
    x[8, V // 3] = torch.nan
    g = torch.rand(N, generator=r, dtype=torch.float64) + 0.5
    return x.to(dtype), i, p.float(), g.float()


def oracle(x, i, p, g):
    """In float64, with dense targets: loss (N,), dx (N,V)."""
    x, p, g = x.double(), p.double(), g.double()
    V = x.shape[1]
    i = torch.where((i >= 0) & (i < V), i, V)
    q = torch.zeros(len(x), V + 1, dtype=torch.float64).scatter_add_(1, i, p)[:, :V]
    P = q.sum(1, keepdim=True)
    m = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1, keepdim=True)
    s = (x - m).exp().sum(1, keepdim=True)
    loss = torch.where(q > 0, q * (q.log() + s.log() - (x - m)), 0).sum(1)
    dx = g[:, None] * (P * (x - m).exp() / s - q)
    none = (P == 0)[:, 0]
    loss[none], dx[none] = 0, 0
    return loss, dx


def run(host, mode, C, tile, x, i, p, g=None, dx=None, loss=None, merged=False):
    at = lambda t: None if t is None else t.data_ptr()
    i, p = i.contiguous(), p.contiguous()
    host.rows(ctypes.byref(Rows(
        TYPES[x.dtype], *x.shape, i.shape[1], at(x), at(dx), x.stride(0), 0 if dx is None else dx.stride(0),
        at(i), i.dtype == torch.int64, merged, at(p), at(g), 0 if g is None or len(g) == 1 else g.stride(0),
        at(loss))), mode, C, ctypes.c_int64(tile))


# float32: V terms of relative error 1e-6 at most (exp), K of them added. The half types round the result
# once, by 2^-8 and 2^-11 of it, float16 below 6e-5 by 3e-8.
def close(got, want, scale=1.0):
    u = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    tiny = 3.1e-8 if got.dtype == torch.float16 else 0
    assert_close(got.double(), want, rtol=1.01 * u + 2e-6, atol=2e-6 * scale + tiny, equal_nan=True)


#          mode    C  tile
HOW = [*((LOSS, C, 0) for C in (1, 2, 4, 8)), *((KEEP, C, 0) for C in (1, 2, 4, 8)),
       (REREAD, 1, 3), (REREAD, 1, 40), (REREAD, 2, 5), (REREAD, 8, 7)]
LAYOUT = list(itertools.product([0, 1], [0, 3], [None, (0, 0), (1, 2)]))  # x: offset, pad; dx: as x if None


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode, C, tile", HOW)
def test_rows(host, mode, C, tile, dtype):
    for turn, (V, K) in enumerate([(1, 1), (7, 5), (64, 32), (999, 5), (4103, 32)]):
        # all layouts for some shape and way, not each for each
        way = turn + 5 * HOW.index((mode, C, tile)) + TYPES[dtype]
        offset, pad, place = LAYOUT[way % len(LAYOUT)]
        x0, i, p, g = case(V, K, dtype, seed=turn)
        want_loss, want_dx = oracle(x0, i, p, g)
        if turn % 2:
            i = i.int()
        if turn % 3 == 0:                                              # one upstream gradient for all rows
            want_dx, g = want_dx / g.double()[:, None] * g[0].double(), g[:1]
        if mode == LOSS:
            place = (0, 0)
        around_x, x = laid_out(x0, offset, pad)
        around_dx, dx = (around_x, x) if place is None else laid_out(torch.full_like(x0, torch.nan), *place)
        loss = torch.full((len(x),), torch.nan)
        run(host, mode, C, tile, x, i, p, g, None if mode == LOSS else dx, loss)

        scale = max(1, K / 2)                                          # of P, and of the terms of the loss
        close(loss, want_loss, 10 * scale)
        if mode != LOSS:
            close(dx, want_dx, 2 * scale)
            around_dx.as_strided(dx.shape, dx.stride(), dx.storage_offset()).fill_(torch.nan)
            assert around_dx.isnan().all()                             # nothing was written beside it
        if place is not None:
            assert_close(x, x0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("C", [1, 4])
def test_as_many_targets_as_are_held(host, C):
    x, i, p, g = case(4103, 1, torch.float32)
    i = torch.stack([torch.randperm(4103)[:1024] for _ in x])          # merged, as the bindings would
    i[:, ::7] = -1
    p = torch.rand(i.shape)
    want_loss, want_dx = oracle(x, i, p, g)
    for mode, tile in (KEEP, 0), (REREAD, 11):
        loss, dx = torch.full((len(x),), torch.nan), torch.full_like(x, torch.nan)
        run(host, mode, C, tile, x, i, p, g, dx, loss, merged=True)
        close(loss, want_loss, 1e4)
        close(dx, want_dx, 1e3)


def test_at_a_target_the_difference_is_rounded_once(host):
    """q = softmax but for 1 %: P softmax - q from a softmax rounded to bfloat16 would be off by a half."""
    x = torch.randn(4, 64).bfloat16()
    i = torch.arange(64).repeat(4, 1)
    p = torch.softmax(x.float(), 1) * (1 + 0.01 * torch.randn(4, 64))
    _, want = oracle(x, i, p, torch.ones(4))
    dx = torch.full_like(x, torch.nan)
    run(host, KEEP, 2, 0, x, i, p, torch.ones(1), dx)
    assert_close(dx.double(), want, rtol=1.01 * 2**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
def test_scatter(host, dtype):
    x, i, p, _ = case(64, 32, dtype)
    x = torch.randn(x.shape).to(dtype)
    around, out = laid_out(x, 1, 3)
    q = torch.zeros(len(x), 65, dtype=torch.float64)
    q.scatter_add_(1, torch.where((i >= 0) & (i < 64), i, 64), p.double())
    job = Rows(type=TYPES[dtype], N=len(x), V=64, K=32, dx=out.data_ptr(), dx_stride=out.stride(0),
               indices=i.data_ptr(), wide=True, probs=p.data_ptr())
    host.scatter(ctypes.byref(job), ctypes.c_double(-2.5))
    close(out, x.double() - 2.5 * q[:, :64], 10)
    out.fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("n, offset", [(1, 0), (5, 1), (1000, 0), (4103, 3)])
def test_scale(host, dtype, n, offset):
    x = torch.randn(1, n).to(dtype)
    around, out = laid_out(x, offset, 0)
    for g in 1, 0.3:
        factor = torch.tensor([g], dtype=torch.float32)
        host.scale(TYPES[dtype], ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n),
                   ctypes.c_void_p(factor.data_ptr()))
        assert_close(out, (x.float() * factor).to(dtype), rtol=0, atol=0)
    out.fill_(torch.nan)
    assert around.isnan().all()
