"""The memory of a training step: measured on one text and on two before a run; --grad-checkpointing."""
import functools
import weakref
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from plumbing.backbones import attention_kernel
from plumbing.cli import LOCAL_WORLD, WORLD, Error, less_memory


class Peak(TorchDispatchMode):
    """While it is on: `most`, the largest number of bytes in tensors that operations have made."""

    def __init__(self, model):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, weakref.WeakSet()
        old = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        self.old = {t.untyped_storage().data_ptr() for t in old if t is not None}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for t in tree_leaves(out):
            memory = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if memory is not None and memory not in self.seen and memory.data_ptr() not in self.old:
                self.seen.add(memory)                                  # views share the memory of another
                self.now += memory.nbytes()
                weakref.finalize(memory, self.freed, memory.nbytes())
                self.most = max(self.most, self.now)
        return out

    def freed(self, size):
        self.now -= size


def of_step(forward, H, model, *, optimizer, T, at_once, config):
    """One line: what a step takes in addition to what is in memory, what is free; if that is less, which flag
    to lower. Activations and logits are measured, of one text and of two of T tokens, the longest of the
    corpus, at_once of which are a micro-batch; gradients and AdamW's moments are counted. forward: as in
    t2t.fit; H: its Head, which mntp uses at a fifth of the positions."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:                                   # as in every micro-batch but the first
        p.grad = torch.zeros_like(p)

    def peak(n):
        rows = torch.zeros(n, max(1, T), dtype=torch.long, device=params[0].device)                 # (n,T)
        with Peak(model) as seen:
            x, h = forward(rows, torch.ones_like(rows))
            H(x[:, ::5] if config.method == "mntp" else h).float().logsumexp(-1).sum().backward()
        return seen.most
    own = max(1, config.batch_size // WORLD)
    readings = 2 if config.method == "simcse" and own <= at_once else 1          # held at once
    texts, one = readings * min(own, at_once), peak(1)
    activations = one + (peak(2) - one) * (texts - 1) if texts > 1 else one      # no more than the step takes
    for p in params:
        p.grad = None
    size = 4 * sum(p.numel() for p in params)
    moments = 0 if optimizer.state else 2 * size                       # a resumed run has them already
    return compared(max(activations, size) + size + moments, free(config.device), config)    # or AdamW's own


def free(device):
    """Bytes that this process may still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    limit = Path("/sys/fs/cgroup/memory.max")                          # of a container
    limit = limit.read_text().strip() if limit.is_file() else "max"
    most = float("inf") if limit == "max" else int(limit) - psutil.Process().memory_info().rss
    return min(most, psutil.virtual_memory().available) / LOCAL_WORLD


def compared(need, there, config):
    line = f"memory: a step takes about {need / 1e9:.2g} GB more, {there / 1e9:.2g} GB are free"
    return line if need < there else f"{line}: {less_memory(config)}"


def recompute_layers(model):
    """--grad-checkpointing: a layer keeps only its input, and is computed again in backward. The switch of
    transformers works only in training mode, in which some models drop states out."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise Error("--grad-checkpointing: expected a model whose layers can be computed again, got "
                    f"{model.config.model_type}: leave it out")
    same_kernel = lambda: (nullcontext(), attention_kernel(model.device.type))
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                          context_fn=same_kernel)
