"""Sparse vectors over tokens, read through the head, and why two texts are alike: methods of t2t.Embedder.

What CKPT/sparse, a SparseEncoder, gives. Texts without a common word can be alike: a place lights up words
*beyond* its own.
"""
import numpy as np
import torch
import torch.nn.functional as F


def word_head(self, floor=None):
    """The head as sparse vectors use it, (V,C) and (V,): in deviations above `usual`, less the floor.

    Rows lose their mean, since softmax ignores what is added to every logit of a text and ReLU does not.
    Tokens that people can not read (specials, spaces) have zeros."""
    H = self.head
    bias = H.weight.new_zeros(len(H.weight)) if H.bias is None else H.bias - H.bias.mean()
    mean, deviation = (0, bias.new_ones(len(bias))) if self.usual is None else self.usual.to(bias)
    read = torch.tensor([bool(t) for t in self.words.text], device=bias.device)
    rows = (H.weight - H.weight.mean(0)) * (H.scale / deviation)[:, None]
    return torch.where(read[:, None], rows, 0), torch.where(
        read, (bias * H.scale - mean) / deviation - (self.floor if floor is None else floor), 0)


@torch.no_grad()
def strongest(self, ids, floor=None):
    """list of N id lists -> (N,V): max_t of word_head at each place t, where a text lights up each token."""
    (W, bias), out = self.word_head(floor), torch.zeros(len(ids), len(self.words.text))
    for n, row in enumerate(ids):
        if len(row):
            out[n] = F.linear(self.places(row), W, bias).amax(0)       # (T,V) -> (V,)
    return out


def measure_usual(self, ids):
    """What ordinary texts, a list of N id lists, light up: `usual` (2,V), of each token's largest logit the
    mean and the standard deviation, to which half the mean deviation is added (a token that never moves says
    nothing when it moves a little); and `floor`, which top_k / 8 tokens of such a text exceed on average."""
    self.usual, self.floor = None, 0.0
    z = self.strongest(ids)                                                                          # (N,V)
    deviation = z.std(0, correction=0)
    self.usual = torch.stack([z.mean(0), (deviation + deviation.mean() / 2).clamp_min(1e-6)])
    z = (z - self.usual[0]) / self.usual[1]
    self.floor = z.topk(max(1, min(self.top_k, z.shape[1]) // 8), 1).values[:, -1].mean().item()


def sparse(self, texts, k=None, floor=None):
    """list of N str -> (N,V): the k (top_k) tokens that a text lights up unusually, the others 0:

        y(v) = log(1 + max(0, (max_t z_t(v) - mean(v)) / deviation(v) - floor))
        z_t(v) = head(x_t)[v] less its mean over all v;    mean, deviation, floor: see measure_usual

    The vectors of SparseEncoder(folder/sparse); a soft cap of the head does not count. OURS: maximum over
    places and logarithm are SPLADE's (arXiv 2109.10086). Without mean and deviation of each token the same
    few are the largest in all texts: nDCG@10 16 instead of 36 (300 queries of SciFact train among 1,427
    documents, default run; dense 41)."""
    z = self.strongest(self.ids(texts), floor).relu().log1p()
    top = z.topk(min(k or self.top_k, z.shape[1]), 1)
    return torch.zeros_like(z).scatter_(1, top.indices, top.values)


def explain(self, a, b, k=None):
    """Why are two texts alike? -> score, [(word, its part of the score)], largest first. They add up:

        cos(y_a, y_b) = sum_v y_a(v) y_b(v) / (|y_a| |y_b|)

    Of sparse vectors with half the floor: what a text lights up a little hinders a search, helps a reader."""
    y = F.normalize(self.sparse([a, b], k, self.floor / 2), dim=1)
    parts = torch.zeros(y.shape[1]).index_add_(0, self.variants, y[0] * y[1])      # of a word, as one
    order = parts.argsort(descending=True)[:int((parts > 0).sum())].tolist()
    return parts.sum().item(), [(self.words.text[v], parts[v].item()) for v in order]
