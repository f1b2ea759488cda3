"""Checks that need torch: what this machine has, what vocab_kl takes."""
import math
from dataclasses import replace

import numpy as np
import torch

from build_ext import choose
from plumbing.cli import Error

# OURS: by validation (results/details.md), with LoRA and batches of 32; mntp was tried at 3e-4 alone.
# arXiv 2404.05961 trains larger models by simcse at 3e-5, in batches of 128.
DEFAULT_LR = {"data": 1e-3, "model": 1e-3, "both": 1e-3, "simcse": 1e-3, "mntp": 3e-4, "none": 0.0}


def settle(config):
    """Config with None and "auto" replaced by what this machine and this method use."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise Error("--device cuda: expected a GPU that torch can use, found none: pass --device cpu")
    gpu = config.device != "cpu" and torch.cuda.is_available()
    # on a CPU: AVX512-BF16 or AMX; others emulate it
    computes_bfloat16 = (torch.cuda.is_bf16_supported(including_emulation=False) if gpu else
                         torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if computes_bfloat16 else "float32"
    device = "cuda" if gpu else "cpu"
    impl = config.impl if config.method in ("data", "model", "both") else "torch"
    if gpu and config.top_k > 1024:                                    # a block of threads holds so many
        if impl == "ext":
            raise Error(f"--top-k: expected at most 1024 with --impl ext on a GPU, got {config.top_k}: pass "
                        "--impl torch")
        impl = "torch"
    prompt = "{}" if config.method == "mntp" else config.prompt        # it predicts the tokens of texts
    return replace(config, device=device, dtype=dtype, prompt=prompt, impl=choose(impl, device),
                   lr=DEFAULT_LR[config.method] if config.lr is None else config.lr)


def check_words(words, config, tok):
    V = len(words.canonical_id)
    if config.top_k > V:
        raise Error(f"--top-k: expected at most the size of the vocabulary, {V}, got {config.top_k}")
    # SmolLM2: 81 %; pieces of WordPiece: none, but for letters of Chinese
    if (share := (words.canonical_id >= 0).mean()) < 0.03:
        raise Error("--backbone: expected a tokenizer that marks the beginning of a word by a space, got "
                    f"{type(tok).__name__} of {config.backbone}, where {share:.1%} of the tokens are words")


def check_own_targets(indices, probs, K, V, *, n):
    """Targets of a user's function, in numpy: one line that says what was expected."""
    got = f"{indices.dtype} {indices.shape}, {probs.dtype} {probs.shape}"
    if not (indices.ndim == 2 and indices.shape == probs.shape and 0 < indices.shape[1] <= K
            and np.issubdtype(indices.dtype, np.integer) and np.issubdtype(probs.dtype, np.floating)):
        raise Error(f"targets: expected indices (n,k), 0 < k <= top_k = {K}, and probs (n,k), got {got}")
    if len(indices) != n:
        raise Error(f"targets: expected a row for each of {n} texts, got {len(indices)}")
    if ((indices < -1) | (indices >= V)).any():
        raise Error(f"targets: expected indices from -1 to {V - 1}, got {indices.min()} to {indices.max()}")
    sums = np.where(indices >= 0, probs, 0).sum(1)
    if not ((probs >= 0).all() and (np.isclose(sums, 1, atol=1e-3) | (sums == 0)).all()):
        raise Error("targets: expected probs that are not negative, with a sum of 1 a row, or 0 (no target), "
                    f"got sums from {sums.min():g} to {sums.max():g}")


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
