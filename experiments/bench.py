"""Time csrc/, the compiled vocab_kl, against its peers:    python experiments/bench.py [--quick]

A round goes through all versions once, in an order that turns; tables have the fastest and median round,
in ms a call; goals compare medians. On a CPU by the clock, with logits just written or read, as a matrix
product leaves them; on a GPU by events, after 1 GB of reads: L2 is cold and clean, and the host ahead.
Nothing wrong is timed: losses, and gradients at three rows, are first compared with float64. Peers get what
they are made for: dense targets, made within the time, or, for cross-entropy, one label a row. Writes
runs/bench-DEVICE.json and .md (--publish: in results/); --quick: what the goals need, in minutes.
"""
import argparse
import ctypes
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import build_ext
import t2t
from plumbing.arguments import settle
from plumbing.cli import Error

ROOT, SEED, K, MAIN = Path(__file__).parent.parent, 0, 32, 128256
GRID = (16384, 32000, 50304, MAIN, 151936, 256000)
SHARE = "head and loss beyond the products, % of the step"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------- 1. measures
@functools.lru_cache(1)
def large(device):                          # more than any L2 holds
    return torch.zeros(1 << 26, device=device)


def clock(device, call):
    """-> ms, result; whoever takes the result frees it, after the clock has stopped"""
    if device == "cpu":
        begun = time.perf_counter()
        result = call()
        return (time.perf_counter() - begun) * 1e3, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        large(device).amax()
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def interleave(calls, device, budget, least=3, most=100):
    """{name: (prepare, call)} -> {name: {min, median, n}}: rounds, until `budget` seconds are used up"""
    ms, order, stop = {name: [] for name in calls}, list(calls), time.perf_counter() + budget
    for n in range(most):
        if n >= least and time.perf_counter() > stop:
            break
        for name in order:
            prepare, call = calls[name]
            x = prepare()
            took, result = clock(device, lambda: call(x))
            ms[name].append(took)
            del x, result
        order = order[1:] + order[:1]
    return {name: {"min": min(v), "median": statistics.median(v), "n": len(v)} for name, v in ms.items()}


