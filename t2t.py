"""Text2Token: turn a language model into a text embedder by teaching it which tokens a text is about.

    python t2t.py                                               # tiny/ on documentation: minutes on a CPU
    python t2t.py --backbone Qwen/Qwen3-0.6B --corpus my.jsonl  # your model, your texts, no labels
    python t2t.py --show-targets 5                              # look at the targets, train nothing

A language model turns a text into states, and its head turns states into tokens. Pool the states of a text
into one vector h and send *that* through the head: an untrained model lights up `, . the and`, a good one the
tokens that the text is about. Text2Token makes the second out of the first:

    x = f(ids)                              f: the backbone without its head, x_t a state a token
    h = pool(x)                             their mean
    z = head(s h)                           the backbone's own head, frozen; s = 4: see predict_targets
    L = mean_b KL(q_b || softmax(z_b))      q_b: the few tokens, weighted, that text b should light up

and, of the same kind, a loss at single tokens, x_t in place of h: see single_tokens.

    B texts   T tokens   C hidden width   V vocabulary   K sparse targets a text   (N: all rows, or all texts)

The file reads in the order in which a text travels: 1 text, 2 targets, 3 embedder, 4 loss, 5 training, 6 use.
PAPER: marks what the abstract of arXiv 2510.10224 states. OURS: marks a choice made here; the paper's
equations, hyper-parameters and code could not be read. corpus.py reads texts, checkpoint.py writes folders.
"""
import dataclasses
import functools
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cli import checked, end, flag, parse
from corpus import Error


