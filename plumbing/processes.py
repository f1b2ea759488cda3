"""Several processes, one a GPU, as torchrun starts them. Each reads its share of a step; gradients are
summed before the optimiser moves, so the processes hold the same weights at every step. The loss of a text
does not depend on who reads it: with token targets, any number of processes computes what one does, but for
the order of sums. (simcse and mntp draw random numbers, each process its own.)

Without torchrun, every function here acts as for one process. On Ctrl-C, torchrun waits 30 s for a step
and its saving to end.
"""
import atexit
import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from plumbing.cli import RANK, WORLD, Error, why


def connect(device):
    """Connect the processes of torchrun; on GPUs, each has its own."""
    if WORLD == 1 or dist.is_initialized():
        return
    if device == "cuda":
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise Error(f"torchrun: expected at most {count} processes, one a GPU, got more: pass "
                        f"--nproc-per-node={count}")
        torch.cuda.set_device(own)
    # torchrun ends all when one ends, however long they may wait for the one that makes targets
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                            timeout=datetime.timedelta(days=7))


def finished(value):
    """value, when all processes have come here. Only then is the group taken down at exit: NCCL waits for all
    when it ends, so a process that failed would hang there, and torchrun would not see that it has ended."""
    if WORLD > 1:
        barrier()
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)
    return value


@contextlib.contextmanager
def first_alone():
    """Process 0 goes first; the others follow and find what it left on disk."""
    if RANK:
        barrier()
    yield
    if not RANK:
        barrier()


def barrier():
    total(torch.zeros(1))


def mine(texts):
    """The share of this process in the texts, or rows, of a step: every WORLD-th, so all get like lengths."""
    if len(texts) < WORLD:
        raise Error(f"--batch-size and --corpus: expected a text a step for each of {WORLD} processes, got "
                    f"{len(texts)}")
    return texts[RANK::WORLD]


def total(x):
    """The sum of a tensor over all processes. Backward adds up the gradients of all processes."""
    return Total.apply(x) if WORLD > 1 else x


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return reduced(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return reduced(gradient.clone())


def everywhere(rows, B):
    """rows (b,C) of this process's texts -> (B,C) of all texts of the step, in its order."""
    if WORLD == 1:
        return rows
    out = rows.new_zeros(B, rows.shape[1])
    mine(out)[:] = rows
    return total(out)


def sum_gradients(params):
    """The gradients of a step, over all its texts, in every process."""
    if WORLD == 1:
        return
    used = reduced(torch.tensor([float(p.grad is not None) for p in params]))
    params = [p for p, n in zip(params, used.tolist()) if n]            # no text of the step used the others
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # no text here did
    flat = reduced(torch.cat([p.grad.flatten() for p in params]))
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


def same(value):
    """A number, as process 0 has it."""
    return total(torch.tensor(float(value) if RANK == 0 else 0.0, dtype=torch.float64)).item()


def reduced(x):
    """all_reduce, in place. Another process that has ended ends this one in one line."""
    try:
        dist.all_reduce(x)
    except RuntimeError as e:
        raise Error("torchrun: expected all processes to go on, but one has ended (see above): the same "
                    f"command with --resume, not --overwrite, goes on [{why(e)[:80]}]") from None
    return x
