"""The baselines: what the loop of t2t.py minimises in place of its own loss. mntp, then simcse, is LLM2Vec's
unsupervised recipe (arXiv 2404.05961): --attention bidirectional --pooling mean, simcse with --prompt {}.

Generators of losses, as t2t.target_loss is. batch: list of (ids, mask) (b,T), the texts of this process;
forward(ids, mask) -> x (b,T,C), h (b,C).
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from plumbing import processes
from plumbing.cli import Error


def simcse(batch, forward, model, dropout=0.3, temperature=0.05):
    """Baseline: a text is nearest to itself. arXiv 2104.08821, with attention dropout as in arXiv 2404.05961:

        L = -mean_b log softmax_b'(cos(h_b, h'_b') / temperature)[b]      h, h': two readings, two dropouts

    Every text is told from all others of its batch. Backward reads each micro-batch again, if there are more
    than one, with the same dropout: so one graph is held at once, whatever the size of the batch."""
    attention = set_attention_dropout(model, dropout)
    for m in attention:
        m.training = True
    read = lambda *part: forward(*part)[1]
    once = len(batch) == 1
    h, other = (torch.cat([read(*part) if once else recomputed(read, *part, use_reentrant=False)
                           for part in batch]) for _ in range(2))                                    # (b,C)
    B = int(processes.total(torch.tensor(len(h))))                     # texts of all processes
    if B < 2:
        raise Error("--corpus: expected two texts or more for simcse to tell apart, got one: pass more texts")
    if torch.equal(h, other):                                          # nothing was dropped
        raise Error("--method simcse: expected a model whose attention dropout can be set, got "
                    f"{model.config.model_type}: pass another --backbone or --method")
    h, other = F.normalize(h, dim=1), processes.everywhere(F.normalize(other, dim=1), B)
    own = processes.mine(torch.arange(B, device=h.device))
    L = F.cross_entropy(h @ other.T / temperature, own, reduction="sum") / B
    yield L                                                            # backward runs here
    for m in attention:
        m.training = False


def set_attention_dropout(model, rate):
    """-> the modules that drop out attention, each now at this rate. Architectures have many names for it."""
    found = []
    for m in model.modules():
        plain = ["dropout"] * ("Attention" in type(m).__name__)        # elsewhere it is of other things
        for name in ("attention_dropout", "attn_dropout", "attn_dropout_p", *plain):
            value = getattr(m, name, None)
            if isinstance(value, torch.nn.Dropout):
                value.p = rate
                found += [m, value]
            elif isinstance(value, (int, float)):
                setattr(m, name, rate)
                found.append(m)
    return found


def mntp(batch, forward, H, tok, share=0.2):
    """Baseline: masked next-token prediction. Some tokens are replaced by `_`; the state *before* such a
    place, from which the pretrained model already predicts, tells what stood there. arXiv 2404.05961."""
    blank = tok("_", add_special_tokens=False)["input_ids"] or [tok.pad_token_id]    # not all have a `_`
    mask_id, device = blank[-1], batch[0][0].device
    special = torch.tensor(tok.all_special_ids, device=device)
    blanked = [(torch.rand(ids.shape) < share).to(device) & (mask > 0) & ~torch.isin(ids, special)
               for ids, mask in batch]                                                          # (b,T) each
    n = processes.total(sum(m[:, 1:].sum() for m in blanked)).clamp_min(1)
    for (ids, mask), m in zip(batch, blanked):
        x, _ = forward(ids.masked_fill(m, mask_id), mask)                                            # (b,T,C)
        b, t = m[:, 1:].nonzero(as_tuple=True)              # t: the place before the blank
        L = F.cross_entropy(H(x[b, t]).float(), ids[b, t + 1], reduction="sum") / n
        yield L


def token_entropy(tokens, tok):
    """Of single tokens, in nats: the loss of mntp for a predictor that knows token frequencies alone."""
    V, at_once = 1 + max(tok.get_vocab().values()), 2**20
    n = sum(np.bincount(tokens.ids[i:i + at_once], minlength=V) for i in range(0, len(tokens.ids), at_once))
    n[tok.all_special_ids] = 0
    p = n[n > 0] / n.sum()
    return -(p * np.log(p)).sum().item()