# ------------------------------------------------------------------------------------------------ 0. settings
def setting(default, doc, choices=None):
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line is made from these fields: a default stands in one place."""
    backbone: str = setting("tiny", "folder or hub id of a causal language model")
    method: str = setting("data", "source of targets or baseline", "data model both none simcse mntp".split())
    corpus: str = setting("docstrings", ".txt, .jsonl, .jsonl.gz, .parquet file, a folder, hub:NAME[:COLUMN]")
    out: str = setting("ckpt", "folder for the finished checkpoint")
    init: str = setting("", "start from this checkpoint's weights instead of the backbone's (a second stage)")
    pooling: str = setting("auto", "of states; first-last: of two layers (auto: so for targets, if tied)",
                           "auto first-last mean last".split())
    attention: str = setting("bidirectional", "what a token may look at", ["bidirectional", "causal"])
    top_k: int = setting(64, "K, target tokens a text")
    temperature: float = setting(1.0, "of the targets: lower is sharper (simcse: cosines, in units of 0.05)")
    dropout: float = setting(-1.0, "of input tokens (-1: 0.2; simcse: of attention, 0.3; mntp: masked, 0.2)")
    max_length: int = setting(128, "tokens of a text that the model sees")
    batch_size: int = setting(64, "texts a step")
    micro_batch: int = setting(32, "texts on the device at a time, the same gradient (0: the whole batch)")
    steps: int = setting(220, "optimiser steps")
    lr: float = setting(0.0, "peak learning rate (0: 4e-3; adapters 2e-4, simcse 3e-5, mntp 3e-4)")
    whitening: float = setting(1.0, "how flat to make the spectrum of the embeddings: 0 not, 1 wholly")
    token_loss: float = setting(16.0, "weight of the loss at single tokens (0: none)")
    scale: float = setting(4.0, "s, of a mean of states in front of the head (last, simcse, mntp: 1)")
    lora_rank: int = setting(-1, "of LoRA adapters (0: all but embedding and head learn; -1: so below 100 M)")
    seed: int = setting(42, "of the order of texts and of every random number")
    device: str = setting("auto", "where to train", ["auto", "cpu", "cuda"])
    dtype: str = setting("auto", "of arithmetic (auto: bfloat16 on a GPU)", ["auto", "float32", "bfloat16"])
    impl: str = setting("auto", "of the loss: ext is csrc/, compiled, if it can be", "auto torch ext".split())
    save_every: int = setting(50, "steps between the states from which --resume goes on")
    resume: bool = setting(False, "go on with the interrupted run in --out")
    show_targets: int = setting(0, "print this many texts with their targets and exit")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                       # Ctrl-C amid the imports: no traceback
    try:
        CONFIG = parse(Config, __doc__, sys.argv[1:])
    except Error as e:
        end(e)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint as recomputed  # noqa: E402
from tqdm import tqdm  # noqa: E402

import backbone  # noqa: E402
import checkpoint as disk  # noqa: E402
import lexical  # noqa: E402
import ops  # noqa: E402
from backbone import cap, first_last, head, load_backbone, make_trainable, resolve, states  # noqa: E402
from baselines import entropy, mntp, simcse  # noqa: E402
from build_ext import choose, compiled  # noqa: E402
from corpus import (RUN, STOP, batch_of, blocks, code, keep_targets, key, order_of_texts,  # noqa: E402
                    read_tokens, stamps, tokenize, unspaced)
from ops import check_targets, merge  # noqa: E402


# ---------------------------------------------------------------------------------------------------- 1. text
# corpus.read_tokens streams the corpus through the tokenizer once, to disk: the ids of all texts, cut to what
# the model will see, and df (V,), in how many texts a word stands. What is a word? The vocabulary tells:

class Words(NamedTuple):
    canon: np.ndarray       # (V,) int64  the one id for all case and space variants of a word; -1: not a word
    glued: np.ndarray       # (V,) bool   begins with a letter, no space: goes on with a word, if one is open
    open: np.ndarray        # (V,) bool   ends in a letter
    text: list              # (V,) str    the token as people read it
    hash: str


def read_vocabulary(tok, V):
    """PAPER: targets are meaningful tokens. OURS: which tokens those are.

    canon[v] = -1 for specials, punctuation, numbers, stop words, single letters and pieces that only continue
    a word; otherwise the id of its form in lower case with a space in front (" paris" for "Paris"), or of the
    closest form that the vocabulary has."""
    canon, glued, opened, spaced = np.full(V, -1), *np.zeros((3, V), bool)
    text, forms = [""] * V, {}
    raw = tok.convert_ids_to_tokens(list(range(min(V, len(tok)))))     # V may be padded beyond the tokenizer
    special = set(tok.all_special_ids)
    for v, token in enumerate(raw):
        if not token or v in special or (token[0] == "<" and token[-1] == ">"):
            continue
        s = tok.convert_tokens_to_string([token])
        s = " " + s.lstrip() if token[0] in "\u2581\u0120" else s    # sentencepiece decodes without its space
        word = s.strip()
        if not word:
            continue
        cased = word[0].lower() != word[0].upper()
        text[v], spaced[v], opened[v] = word, s[0].isspace(), s[-1].isalpha()
        glued[v] = word[0].isalpha() and not spaced[v] and not unspaced(word[0])
        if word.isalpha() and word.lower() not in STOP and (len(word) > 1 or not cased):
            forms.setdefault(word.lower(), []).append(v)
    for word, ids in forms.items():
        best = min(ids, key=lambda v: (not spaced[v], text[v] != word, v))
        if not glued[best]:
            canon[ids] = best
    how = getattr(tok, "backend_tokenizer", None)                     # less what its last call left behind:
    how = how and json.loads(how.to_str()) | {"truncation": None, "padding": None}
    return Words(canon, glued, opened, text, key(code(__file__), raw, how))


def find_words(words, flat, lengths):
    """ids of n texts, flat (total,), of `lengths` (n,) -> (text number, canonical id) of each word, in order.

    OURS: a word that the tokenizer splits is credited through its first piece, " dys" for dyslexia; no credit
    at all cost a prototype 6 points of STS. Later pieces get none: "able" in comfort|able is not able."""
    text = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.zeros(len(flat), bool)
    inside[1:] = words.glued[flat[1:]] & words.open[flat[:-1]] & (text[1:] == text[:-1])
    keep = (words.canon[flat] >= 0) & ~inside
    return text[keep], words.canon[flat[keep]]


def corpus_tokens(source, tok, max_length, words):
    """corpus.Tokens of a corpus: what all that follows reads."""
    find = functools.partial(find_words, words)
    return read_tokens(source, tok, max_length, len(words.canon), find, words.hash)


# ------------------------------------------------------------------------------------------------- 2. targets
class Targets(NamedTuple):
    indices: np.ndarray     # (N,K) int32    -1 is padding
    probs: np.ndarray       # (N,K) float32  sums to 1 over K, or to 0: no words, or not read in training
    constant: float         # mean_b KL(q_b || mean of all q), the best constant prediction: the honest zero


def targets_of(config, tokens, words, model, tok, custom=None):
    """-> function(list of n id arrays) -> indices (n,K), probs (n,K); a row sums to 1, or to 0 without words.

    `custom`, such a function, replaces the method's own."""
    N, V, K = len(tokens.start) - 1, len(words.canon), config.top_k
    if K > V:
        raise Error(f"--top-k: expected at most the size of the vocabulary, {V}, got {K}")
    parts = [custom] if custom else []
    # OURS: `both` is an even mixture, K/2 tokens from each side; a token on both sides has both weights.
    k = K if config.method != "both" else K // 2
    if config.method in ("data", "both") and not custom:
        idf = np.log(N / np.maximum(1, tokens.df))
        parts.append(lambda rows: data_targets(rows, words, idf, k, config.temperature))
    if config.method in ("model", "both") and not custom:
        parts.append(model_targets(config, tokens, words, model, tok, k))

    def q(rows):
        i, p = (np.concatenate(x, 1) for x in zip(*(part(rows) for part in parts)))
        if i.shape[1] > K:
            raise Error(f"targets: expected at most top_k = {K} tokens a text, got {i.shape[1]}")
        p = p / np.maximum(p.sum(1, keepdims=True), 1e-30)
        return [x.numpy() for x in merge(torch.from_numpy(i), torch.from_numpy(p))]
    return q


