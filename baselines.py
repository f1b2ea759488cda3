"""The baselines: what the loop of t2t.py minimises in place of its own loss. mntp, then simcse, is LLM2Vec's
unsupervised recipe (arXiv 2404.05961).

Generators, as t2t.predict_targets is: read(ids, mask) -> x (B,T,C), h (B,C); batch: a list of (ids, mask).
"""
import numpy as np
import torch
import torch.nn.functional as F

from corpus import Error


def simcse(read, batch, model, share, tau):
    """Baseline: a text is nearest to itself. arXiv 2104.08821, with attention dropout as in arXiv 2404.05961:

        L = -mean_b log softmax_b'(cos(h_b, h'_b') / tau)[b]      h, h': two readings under different dropout

    Every text is told from all others of its batch, so the graph of the whole batch is held at once."""
    attention = [m for m in model.modules()
                 if isinstance(getattr(m, "attention_dropout", None), (int, float))]
    if not attention:
        raise Error("--method simcse: expected a model with attention dropout, got "
                    f"{model.config.model_type}")
    for m in attention:
        m.attention_dropout, m.training = share, True
    h, other = (F.normalize(torch.cat([read(*part)[1] for part in batch]).float(), dim=1) for _ in range(2))
    for m in attention:
        m.training = False
    with torch.autocast(h.device.type, enabled=False):                 # bfloat16 is too coarse here
        L = F.cross_entropy(h @ other.T / tau, torch.arange(len(h), device=h.device))
    yield L.detach(), L


def mntp(read, batch, nll, share, blank, special):
    """Baseline: masked next-token prediction. Some tokens become `blank`; the state *before* such a place,
    from which the pretrained model already predicts, tells what stood there. arXiv 2404.05961.
    nll(x (n,C), v (n,)) is -sum log softmax(head(x))[v]; tokens in `special` (S,) stay."""
    hidden = [(torch.rand(ids.shape) < share).to(ids.device) & (mask > 0) & ~torch.isin(ids, special)
              for ids, mask in batch]
    n = sum(m[:, 1:].sum() for m in hidden).clamp_min(1)
    for (ids, mask), m in zip(batch, hidden):
        x, b, t = read(ids.masked_fill(m, blank), mask)[0], *m[:, 1:].nonzero(as_tuple=True)
        L = nll(x[b, t], ids[b, t + 1]) / n
        yield L.detach(), L


def entropy(tokens, special, V):
    """Of single tokens, in nats: the loss of mntp for one that knows how frequent each is, and no more."""
    n = sum(np.bincount(tokens.ids[i:i + 2**20], minlength=V) for i in range(0, len(tokens.ids), 2**20))
    n[special] = 0
    p = n[n > 0] / n.sum()
    return -(p * np.log(p)).sum().item()