def peak_mb(device, call):
    """What a call needs above what was held before it; nan if this system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    kb = lambda field: int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
    try:
        Path("/proc/self/clear_refs").write_text("5")                  # Linux: forget the peak so far
        before = kb("VmRSS")
        call()
        return (kb("VmHWM") - before) * 1.024e-3
    except (OSError, IndexError):
        return math.nan


class Case:
    """Operands of a table. C = 0: x is the logits (N,V). Else the linear form: x (N,C), head W (V,C)."""

    def __init__(self, N, V, C, dtype, device):
        self.N, self.V, self.C, self.dtype, self.device, self.known = N, V, C, dtype, device, {}
        make = torch.Generator(device).manual_seed(SEED)
        normal = functools.partial(torch.randn, generator=make, device=device, dtype=DTYPES[dtype])
        self.x, self.W = normal(N, C or V) * (1 if C else 2), normal(V, C) * (2 / C ** 0.5) if C else None
        self.out, self.z = torch.empty_like(self.x), self.x.new_ones(N, V) if C else None   # memory at hand
        i = torch.randint(V // K, (N, K), generator=make, device=device)
        self.i = i + torch.arange(K, device=device) * (V // K)                              # no index twice
        self.p = torch.randn(N, K, generator=make, device=device).softmax(1)
        self.label, self.g = self.i[:, 0].contiguous(), torch.full((1,), 1 / N, device=device)
        self.leaf = self.x.detach().requires_grad_()
        if C:                               # a real gradient: power and so clocks depend on the numbers
            self.dz = self.x @ self.W.T
            torch.ops.t2t.kl_loss_grad_(self.dz, self.i, self.p, self.g)

    def dense(self):
        return self.x.new_zeros(self.N, self.V).scatter_(1, self.i, self.p.to(self.x.dtype))

    def prepare(self, name):            # a gradient may be written over what an operation gave, not a leaf
        return self.leaf.clone() if name.startswith("gradient") else self.x

    def reference(self, hard):
        """-> loss, some rows n, their gradient: in float64, from the same rounded operands"""
        i, p = (self.label[:, None], self.g.new_ones(self.N, 1)) if hard else (self.i, self.p)
        W, p, total = self.W.double() if self.C else None, p.double(), 0.0
        log_softmax = lambda n: (self.x[n].double() @ W.T if self.C else self.x[n].double()).log_softmax(1)
        for n in torch.arange(self.N, device=self.device).split(64):
            total += (p[n] * (p[n].log() - log_softmax(n).gather(1, i[n]))).sum().item()
        n = torch.tensor([0, self.N // 2, self.N - 1], device=self.device)
        dx = (log_softmax(n).exp() * p[n].sum(1, keepdim=True)).scatter_add(1, i[n], -p[n]) / self.N
        return total / self.N, n, dx @ W if self.C else dx

    def check(self, name, loss, dx):
        hard = "cross-entropy" in name or "cross_entropy" in name
        if hard not in self.known:
            self.known[hard] = self.reference(hard)
        true, n, true_dx = self.known[hard]
        dx = dx / self.N if name.endswith("of the sum") else dx
        loss, fp32 = loss.double().mean().item(), self.dtype == "fp32"
        error = 0 if dx is None else ((dx[n].double() - true_dx).norm() / true_dx.norm()).item()
        close = 1e-4 if fp32 or ": ext" in name and not self.C else 3e-2           # bf16 peers round losses
        if not (abs(loss - true) <= close * abs(true) and error <= (1e-4 if fp32 else 3e-2)):
            raise Error(f"wrong: loss {loss:.6g}, not {true:.6g}; gradient off by {error:.1e} of itself")


def table(title, column, case, versions, budget, memory=False):
    """versions: {name: function(case, x) -> loss or (loss, gradient), or text: why it is not run}"""
    rows, calls = {}, {}

    def run(name, x):
        with torch.set_grad_enabled(name.startswith("gradient")):
            loss = versions[name](case, x)
            return loss if isinstance(loss, tuple) else (
                loss, torch.autograd.grad(loss, x)[0] if torch.is_grad_enabled() else None)

    for name, f in versions.items():
        rows[name] = {"not_run": f} if isinstance(f, str) else {}
        if isinstance(f, str):
            continue
        prepare, call = functools.partial(case.prepare, name), functools.partial(run, name)
        try:
            begun, result = time.perf_counter(), call(prepare())
            rows[name]["first_call_s"] = round(time.perf_counter() - begun, 2)
            if not name.startswith("limit"):
                case.check(name, *result)
                if memory:
                    del result
                    rows[name]["MB"] = peak_mb(case.device, lambda x=prepare(): call(x))
            calls[name] = prepare, call
        except Exception as e:                                     # of a peer: a result; of ours: the end
            if ": ext" in name or name.startswith("limit"):
                raise Error(f"{title}, {column}, {name}: {e}") from None
            rows[name] = {"not_run": str(e) if isinstance(e, Error) else f"failed: {type(e).__name__}"}
        result = None
    for name, times in interleave(calls, case.device, budget).items():
        rows[name] |= times
    return {"title": title, "column": column, "N": case.N, "V": case.V, "dtype": case.dtype, "rows": rows}


# ---------------------------------------------------------------------------------------------- 2. versions
def installed(module, name):
    """A function of a peer's, or why there is none; `peer` makes a version of it."""
    try:
        f = getattr(importlib.import_module(module), name, "not in this version")
    except Exception as e:                                             # on import it looks for a device
        return "not installed" if isinstance(e, ImportError) else f"import failed: {type(e).__name__}"
    return f if torch.cuda.is_available() else "not run: needs a GPU"


liger = functools.partial(installed, "liger_kernel.transformers.functional")


def peer(f, call):
    return f if isinstance(f, str) else lambda c, x: call(f, c, x)


def eager(x, c):
    log_q = F.log_softmax(x, 1, dtype=torch.float32).gather(1, c.i)
    return (torch.xlogy(c.p, c.p) - c.p * log_q).sum() / c.N


def sparse(x, i, p):                        # for torch.compile: of V columns is only x
    x = x.float()
    return (torch.xlogy(p, p) - p * (x.gather(1, i) - x.logsumexp(1, keepdim=True))).sum() / len(x)