def build_targets(config, tokens, words, model, tok, custom=None):
    """q for all texts that training will see, memory-mapped."""
    N, data = len(tokens.start) - 1, config.method == "data"           # data: of the corpus alone, and quick
    first = N if data or custom else min(N, -(-config.steps // RUN) * RUN * config.batch_size)
    seen = order_of_texts(config.seed, 0, N)[:first] if first < N else np.arange(N)
    made_by = [code(m.__file__) for m in (ops, backbone)]
    name = None if custom else key(code(__file__), *made_by, str(tokens.folder), config.method,
                                   stamps(resolve(config.backbone)), config.top_k, config.temperature,
                                   *([] if data else [config.seed, first, str(model.dtype)]))
    make = functools.partial(targets_of, config, tokens, words, model, tok, custom)
    return Targets(*keep_targets(name, tokens, np.sort(seen), config.top_k, make, 4096 if data else 64))


def data_targets(rows, words, idf, K, temperature):
    """list of n id arrays -> indices (n,K), probs (n,K): the words *in* the text, by how much they tell.

        q_b(v) ~ (tf_b(v) * idf(v))^(1/temperature),      idf(v) = log(N / df(v)), at least 0.001

    over the K heaviest v. PAPER: "data-driven": the meaningful tokens of a text. OURS: tf-idf as measure."""
    n, V = len(rows), len(idf)
    text, word = find_words(words, np.concatenate(rows), [len(r) for r in rows])
    pairs, tf = np.unique(text * V + word, return_counts=True)             # each word of each text once
    text, word = pairs // V, pairs % V
    weight = tf * np.maximum(idf[word], 1e-3)
    order = np.lexsort((word, -weight, text))                          # by text, heaviest first, ties by id
    text, word, weight = text[order], word[order], weight[order]
    first = np.searchsorted(text, text)                                # (pairs,) where its text begins
    rank, weight = np.arange(len(text)) - first, (weight / weight[first]) ** (1 / temperature)
    text, word, weight, rank = (x[rank < K] for x in (text, word, weight, rank))
    indices, probs = np.full((n, K), -1, np.int32), np.zeros((n, K), np.float32)
    indices[text, rank] = word
    probs[text, rank] = weight / np.bincount(text, weight, n)[text]
    return indices, probs


PROMPT = ('This text: "', '" means in one word: "')                        # OURS, in the manner of PromptEOL


def model_targets(config, tokens, words, model, tok, K, sample=2048):
    """-> function(list of n id arrays) -> indices (n,K), probs (n,K): what the frozen causal backbone sees.

        r_b(v) = log p(v | b) - mean_b' log p(v | b'),      q_b = softmax of the K largest r_b / temperature

    over canonical words v, each as its best variant. log p(v | b) is, for a large model, the next token after
    a one-word prompt; for a small one, which can not follow a prompt, the mean over positions of
    log p(v | prefix). What is subtracted is predicted for *every* text. PAPER: "model-derived": tokens
    *beyond* the text. OURS: the rest, and the mean over 2,048 texts."""
    large = sum(p.numel() for p in model.parameters()) > 1e9
    device, special = model.device, set(tok.all_special_ids)
    before, after = tok(PROMPT[0])["input_ids"], tok(PROMPT[1], add_special_tokens=False)["input_ids"]
    canon = torch.from_numpy(words.canon).to(device)

    @torch.no_grad()
    def log_p(row):                                                        # (T,) ids -> (V,)
        ids = before + [i for i in row.tolist() if i not in special] + after if large else row.tolist()
        ids = torch.tensor([ids], device=device)
        z = model(input_ids=ids, use_cache=False, logits_to_keep=int(large)).logits[0]            # (T or 1,V)
        return F.log_softmax(z.float(), -1).mean(0)

    some = order_of_texts(config.seed, 0, len(tokens.start) - 1)[:sample]
    some = [n for n in some if len(tokens.text(n))]
    expected = sum(log_p(tokens.text(n)).double() for n in tqdm(some, "corpus mean")) / max(1, len(some))

    def rows_of(rows):
        r = torch.stack([log_p(row) if len(row) else expected.float() - torch.inf for row in rows])
        r -= expected.float()                                              # (n,V)
        r.masked_fill_(canon < 0, -torch.inf)
        to = canon.clamp_min(0).expand_as(r)                           # a word scores as its best variant
        r = torch.full_like(r, -torch.inf).scatter_reduce_(1, to, r, "amax")
        r, i = r.topk(K, 1)
        p = F.softmax(r / config.temperature, 1).masked_fill(r == -torch.inf, 0)
        return i.int().masked_fill(r == -torch.inf, -1).cpu().numpy(), p.cpu().numpy()
    return rows_of


# ------------------------------------------------------------------------------------------------ 3. embedder
# backbone.py reads a model from disk, proves that it looks where it should, and finds its head: x (B,T,C) =
# states(model, ids, mask) is what the model hands to its head, head(model)(x) are its logits (B,T,V).
#
# OURS: for token targets x becomes, by backbone.first_last, half that and half the token's embedding e:
# x = (last + c e) / 2, c (model.config.first) for halves of one length: what a token is, and what the text
# makes of it. Where head and embedding are one table, c e already speaks to the head; where they are two, no
# such sum unless asked for (--pooling first-last).

def pool(x, mask, how):
    """x (B,T,C), mask (B,T) -> (B,C), whichever side the padding is on."""
    if how != "last":
        m = mask[:, :, None].to(x.dtype)
        return (x * m).sum(1) / m.sum(1).clamp_min(1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)                 # (B,) the last place that is no padding
    return x[torch.arange(len(x), device=x.device), last]


def pad(ids, pad_id, device="cpu"):
    """list of B id arrays -> ids (B,T), mask (B,T), padded on the right"""
    mask = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    out = torch.full_like(mask, pad_id)
    for b, row in enumerate(ids):
        out[b, :len(row)], mask[b, :len(row)] = torch.from_numpy(np.asarray(row, np.int64)), 1
    return out.to(device), mask.to(device)


class Embedder:
    """A model in use: h = pool(f(x)), and h W, the vectors that SentenceTransformer(folder).encode gives.

    W (C,C) makes the spectrum of embeddings flatter: see whiten; scale is s in z = head(s h); top_k, floor
    and usual (2,V) belong to sparse vectors: see lexical.py. W, floor and usual are measured at the end."""

    word_head, strongest, sparse = lexical.word_head, lexical.strongest, lexical.sparse
    measure_usual, explain = lexical.measure_usual, lexical.explain

    def __init__(self, model, tok, pooling, max_length, W=None, scale=1.0, top_k=64, floor=0.0,
                 usual=None):
        self.model, self.tok, self.pooling, self.max_length = model, tok, pooling, max_length
        self.W, self.scale, self.top_k, self.floor, self.usual = W, scale, top_k, floor, usual

    @classmethod
    def load(cls, folder, device="cpu"):
        """A checkpoint of `train`; any other causal model is read as it is: causal, mean over 128 tokens."""
        path = Path(folder) / "t2t.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        made = facts.get("config", {})
        model, tok = load_backbone(str(folder), made.get("attention", "causal"))
        return cls(model.to(device), tok, made.get("pooling", "mean"), made.get("max_length", 128),
                   disk.read_dense(path.parent, model) if made else None, facts.get("scale", 1.0),
                   made.get("top_k", 64), facts.get("floor", 0.0), disk.read_usual(path.parent))

    def encode(self, texts, batch_size=64):
        """list of N str -> (N,C) float32, not normalised. A text without a token gives zeros."""
        h = self.pooled(self.ids(texts), batch_size)
        return h if self.W is None else h @ self.W

    def ids(self, texts):
        if isinstance(texts, str):
            raise TypeError("encode: expected a list of texts, got one text: pass [text]")
        return tokenize(self.tok, list(texts), self.max_length)

    @property
    def head(self):
        return head(self.model)

    def places(self, row):
        """(T,) ids -> (T,C): the state at each place."""
        return states(self.model, *pad([row], self.tok.pad_token_id, self.model.device))[0]

    @torch.no_grad()
    def pooled(self, ids, batch_size=64):
        """list of N id lists -> (N,C) float32: h, before W; of which the head reads s h."""
        h = np.zeros((len(ids), self.head.weight.shape[1]), np.float32)
        order = sorted((n for n in range(len(ids)) if len(ids[n])), key=lambda n: -len(ids[n]))
        for rows in blocks(order, batch_size):                             # of like lengths: less padding
            part, mask = pad([ids[n] for n in rows], self.tok.pad_token_id, self.model.device)
            h[rows] = pool(states(self.model, part, mask).float(), mask, self.pooling).cpu().numpy()
        return h

    @torch.no_grad()
    def logits(self, h):
        """(N,C) float32 -> (N,V) float32: z = head(s h), by which a vector lights up tokens."""
        h = torch.from_numpy(h).to(self.head.weight)
        return self.head(self.scale * h).float().cpu()

    @functools.cached_property
    def words(self):
        return read_vocabulary(self.tok, len(self.head.weight))

    @functools.cached_property
    def variants(self):
        """(V,) the one id for all variants of a word; a token that is no word has its own."""
        canon = self.words.canon
        return torch.from_numpy(np.where(canon >= 0, canon, np.arange(len(canon))))

    @torch.no_grad()
    def tokens(self, texts, k=10):
        """list of str -> for each the k tokens it lights up, [(token, probability)]; variants are one."""
        p = F.softmax(self.logits(self.pooled(self.ids(texts))), -1)                                 # (N,V)
        p, i = torch.zeros_like(p).index_add_(1, self.variants, p).topk(k, 1)
        name = lambda v: self.words.text[v] or repr(self.tok.decode([v]))  # a space would show as nothing
        return [[(name(v), w) for v, w in zip(*row)] for row in zip(i.tolist(), p.tolist())]


def whiten(h, power, ridge=0.01):
    """h (N,C) -> W (C,C) float32, symmetric: h W spreads over the directions that h uses unevenly.

        S = mean_n u_n u_n',  u = h / |h|, in units of its mean eigenvalue,       W = (S + ridge I)^(-power/2)

    power 1: all directions nearly alike; 0: W = I. Fewer than 4 C texts are believed less: a larger ridge.

    OURS: predicting words leaves a few large directions, shared by all texts (the first is nearly the mean of
    all), which drown in a cosine what tells texts apart. Whitening as in arXiv 2103.15316, not centred."""
    u = F.normalize(torch.from_numpy(h).double(), dim=1)
    N, C = h.shape
    ridge *= max(1, 4 * C / N) ** 2
    eigenvalues, E = torch.linalg.eigh(u.T @ u / N)
    eigenvalues = eigenvalues.clamp_min(0) / eigenvalues.mean() + ridge
    return (E * eigenvalues ** (-power / 2) @ E.T).float().numpy()


# ---------------------------------------------------------------------------------------------------- 4. loss
# Each operation stands here as a few lines of torch, its specification, and in csrc/ for the speed of memory.
REDUCTIONS = ["none", "mean", "sum"]


def vocab_kl(logits, indices, probs, reduction="mean", impl="auto", inplace=False, check=None):
    """KL divergence of sparse targets from softmax(logits), in nats:

        L_n = sum_k p_nk (log p_nk - log softmax(x_n)[i_nk])

    logits (N,V), indices (N,K) int, probs (N,K) -> () for "mean" and "sum", (N,) for "none". Index -1 is
    padding; duplicates add up; p need not sum to 1. A row without a target gives 0 and is not in the mean.
    `check` validates the values of indices and probs (default: on CPU; a GPU would have to wait). `inplace`
    allows writing the gradient over logits, if they are not a leaf; this implementation never does."""
    check_targets("logits", logits, logits.shape[-1], indices, probs, reduction, impl, check)
    if inplace and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("vocab_kl: logits: expected the result of an operation for inplace=True, got a leaf "
                         "that requires grad")
    if compiled(impl, logits.device.type):
        op = torch.ops.t2t.vocab_kl_ if inplace else torch.ops.t2t.vocab_kl
        return op(logits, indices, probs, REDUCTIONS.index(reduction))
    i, p = merge(indices, probs)
    x = logits if logits.dtype == torch.float64 else logits.float()
    p = p.to(x.dtype)
    x = x - x.detach().amax(1, keepdim=True)                           # largest is 0: no overflow, and a big
    log_s = x.exp().sum(1, keepdim=True).log()                         # common offset costs no digits
    log_softmax = x.gather(1, i.clamp_min(0)) - log_s                  # (N,K) at the targets
    log_softmax = log_softmax.masked_fill(p == 0, 0)                   # 0 log 0 = 0, even if a logit is -inf
    return reduce((torch.special.xlogy(p, p) - p * log_softmax).sum(1), (p > 0).any(1), reduction)


def linear_vocab_kl(hidden, weight, indices, probs, bias=None, reduction="mean", impl="auto", check=None,
                    scale=1.0, softcap=None, chunk=1024):
    """vocab_kl(head(hidden), indices, probs) that never holds more than `chunk` rows of the logits.

    hidden (N,C), weight (V,C), bias (V,), scale and softcap as in Head (not s: that is in hidden). Here
    backward computes the logits again; compiled, the gradient is made with the loss."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("linear_vocab_kl: hidden and weight: expected (N,C) and (V,C), got "
                         f"{tuple(hidden.shape)} and {tuple(weight.shape)}")
    check_targets("hidden", hidden, len(weight), indices, probs, reduction, impl, check)
    if compiled(impl, hidden.device.type):
        return torch.ops.t2t.linear_vocab_kl(hidden, weight, indices, probs, bias,
                                             REDUCTIONS.index(reduction), scale, softcap, chunk)

    def rows(h, i, p, W, b):
        return vocab_kl(cap(F.linear(h, W, b), scale, softcap), i, p, "none", "torch", check=False)

    chunks = zip(hidden.split(chunk), indices.split(chunk), probs.split(chunk))
    loss = torch.cat([recomputed(rows, *x, weight, bias, use_reentrant=False, preserve_rng_state=False)
                      for x in chunks])
    return reduce(loss, ((indices >= 0) & (probs > 0)).any(1), reduction)


def reduce(loss, valid, reduction):
    if reduction == "none":
        return loss
    return loss.sum() / (valid.sum().clamp_min(1) if reduction == "mean" else 1)


# ------------------------------------------------------------------------------------------------ 5. training
# corpus.batch_of says which texts a step reads: each once an epoch (less what does not fill a batch), those
# of like length together, except for simcse, which would tell texts apart by their length.

def learning_rate(step, steps, peak):
    """OURS: linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 10)
    cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))
    return peak * min((step + 1) / warm, cosine)


