"""Sparse vectors over words, read through the head, and why two texts are alike: methods of t2t.Embedder.

What CKPT/sparse, a SparseEncoder, gives. Texts without a common word can be alike: a place lights up words
*beyond* its own.
"""
import numpy as np
import torch
import torch.nn.functional as F


def word_head(self):
    """The head as sparse vectors use it: (V,C), (V,). Rows lose their mean, since softmax ignores what is
    added to every logit of a text and ReLU does not; `floor` comes off; what is no word has zeros."""
    H = self.head
    word = torch.from_numpy(self.words.canon == np.arange(len(H.weight))).to(H.weight.device)
    bias = H.weight.new_zeros(len(word)) if H.bias is None else H.bias - H.bias.mean()
    return (torch.where(word[:, None], H.weight - H.weight.mean(0), 0) * H.scale,
            torch.where(word, bias * H.scale - self.floor, 0))


@torch.no_grad()
def strongest(self, ids):
    """list of N id lists -> (N,V): max_t z_t(v), where a text lights up each word the most."""
    (W, bias), out = self.word_head(), torch.zeros(len(ids), len(self.words.canon))
    for n, row in enumerate(ids):
        if len(row):
            out[n] = F.linear(self.places(row), W, bias).amax(0)       # (T,V) -> (V,)
    return out


def sparse(self, texts, k=None):
    """list of N str -> (N,V): the k (top_k) words that any place of a text lights up the most, the others 0:

        s(v) = log(1 + max(0, max_t z_t(v) - floor)),      z_t = head(x_t) - mean_v head(x_t)

    The vectors of SparseEncoder(folder/sparse). `floor` is what the K-th word of an ordinary text has; a soft
    cap of the head does not count. OURS: maximum over places and logarithm are SPLADE's (arXiv 2109.10086);
    the head of the pooled vector names the topic and finds far less."""
    z = self.strongest(self.ids(texts)).relu().log1p()
    top = z.topk(min(k or self.top_k, z.shape[1]), 1)
    return torch.zeros_like(z).scatter_(1, top.indices, top.values)


def explain(self, a, b, k=None):
    """Why are two texts alike? -> score, [(word, its part of the score)], largest first. They add up:

        cos(s_a, s_b) = sum_v s_a(v) s_b(v) / (|s_a| |s_b|)"""
    s = F.normalize(self.sparse([a, b], k), dim=1)
    parts = s[0] * s[1]
    order = parts.argsort(descending=True)[:int((parts > 0).sum())].tolist()
    return parts.sum().item(), [(self.words.text[v], parts[v].item()) for v in order]