def loss_versions(no_compile=""):
    inner = installed("liger_kernel.ops.backends._triton.kl_div", "kl_loss_and_grad_triton")
    quack = installed("quack.cross_entropy", "cross_entropy_fwd")
    log_q = lambda x: F.log_softmax(x, 1, dtype=torch.float32)
    if not no_compile:
        torch._dynamo.reset()               # else the ninth shape would run uncompiled, and not say so
        compiled = torch.compile(sparse, dynamic=False, fullgraph=True)
    peers = {
        "eager": lambda c, x: eager(x, c),
        "dense F.kl_div": lambda c, x: F.kl_div(log_q(x), c.dense(), reduction="batchmean"),
        "torch.compile": no_compile or (lambda c, x: compiled(x, c.i, c.p)),
        "Liger kl_div": peer(
            liger("liger_kl_div"), lambda f, c, x: f(log_q(x), c.dense(), reduction="batchmean")),
        "Liger cross-entropy": peer(liger("liger_cross_entropy"), lambda f, c, x: f(x, c.label))}

    def fused(f, c, x):                     # the kernel inside Liger's linear KL: loss, and gradient over x
        loss, dx = f(x.detach(), c.dense(), None, -100, 1.0, 1e-10, 1 / c.N)
        return loss.sum(), dx
    def huge(c, x):                         # Linux: pages of 2 MB, as the extension asks for
        y = torch.empty_like(x)
        begin, end = y.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, y.data_ptr() + y.nbytes
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
        return y.fill_(1), None
    libc = ctypes.CDLL(None) if sys.platform == "linux" and not torch.cuda.is_available() else None
    ext = lambda inplace: lambda c, x: t2t.vocab_kl(x, c.i, c.p, impl="ext", inplace=inplace)
    ops = torch.ops.t2t
    return {"limit: read (max)": lambda c, x: (x.view(torch.float32).amax(), None),
            "limit: copy": lambda c, x: (c.out.copy_(x), None),
            "limit: fill fresh": lambda c, x: (torch.empty_like(x).fill_(1), None),
            "limit: fill fresh, large pages": huge if libc else "not run: Linux, CPU",
            "forward: ext": ext(False),
            "forward: ext, kernel alone": lambda c, x: (ops.kl_loss(x, c.i, c.p), None),
            **{f"forward: {name}": f for name, f in peers.items()},
            "gradient: ext, in place": ext(True),
            "gradient: ext, in place, kernel alone": lambda c, x: (
                ops.kl_loss_grad_(x.detach(), c.i, c.p, c.g), x.detach()),
            "gradient: ext, fresh": ext(False),
            **{f"gradient: {name}": f for name, f in peers.items()},
            "gradient: QuACK cross-entropy, one kernel, of the sum": peer(
                quack, lambda f, c, x: f(x.detach(), c.label, return_dx=True)),
            "gradient: Liger fused KL, inner kernel": peer(inner, fused)}


def linear_versions():
    """The gradient of x alone: the head is frozen, as in training."""
    native = getattr(F, "linear_cross_entropy", f"not in torch {torch.__version__}")
    ours = lambda impl: lambda c, x: t2t.linear_vocab_kl(x, c.W, c.i, c.p, impl=impl)
    return {"limit: two matrix products": lambda c, x: (
                torch.mm(x, c.W.T, out=c.z), torch.mm(c.dz, c.W, out=c.out)),
            "gradient: ext": ours("ext"), "gradient: impl torch": ours("torch"),
            "gradient: eager": lambda c, x: eager(F.linear(x, c.W), c),
            "gradient: F.linear_cross_entropy": peer(native, lambda f, c, x: f(x, c.W, c.label)),
            "gradient: F.linear_cross_entropy, chunked": peer(native, lambda f, c, x: f(
                x, c.W, c.label, options=torch.nn.LinearCrossEntropyOptions())),
            "gradient: Liger linear cross-entropy": peer(
                liger("liger_fused_linear_cross_entropy"), lambda f, c, x: f(x, c.W, c.label)),
            "gradient: Liger linear cross-entropy, chunks of 1,024 rows at 4,096": peer(
                liger("liger_fused_linear_cross_entropy"), lambda f, c, x: f(
                    x, c.W, c.label, chunk_mem_const=8)),
            "gradient: CCE linear cross-entropy, exact": peer(
                installed("cut_cross_entropy", "linear_cross_entropy"), lambda f, c, x: f(
                    x, c.W, c.label, impl="cce_exact")),
            "gradient: Liger linear KL": peer(liger("liger_fused_linear_kl_div"), lambda f, c, x: f(
                x, c.W, c.dense(), reduction="batchmean"))}