# OURS. DROPOUT: share of input tokens left out (data, model, both), of attention (simcse), masked (mntp).
DROPOUT = {"data": 0.2, "model": 0.2, "both": 0.2, "simcse": 0.3, "mntp": 0.2}
RATE = {"data": 4e-3, "model": 4e-3, "both": 4e-3, "simcse": 3e-5, "mntp": 3e-4}      # without adapters

# What a step minimises is a generator of (loss to show, loss to descend), a pair for each micro-batch
# (ids, mask) in `batch`, so that the graph of one is gone before the next; baselines.py has the others.


def predict_targets(read, batch, H, impl, indices, probs, scale, token_loss, words):
    """Text2Token: L = mean_b KL(q_b || softmax(head(s h_b))), and a loss at single tokens.

    OURS: states are of about one length (a norm is the last step of a model), so the mean of n different ones
    is about sqrt(n) shorter: too short for a peaked softmax, unless all say the same. s gives length back.

    read(ids (b,T), mask (b,T)) -> x (b,T,C), h (b,C); indices and probs (B,K): of the whole batch."""
    B, valid, first = len(indices), (indices >= 0).any(1).sum().clamp_min(1), 0
    for ids, mask in batch:
        rows = slice(first, first := first + len(ids))
        x, h = read(ids, mask)
        L = linear_vocab_kl(scale * h, H.weight, indices[rows], probs[rows], H.bias, "sum", impl, False,
                            H.scale, H.softcap) / valid
        single = single_tokens(x, ids, mask, words, H, impl) * token_loss / B if token_loss else 0
        yield L.detach(), L + single