def step_table(column, model, B, micro, T, device, budget, impls=("ext", "torch")):
    """A step as in t2t.train, of random tokens; its head and loss once more; their two matrix products."""
    core = model.to(device)
    model = t2t.make_trainable(core, 16, seed=0).to(device)
    H, states, V = t2t.head(core), [], core.config.vocab_size
    params, low = [p for p in model.parameters() if p.requires_grad], H.weight.dtype == torch.bfloat16
    optimizer, case = torch.optim.AdamW(params, lr=1e-6), Case(B, V, 0, "fp32", device)
    ids = torch.randint(V, (B // micro, micro, T), device=device)
    batch = [(rows, torch.ones_like(rows)) for rows in ids]

    def forward(rows, mask):
        with torch.autocast(device, torch.bfloat16, enabled=low), t2t.disable_input_dtype_casting(model):
            x = t2t.hidden_states(core, rows, mask)
        h = t2t.pool(x, mask, "mean")
        states.append(h.detach().requires_grad_())
        return x, h

    def step(impl):
        states.clear()
        for L in t2t.target_loss(batch, forward, H, 1.0, indices=case.i, probs=case.p, impl=impl):
            L.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def head(impl):
        given, total = iter(list(states)), 0
        for L in t2t.target_loss(batch, lambda *_: (None, next(given)), H, 1.0, indices=case.i,
                                 probs=case.p, impl=impl):
            L.backward()
            total += L.item()
        return total

    def products(_):
        for h, z, dz, dh in buffers:
            torch.mm(h, W.T, out=z), torch.mm(dz, W, out=dh)

    step("ext")
    if not math.isclose(head("ext"), head("torch"), rel_tol=3e-2 if low else 1e-4):
        raise Error(f"a training step, {column}: wrong: two losses, {head('ext')} and {head('torch')}")
    W = H.weight.detach()
    buffers = []
    for h, i, p in zip(states, case.i.split(micro), case.p.split(micro)):
        h = h.detach().to(W.dtype)
        torch.ops.t2t.kl_loss_grad_(dz := h @ W.T, i, p, case.g)
        buffers.append((h, torch.ones_like(dz), dz, torch.ones_like(h)))
    calls = {f"{name}, {impl}": (lambda impl=impl: impl, f) for impl in impls
             for name, f in (("whole step", step), ("head and loss", head))}
    rows = interleave({"two matrix products": (lambda: None, products)} | calls, device, budget)
    for impl in impls:
        beyond = rows[f"head and loss, {impl}"]["median"] - rows["two matrix products"]["median"]
        rows[f"{SHARE}, {impl}"] = {"median": beyond / rows[f"whole step, {impl}"]["median"] * 100}
    return {"title": "a training step", "column": column, "N": [len(h) for h in states], "rows": rows}


# ------------------------------------------------------------------------------------------------ 3. report
def goals(tables, device):
    """-> lines (goal, wanted, measured, verdict): medians against medians; of several tables, the worst"""
    def some(place, title, N=range(1 << 30), V=(MAIN,), dtype="fp32"):
        return [t["rows"] for t in tables if device == place and t["title"].startswith(title) and (
            title == "a training" or (t["N"] in N and t["V"] in V and t["dtype"] == dtype))]

    def ratio(rows, a, b, scale=1):
        pairs = [[r.get(name, {}).get("median") for name in (a, b)] for r in rows]
        return [scale * x / y for x, y in pairs if x and y]

    f, g, place, fresh = "forward: ", "gradient: ", "gradient: ext, in place", "gradient: ext, fresh"
    alone = place + ", kernel alone"
    cpu = some("cpu", "vocab_kl", [256])
    large = some("cuda", "vocab_kl", [1024, 4096], GRID[1:5], "bf16")
    small = some("cuda", "vocab_kl", [64], dtype="bf16")
    worst_of = [                            # goal, at least or at most, bound, what was measured
        ("forward, over reading the logits", "<=", 1.15, ratio(cpu, f + "ext", "limit: read (max)")),
        ("forward + gradient in place, over copying them", "<=", 1.15, ratio(cpu, place, "limit: copy")),
        ("the same in fresh memory, over filling large pages", "<=", 1.1, ratio(
            cpu, fresh, "limit: fill fresh, large pages")),
        ("the same, times eager", ">=", 8, ratio(cpu, g + "eager", fresh)),
        ("head and loss beyond the products, % of a step of SmolLM2-135M", "<=", 10, [
            r[SHARE + ", ext"]["median"] for r in some("cpu", "a training")[:1]]),
        ("GPU: forward + gradient, part of copy bandwidth", ">=", 0.92, ratio(large, "limit: copy", alone)),
        ("GPU: forward, part of copy bandwidth", ">=", 0.95, ratio(
            large, "limit: copy", f + "ext, kernel alone", 0.5)),
        ("GPU: in place, times Liger cross-entropy", ">=", 2, ratio(
            large, g + "Liger cross-entropy", place)),
        ("GPU: in place, times the kernel of Liger's fused KL", ">=", 4, ratio(
            large, g + "Liger fused KL, inner kernel", place)),
        ("GPU: in place, times torch.compile", ">=", 3, ratio(large, g + "torch.compile", place)),
        ("GPU: forward + gradient, N=64, V=128256, us", "<=", 15, [r[alone]["median"] * 1e3 for r in small]),
        ("GPU: linear form over two bare products", "<=", 1.1, ratio(
            some("cuda", "linear", [1024, 4096], GRID, "bf16"), g + "ext", "limit: two matrix products"))]
    lines = []
    for text, sign, bound, values in worst_of:
        value = (min if sign == ">=" else max)(values, default=None)
        met = value is not None and (value >= bound if sign == ">=" else value <= bound)
        lines.append((text, f"{sign} {bound}", "" if value is None else f"{value:.3g}",
                      "not run" if value is None else "met" if met else "not met"))
    return lines


def markdown(facts):
    number = lambda v: f"{v:.0f}" if v >= 100 else f"{v:.3g}"
    out, line = [], lambda cells: "| " + " | ".join(cells) + " |"

    def grid(head, lines):
        out.extend([line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, lines), ""])

    grid(["goal", "wanted", "measured", ""], facts["goals"])
    for title in dict.fromkeys(t["title"] for t in facts["tables"]):
        for what, *keys in (("fastest / median, ms", "min", "median"), ("peak above operands, MB", "MB")):
            has = lambda rows: any(keys[0] in r for r in rows.values())
            some = [t for t in facts["tables"] if t["title"] == title and has(t["rows"])]
            some.sort(key=lambda t: t.get("V", 0))
            cell = lambda r: r.get("not_run") or " / ".join(number(r[k]) for k in keys if k in r)
            lines = [[n, *(cell(t["rows"][n]) for t in some)] for n in (some[0]["rows"] if some else ())]
            if some:
                out += [f"**{title}**: {what}", ""]
                grid(["", *(t["column"] for t in some)], [x for x in lines if any(x[1:])])
    facts = {k: v for k, v in facts.items() if k not in ("goals", "tables")}
    return "\n".join(out + [f"- {k}: {v}" for k, v in facts.items()]) + "\n"


def provenance(device, ext):
    def run(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:                                    # not installed
            return ""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    changed = ", with changes" * bool(run("git", "status", "--porcelain", "--", "*.py", "csrc"))
    packages = [d for name in ("torch", "liger-kernel", "triton", "quack-kernels", "cut-cross-entropy")
                for d in importlib.metadata.distributions(name=name)]
    return {"command": " ".join(["python experiments/bench.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "commit": (run("git", "rev-parse", "--short", "HEAD") or "not known") + changed,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "driver, power limit, clocks": run(
                "nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem",
                "--format=csv,noheader") or None,
            "CPU": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "instructions": ext.isa(), "CUDA": torch.version.cuda,
            "compiler": run(*os.environ.get("CXX", "c++").split(), "--version").split("\n")[0],
            "python": sys.version.split()[0], **{d.name: d.version for d in packages},
            "seed": SEED, "K": K, "load at start": os.getloadavg()[0]}


# -------------------------------------------------------------------------------------------------- 4. main
def tables(device, quick, budget):
    """Functions, each of which makes one table."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    gpu, low = device == "cuda", getattr(torch, settle(t2t.Config()).dtype)

    def loss(V, N, dtype):
        compiles = N >= 1024 and dtype == "bf16" if gpu else (N, V) == (256, MAIN) and not quick
        versions = loss_versions("" if compiles else "not run: compiled for few shapes")
        return table(f"vocab_kl, N={N}, {dtype}", f"V={V}", Case(N, V, 0, dtype, device), versions, budget,
                     memory=V == MAIN)

    def linear(N, V):
        case = Case(N, V, 4096 if gpu else 512, "bf16" if gpu else "fp32", device)
        return table("linear form", f"N={N}, V={V}, C={case.C}", case, linear_versions(), budget,
                     memory=V == MAIN)

    def step(column, B, micro, T, dtype, C, heads, **shape):
        config = LlamaConfig(tie_word_embeddings=True, hidden_size=C, num_attention_heads=heads, **shape)
        config.is_causal = False
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        return step_table(f"{column}, {B} texts of {T} tokens", model, B, micro, T, device, budget,
                          ("ext",) if quick else ("ext", "torch"))

    shapes = [(64, "bf16"), (4096, "bf16"), (1024, "bf16"), (1024, "fp32")] if gpu else [
        (256, "fp32"), (256, "bf16"), (64, "fp32")]
    # The shapes of the goals first: later ones may find memory that malloc kept, no new pages.
    vocabularies = [MAIN] if quick else sorted(GRID, key=lambda V: V != MAIN)
    for V, (N, dtype) in itertools.product(vocabularies, shapes[:1 + gpu] if quick else shapes):
        yield functools.partial(loss, V, N, dtype)
    forms = [(4096, MAIN), (64, MAIN), (256, MAIN), (4096, 32000), (1024, MAIN), (1024, 32000)] if gpu else [
        (256, MAIN)]
    for N, V in forms[:3 * gpu] if quick else forms:
        yield functools.partial(linear, N, V)
    # 25: the mean of the default corpus, which is not read for this
    yield functools.partial(
        step, f"SmolLM2-135M's shape, {str(low)[6:]}", 32, 16, 25, low, 576, 9, vocab_size=49152,
        intermediate_size=1536, num_hidden_layers=30, num_key_value_heads=3)
    if not quick:
        C, layers, V, B, T = (2048, 16, MAIN, 32, 128) if gpu else (1024, 4, 50304, 4, 64)
        yield functools.partial(
            step, f"random Llama, C={C}, {layers} layers, V={V}, {str(low)[6:]}", B, B, T, low, C, C // 64,
            vocab_size=V, intermediate_size=4 * C, num_hidden_layers=layers)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="what the goals need, in minutes")
    p.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    p.add_argument("--publish", action="store_true", help="write the tables to results/, not to runs/")
    a = p.parse_args()
    out = ROOT / ("results" if a.publish else "runs")
    out.mkdir(exist_ok=True)
    torch.set_num_threads(a.threads)
    ext, device = build_ext.load(build=True), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not ext.cuda:
        raise Error("expected an extension with CUDA for this GPU, but nvcc was not found")
    begun, facts = time.time(), provenance(device, ext) | {"tables": [], "failed": []}
    name = f"bench-{re.sub('[^a-z0-9]+', '-', facts['device'].lower())}{'-quick' * a.quick}"
    for make in tables(device, a.quick, 20 if device == "cpu" else 4 if a.quick else 2):
        try:
            t = make()
            facts["tables"].append(t | {"load": os.getloadavg()[0]})
            done = f"{t['title']}, {t['column']}"
        except Exception as e:                                 # the others, and the goals, are still of use
            facts["failed"].append(done := f"{type(e).__name__}: {e}")
        facts |= {"goals": goals(facts["tables"], device), "load at end": os.getloadavg()[0],
                  "seconds": round(time.time() - begun)}
        print(f"{facts['seconds']:4} s  {done}", file=sys.stderr, flush=True)
        (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        (out / f"{name}.md").write_text(markdown(facts))
    print(markdown(facts))
    if facts["failed"]:
        raise Error(f"{len(facts['failed'])} tables failed: {facts['failed'][0]}")


if __name__ == "__main__":
    try:
        main()
    except Error as e:
        sys.exit(f"bench.py: error: {e}")