def single_tokens(x, ids, mask, words, H, impl, a_text=8):
    """The same loss where text and target are one token. At up to eight places t of a text that hold a word,
    x_t predicts its canonical form w_t:         sum_b sum_t -log softmax(head(x_bt))[w_bt] / 8

    OURS: the mean of many states can fit a text's targets while each single state forgets its word; such
    embeddings know the topic and lose the words. x (B,T,C), ids and mask (B,T), words: canon, glued and open
    of Words as tensors (V,) -> ()."""
    canon, glued, opened = words
    inside = F.pad(glued[ids[:, 1:]] & opened[ids[:, :-1]], (1, 0))    # (B,T) find_words, of what is left
    word = (canon[ids] >= 0) & (mask > 0) & ~inside
    every = ((word.sum(1, keepdim=True) + a_text - 1) // a_text).clamp(min=1)  # (B,1) take each n-th word
    b, t = (word & ((word.cumsum(1) - 1) % every == 0)).nonzero(as_tuple=True)
    return token_nll(x[b, t], canon[ids[b, t]], H, impl) / a_text


def token_nll(x, v, H, impl):
    """-sum_n log softmax(head(x_n))[v_n]: the loss with one target a row. x (N,C), v (N,) -> ()"""
    one = torch.ones(len(v), 1, device=x.device)
    return linear_vocab_kl(x, H.weight, v[:, None], one, H.bias, "sum", impl, False, H.scale, H.softcap)


def leave_out(ids, share, special):
    """(T,) ids -> (1 - share) T of them, in order, with all that are in `special` and at least one that is
    not. OURS: the target is that of the whole text, so that words must be inferred from others: a step
    towards tokens *beyond* it."""
    stays = np.isin(ids, special)
    order = np.argsort(torch.rand(len(ids)).numpy() + stays)           # specials last
    out = min(round(share * len(ids)), len(ids) - stays.sum() - 1)
    return ids[np.sort(order[max(0, out):])] if share else ids


def train(config, targets=None, on_step=None):
    """Train, write the checkpoint to config.out, return its path (None with show_targets). For experiments:

    targets: function(list of n id arrays) -> indices (n,k), probs (n,k), k <= top_k, instead of the method's
    on_step: function(step, embedder), called after every step"""
    t0, out = time.time(), Path(checked(config).out)
    if not config.show_targets:
        out = disk.start_folder(out, config.resume)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise Error("--device cuda: expected a GPU that torch can use, found none: pass --device cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    bf16 = config.dtype == "bfloat16" or (
        config.dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    torch.manual_seed(config.seed)

    # ---- text and targets, by the backbone as it was pretrained
    model, tok = load_backbone(config.backbone, "causal", torch.bfloat16 if bf16 else torch.float32)
    V = len(head(model.to(device)).weight)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > most:
        raise Error(f"--max-length: expected at most {most}, the positions of {config.backbone}, "
                    f"got {config.max_length}")
    words = read_vocabulary(tok, V)
    targeted = config.method in ("data", "model", "both")
    if config.method != "none":
        tokens = corpus_tokens(config.corpus, tok, config.max_length, words)
        given = config, tokens, words, model, tok
        if config.show_targets:
            return show_targets(config, tokens, targets_of(*given, custom=targets), words, tok)
        q = build_targets(*given, custom=targets) if targeted else None
    before = Embedder(model, tok, config.pooling, config.max_length).tokens(EXAMPLES, 8)

    # ---- the embedder
    small = sum(p.numel() for p in model.parameters()) < 1e8
    rank = config.lora_rank if config.lora_rank >= 0 else 0 if small else 16
    model = given = None                                               # the causal one goes, another comes
    frozen = torch.bfloat16 if rank and bf16 else torch.float32        # what does not learn needs no more
    option = "--init" if config.init else "--backbone"                 # again, with the attention to train
    model = load_backbone(config.init or config.backbone, config.attention, frozen, option)[0].to(device)
    if len(head(model).weight) != V:
        raise Error(f"--init: expected a checkpoint made from {config.backbone}, got another vocabulary")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    first_last(model, config.pooling == "first-last" or config.pooling == "auto" and targeted and tied)
    if config.method == "none":
        return finish(config, Embedder(model, tok, config.pooling, config.max_length), before, t0)
    model = make_trainable(model, rank)
    core = model.get_base_model() if rank else model                   # without the wrapper of the adapters
    embedder, H = Embedder(core, tok, config.pooling, config.max_length, top_k=config.top_k), head(core)
    embedder.scale = config.scale if targeted and config.pooling != "last" else 1.0
    tables = [torch.from_numpy(a).to(device) for a in (words.canon, words.glued, words.open)]        # (V,)
    lengths = np.diff(tokens.start)

    # ---- training
    params = [p for p in model.parameters() if p.requires_grad]
    peak = config.lr or (2e-4 if rank else RATE[config.method])
    dropout = DROPOUT[config.method] if config.dropout < 0 else config.dropout
    contrast, absent = config.method == "simcse", dropout if targeted else 0.0
    special = np.array(tok.all_special_ids)
    in_precision = torch.autocast(device, torch.bfloat16, enabled=bf16)

    def read(ids, mask):
        x = states(core, ids, mask)                                                                  # (B,T,C)
        return x, pool(x, mask, config.pooling)

    optimizer = torch.optim.AdamW(params, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    at = {"step": 0, "seconds": 0.0, "cells": 0, "read": 0, "corpus": tokens.hash}     # cells: read + padding
    if config.resume:
        at = disk.load_state(out, config, model, optimizer, tokens.hash)
    B = min(config.batch_size, len(lengths))
    constant = q.constant if q else math.log(B) if contrast else entropy(tokens, special, V)
    impl, which = choose(config.impl, device)                          # may compile: not a part of texts/s
    begun, t1 = dict(at), time.time()
    if config.method == "mntp":
        blank = tok("_", add_special_tokens=False)["input_ids"][-1]                        # LLM2Vec's choice
        nll = functools.partial(token_nll, H=H, impl=impl)
    kind = "LoRA" if rank else "between embedding and head"
    print(f"{sum(p.numel() for p in params):,} weights learn ({kind}), rate {peak:g}, {config.attention}; "
          f"{len(lengths):,} texts, {config.steps} steps of {B}; {'bfloat16' if bf16 else 'float32'} on "
          f"{device}; loss by {which}", flush=True)

    log = open(out / "log.jsonl", "a" if config.resume else "w")
    bar = tqdm(total=config.steps * B, initial=at["step"] * B, unit=" texts", desc="train")
    with disk.between_steps() as interrupted, log, bar:
        while at["step"] < config.steps and not interrupted:
            # ------------------------------------------------------------------------------ BEGIN: one step
            torch.manual_seed(config.seed * 1_000_003 + at["step"])    # so that there is no state to keep
            texts = batch_of(at["step"], config.seed, lengths, B, 1 if contrast else RUN)
            loss = objective = 0.0                                     # to show, to descend
            seen = [leave_out(tokens.text(n), absent, special) for n in texts]         # B x (T,) ids
            batch = [pad(part, tok.pad_token_id, device) for part in blocks(seen, config.micro_batch or B)]
            if contrast:
                parts = simcse(read, batch, core, dropout, 0.05 * config.temperature)
            elif config.method == "mntp":
                parts = mntp(read, batch, nll, dropout, blank, torch.from_numpy(special).to(device))
            else:
                indices, probs = (torch.from_numpy(a[texts]).to(device) for a in q[:2])              # (B,K)
                parts = predict_targets(read, batch, H, impl, indices, probs, embedder.scale,
                                        config.token_loss, tables)
            while part := in_precision(next)(parts, None):             # forward under autocast, backward not
                part[1].backward()
                loss, objective = loss + part[0].item(), objective + part[1].item()
            at["cells"] += sum(ids.numel() for ids, _ in batch)
            at["read"] += sum(int(mask.sum()) for _, mask in batch)
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
            if not math.isfinite(objective + norm):
                raise Error(f"step {at['step']}: loss {loss}, gradient norm {norm}: "
                            f"start again with a lower --lr (now {peak:g}), or --dtype float32")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(at["step"], config.steps, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            at["step"] += 1
            # -------------------------------------------------------------------------------- END: one step
            at["seconds"] = begun["seconds"] + time.time() - t1
            speed = (at["step"] - begun["step"]) * B / (time.time() - t1)
            log.write(json.dumps({"step": at["step"], "loss": loss, "objective": objective,
                                  "constant": constant, "lr": group["lr"], "grad_norm": norm,
                                  "texts_per_s": round(speed, 1)}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(B)
            if on_step:
                on_step(at["step"], embedder)
            if at["step"] % config.save_every == 0 or at["step"] == config.steps or interrupted:
                disk.save_state(out, config, model, optimizer, **at)
    if at["step"] < config.steps:
        raise KeyboardInterrupt(f"stopped after step {at['step']}: add --resume to the same command to go on")

    # ---- what the finished embedder knows of its corpus
    some = order_of_texts(config.seed, 0, len(lengths))[:4 * H.weight.shape[1]]               # 4 C
    some = [tokens.text(n) for n in some]
    if config.whitening:
        embedder.W = whiten(in_precision(embedder.pooled)(some, config.micro_batch or B), config.whitening)
    in_precision(embedder.measure_usual)(some[:256])
    embedder.model = model.cpu().float().merge_and_unload() if rank else model
    last = (out / "log.jsonl").read_text().splitlines()                # texts of like length go in runs of 16
    return finish(config, embedder, before, t0 - begun["seconds"],
                  loss=np.mean([json.loads(line)["loss"] for line in last[-16:]]).item(),
                  constant=constant, texts=len(lengths), texts_seen=config.steps * B, device=device,
                  corpus_hash=tokens.hash, padding=round(1 - at["read"] / at["cells"], 4))


# ----------------------------------------------------------------------------------------------------- 6. use
EXAMPLES = ["A dog runs after a ball in the park.", "The bank raised its interest rates again.",
            "How do I reset my password?", "She plays the violin in a small orchestra."]


def finish(config, embedder, before, t0, loss=None, **facts):
    """Write the checkpoint, and show what was learned: the tokens that a text lights up, and those `before`,
    from the causal backbone's pooled states."""
    from importlib.metadata import version
    embedder.model.cpu()
    after = embedder.tokens(EXAMPLES, 8)
    used = dataclasses.asdict(config)
    given = [part for k, v in used.items() for part in (flag(k), str(v))
             if v != Config.__dataclass_fields__[k].default and k != "resume"]
    facts = {"command": shlex.join(["python", "t2t.py", *given]), "loss": loss, **facts, "config": used,
             "scale": embedder.scale, "floor": embedder.floor, "seconds": round(time.time() - t0, 1),
             "threads": torch.get_num_threads(),
             "versions": {p: version(p) for p in ("torch", "transformers", "peft", "tokenizers", "numpy")}}
    disk.save(Path(config.out).resolve(), embedder, config, facts)
    print()
    line = lambda row: "  ".join(token for token, _ in row)
    for text, old, new in zip(EXAMPLES, before, after):
        print(f"{text}\n    before   {line(old)}\n    after    {line(new)}")
    if loss is not None:
        print(f"\nmean loss of the last 16 steps {loss:.3f} nats (best constant prediction "
              f"{facts['constant']:.3f}), {facts['padding']:.0%} padding, {facts['seconds']:.0f} s in all")
    print(f"{config.out}/ is ready:  SentenceTransformer({config.out!r})  or  python eval.py {config.out}")
    return config.out


def show_targets(config, tokens, q, words, tok):
    """--show-targets: the first texts of the first epoch, and the q of each."""
    order = order_of_texts(config.seed, 0, len(tokens.start) - 1)
    some = [tokens.text(n) for n in order[:config.show_targets]]
    for text, indices, probs in zip(some, *q(some)):
        best = sorted(((p, words.text[v]) for v, p in zip(indices, probs) if v >= 0), reverse=True)
        print(f"\n{tok.decode(text.tolist(), skip_special_tokens=True).strip()}\n    "
              f"{'  '.join(f'{t} {p:.3f}' for p, t in best) or '(no target)'}")


def main(config):
    try:
        train(config)
    except Error as e:
        end(e)
    except KeyboardInterrupt as e:
        end(str(e) or f"interrupted; if {config.out}/state/last.pt exists, --resume goes on from there", 130)
    except OSError as e:
        end(f"expected to read and write files, but {e.filename or config.out}: {e.strerror or e}")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "not enough memory" not in str(e):
            raise
        micro = min(config.micro_batch or config.batch_size, config.batch_size)
        end(f"out of memory: lower --micro-batch (now {micro}), or --max-length (now {config.max_length})")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(CONFIG)
