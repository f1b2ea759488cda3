"""Text2Token: turn a language model into a text embedder by teaching it which tokens a text is about.

    python t2t.py                                          # SmolLM2 on documentation: minutes on a CPU
    python t2t.py --backbone Qwen/Qwen3-0.6B --corpus my.jsonl  # your model, your texts, no labels

Ask a language model what a text means in one word. The state of the last token, from which it would answer,
is one vector h for the text, and the head turns h into tokens. Before training, it gives probability to words
of the text, but also to `A`, `The` and half words; an embedder should light up (give probability to) the
tokens that the text is about. Text2Token makes it so:

    x = f(This text: "..." means in one word: ")      f: the backbone without its head; x_t: state of token t
    h = x_T                                 the last state: one vector for the text
    z = H(s h)                              H: the backbone's own head, frozen; s is measured once
    L = mean_b KL(q_b || softmax(z_b))      q_b: half on words of text b, by tf-idf; half on words that the
                                            untrained model finds more probable for text b than for others
    e = h / |h|                             what encode returns

    B texts of a step   T tokens   C width   V vocabulary   K target tokens a text
    N texts of the corpus, or rows of an argument;  in shapes, n, b, k are some of N, B, K

After the settings come six parts: words, network, targets, loss, embedder, training. PAPER: marks what the
abstract of arXiv 2510.10224 states. OURS: marks what was chosen here, such as the form of these equations:
only the abstract could be read. plumbing/ holds files, checks, baselines.
"""
from dataclasses import asdict, dataclass, field

from plumbing.cli import RANK, Error, checked, command_line, parse, run_command

# ------------------------------------------------------------------------------------------------ 0. settings
WITH_TARGETS = ("data", "model", "both")         # methods with token targets
TRAINED = (*WITH_TARGETS, "simcse", "mntp")      # methods that train
ALL = (*TRAINED, "none")


def setting(default, doc, methods=ALL, choices=None, least=None):
    """A field of Config, and the methods that use it: with another method, the flag is refused."""
    return field(default=default, metadata=dict(doc=doc, methods=methods, choices=choices, least=least))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. OURS: all defaults. The command line is made from these fields.
    Before use, `settle` puts real values for `lr` None and each "auto", and removes the question for mntp."""
    backbone: str = setting("smollm2", "causal language model: smollm2, a folder, a .gguf file, a hub id")
    method: str = setting("both", "targets: data (words of the text), model (words that it predicts), both; "
                          "baselines: simcse, mntp; none: do not train", choices=ALL)
    corpus: str = setting("docstrings", ".txt, .jsonl[.gz], .parquet, a folder, "
                          "hub:NAME[:COLUMN[:CONFIGURATION[:SPLIT]]]", TRAINED)
    out: str = setting("ckpt", "folder for the finished checkpoint")
    init: str | None = setting(None, "start from this checkpoint's weights (a second stage)", TRAINED)
    prompt: str = setting('This text: "{}" means in one word: "', "the question (arXiv 2307.16645) around "
                          "the text {}; {} alone: only targets ask", [m for m in ALL if m != "mntp"])
    pooling: str = setting("last", "how the states become one vector", choices=["last", "mean"])
    attention: str = setting("causal", "what a token may look at", choices=["causal", "bidirectional"])
    top_k: int = setting(64, "K, target tokens per text", WITH_TARGETS, least=1)
    temperature: float = setting(1.0, "of the targets; lower: sharper", WITH_TARGETS, least=1e-6)
    max_length: int = setting(64, "tokens per text in training, question apart; in use at least 256", least=1)
    batch_size: int = setting(32, "texts per step", TRAINED, least=1)
    micro_batch: int = setting(8, "texts per forward pass (more if short)", TRAINED, least=1)
    grad_checkpointing: bool = setting(False, "compute layers again in backward: less memory", TRAINED)
    steps: int = setting(80, "optimiser steps", TRAINED, least=1)
    lr: float | None = setting(None, "peak rate (default 1e-3, mntp 3e-4)", TRAINED, least=1e-12)
    lora_rank: int = setting(16, "of LoRA; 0: all weights learn, except embedding and head", TRAINED, least=0)
    seed: int = setting(42, "of the order of texts and of every random number", TRAINED, least=0)
    device: str = setting("auto", "where to train", choices=["auto", "cpu", "cuda"])
    dtype: str = setting("auto", "of arithmetic; auto: bfloat16 where the processor computes it",
                         choices=["auto", "float32", "bfloat16"])
    impl: str = setting("auto", "of the loss; ext: csrc/", WITH_TARGETS, choices=["auto", "torch", "ext"])
    save_every: int = setting(50, "steps between savings, from which --resume goes on", TRAINED, least=1)
    resume: bool = setting(False, "go on with the interrupted run in --out, if there is one", TRAINED)
    overwrite: bool = setting(False, "replace what --out holds")
    show_targets: int = setting(0, "print this many texts and targets, and exit", WITH_TARGETS, least=0)


BUCKET = 16          # OURS: the texts of 16 batches are sorted by length together (bucketed_batch)
SAMPLE = 512         # OURS: texts from which averages over the corpus are estimated
EXAMPLES = ["A dog runs after a ball in the park.", "The bank raised its interest rates again.",
            "How do I reset my password?", "She plays the violin in a small orchestra."]

# Parsed before the imports, which take seconds, so that --help and a wrong flag answer at once.
CONFIG = parse(Config, __doc__) if __name__ == "__main__" else None

import functools
import json
import math
import re
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from build_ext import compiled
from plumbing import folders, memory, processes
from plumbing.arguments import check_own_targets, check_targets, check_words, settle
from plumbing.backbones import (add_adapters, attention_kernel, check_head, fetched, identity_of, origin,
                                positions, read_backbone, usable_length)
from plumbing.baselines import mntp, simcse, token_entropy
from plumbing.cache import cached, hash_of
from plumbing.corpus import (around, blocks, is_unspaced, question, set_prompt, tokenize, tokenize_corpus,
                             tokenizer_hash)
from plumbing.losses import linear_vocab_kl, scatter_targets  # noqa: F401 (re-exported)

# --------------------------------------------------------------------------------------------------- 1. words
# `tokens` is the corpus on disk (plumbing/corpus.py), each text cut at max_length. tokens[n]: the ids (T,) of
# text n; tokens.lengths (N,). tokens.ids has all texts in one row; text n begins at tokens.start[n].
# Which of them are words?

# OURS: words that carry grammar, not content. Everything subtler is left to idf, which knows the corpus. The
# last two lines are pieces of don't and we'll; so the verb won is lost, too.
STOP = frozenset("""
a about above after again against all almost also although always am among an and another any anyone anything
are around as at be because been before being below between both but by can cannot could did do does doing
done down during each either else enough etc even ever every everyone everything few for from further get gets
got had has have having he hence her here hers herself him himself his how however i if in instead into is it
its itself just least less like many may maybe me might mine more most much must my myself neither never no
nobody none nor not nothing now of off often on once one only onto or other others otherwise our ours
ourselves out over own per perhaps please quite rather really same shall she should since so some someone
something sometimes soon still such than that the their theirs them themselves then there therefore these they
this those though through thus to too toward towards under until up upon us use used uses using very via was
we well were what whatever when whenever where whereas wherever whether which while who whoever whole whom
whose why will with within without would yet you your yours yourself yourselves ve ll re don didn doesn isn
wasn aren won couldn wouldn shouldn hasn haven hadn
""".split())


class Words(NamedTuple):
    canonical_id: np.ndarray  # (V,) int64  the one id for all case and space variants of a word; -1: no word
    is_continuation: np.ndarray    # (V,) bool   begins with a letter and no space: may continue a word
    ends_in_letter: np.ndarray     # (V,) bool   a word may go on after it
    spelling: list                 # (V,) str    the token as people read it; white space: in quotes


def is_letter(c):
    return unicodedata.category(c)[0] in "LM"        # M: marks, such as vowels of Hindi, combining accents


def read_vocabulary(tok, V):
    """tokenizer, size of the embedding -> Words. PAPER: targets are meaningful tokens. OURS: which these are.

    canonical_id[v] is -1 for specials, punctuation, numbers, stop words, single letters and pieces that only
    continue a word. Otherwise it is the id of the form in lower case with a space in front (" paris" for
    "Paris"), or of the closest form that the vocabulary has."""
    canonical_id = np.full(V, -1)
    is_continuation, ends_in_letter, has_space = np.zeros((3, V), bool)
    spelling, forms = [""] * V, {}
    special, added = set(tok.all_special_ids), set(tok.get_added_vocab().values())
    for token, v in tok.get_vocab().items():
        if v >= V or not token:
            continue
        spelling[v] = token
        if v in special or (token[0] == "<" and token[-1] == ">"):
            continue
        whole = s = tok.convert_tokens_to_string([token])
        # U+2581 and U+0120 mark a space in front, which decoding may drop; an added token is a whole word
        if token[0] in "\u2581\u0120" or v in added:
            s = " " + s.lstrip()
        word = s.strip()
        spelling[v] = word or repr(whole)
        if not word:
            continue
        has_space[v], ends_in_letter[v] = s[0].isspace(), is_letter(s[-1])
        is_continuation[v] = is_letter(word[0]) and not has_space[v] and not is_unspaced(word[0])
        form = unicodedata.normalize("NFC", word.lower())
        has_case = word[0].lower() != word[0].upper()
        # one letter is no word, unless its script has no case, as Chinese
        if all(map(is_letter, word)) and form not in STOP and (len(form) > 1 or not has_case):
            forms.setdefault(form, []).append(v)
    for form, ids in forms.items():
        best = min(ids, key=lambda v: (not has_space[v], spelling[v] != form, v))
        if not is_continuation[best]:
            canonical_id[ids] = best
    return Words(canonical_id, is_continuation, ends_in_letter, spelling)


def find_words(words, ids, lengths):
    """ids (total,) of n texts one after the other, their lengths (n,) -> row, word (words,): the number of
    its text and the canonical id of each word, in order.

    OURS: a word that the tokenizer splits counts as its first piece, " dys" for dyslexia (unless that is a
    stop word or a letter). A prototype that left such words out lost 6 points of STS. Later pieces do not
    count: "able" in comfort|able is not able."""
    row = np.repeat(np.arange(len(lengths)), lengths)                                             # (total,)
    inside = np.zeros(len(ids), bool)
    inside[1:] = (words.is_continuation[ids[1:]] & words.ends_in_letter[ids[:-1]] & (row[1:] == row[:-1]))
    keep = (words.canonical_id[ids] >= 0) & ~inside
    return row[keep], words.canonical_id[ids[keep]]


def document_frequency(tokens, words):
    """df (V,): in how many of the N texts each word stands."""
    df, lengths = np.zeros(len(words.canonical_id), np.int64), tokens.lengths
    for block in blocks(range(len(tokens)), 4096):
        row, word = find_words(words, tokens.ids[tokens.start[block[0]]:tokens.start[block[-1] + 1]],
                               lengths[block])
        pairs = np.unique(row * len(df) + word)                        # each word of each text once
        df += np.bincount(pairs % len(df), minlength=len(df))
    return df


@functools.lru_cache(2)
def epoch_permutation(seed, epoch, N):
    """The order in which an epoch reads the N texts. Its first n are a random sample of them."""
    return np.random.default_rng((seed, epoch)).permutation(N)


def random_texts(tokens, seed, n=SAMPLE):
    """The ids of n random texts of the corpus."""
    return [tokens[i] for i in epoch_permutation(seed, 0, len(tokens))[:n]]


# ------------------------------------------------------------------------------------------------- 2. network
class Head(NamedTuple):
    """z = logit_scale * (x U^T + bias); then softcap * tanh(z / softcap), if there is one. U: the weight."""
    weight: torch.Tensor                    # (V,C)
    bias: torch.Tensor | None               # (V,)
    logit_scale: float = 1.0                # Cohere, Granite
    softcap: float | None = None            # Gemma 2

    def __call__(self, x):                  # (...,C) -> (...,V)
        z = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        z = z * self.logit_scale if self.logit_scale != 1 else z
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


def head(model):
    """The Head of a causal language model: head(model)(x) is what model(...).logits holds (check_head)."""
    c, out = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(c, "logit_scale", None) or 1 / (getattr(c, "logits_scaling", None) or 1)
    softcap = getattr(c, "final_logit_softcapping", None)
    return Head(out.weight, getattr(out, "bias", None), float(scale), softcap)


def load_backbone(name, attention, dtype=torch.float32, option="--backbone"):
    """-> (causal language model, tokenizer), with this attention; checked: its logits are those of Head."""
    model, tok = read_backbone(name, attention, dtype, option)
    check_head(model, head(model), option)
    return model, tok


def hidden_states(model, ids, mask):
    """ids (B,T), mask (B,T) -> x (B,T,C): what the model hands to its head."""
    with attention_kernel(ids.device.type):
        return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def pool(x, mask, pooling):
    """x (B,T,C), mask (B,T) -> h (B,C) float32, whichever side the padding is on."""
    if pooling == "mean":
        m = mask[:, :, None].float()                                                               # (B,T,1)
        return (x.float() * m).sum(1) / m.sum(1).clamp_min(1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)            # (B,) the last position that is no padding
    return x[torch.arange(len(x), device=x.device), last].float()


def ask(ids, before, after):
    """list of n id arrays -> list of n id lists: the ids of the question, before and after, around each."""
    return [[*before, *row, *after] for row in ids]


def pad(ids, pad_id, device="cpu"):
    """list of B id lists -> ids (B,T), mask (B,T), padded on the right."""
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device), mask.to(device)


@torch.no_grad()
def pooled(ids, model, tok, pooling, *, before, after, batch_size):
    """list of N id arrays -> h (N,C) float32: each text in its question. (Zeros where there is no token.)"""
    h, ids = torch.zeros(len(ids), head(model).weight.shape[1]), ask(ids, before, after)
    order = sorted((n for n in range(len(ids)) if ids[n]), key=lambda n: -len(ids[n]))
    for rows in blocks(order, batch_size):                             # of like lengths: less padding
        padded, mask = pad([ids[n] for n in rows], tok.pad_token_id, model.device)
        h[rows] = pool(hidden_states(model, padded, mask), mask, pooling).cpu()
    return h


# ------------------------------------------------------------------------------------------------- 3. targets
class Targets(NamedTuple):
    """The targets q of the n texts that training uses. A row sums to 1, or to 0 where a text has no word."""
    texts: np.ndarray       # (n,) int64     their numbers in the corpus, sorted
    indices: np.ndarray     # (n,K) int32    -1 is padding
    probs: np.ndarray       # (n,K) float32
    constant_loss: float    # of the best prediction that ignores the text

    def of(self, texts):                             # (b,) -> indices (b,K), probs (b,K)
        rows = np.searchsorted(self.texts, texts)
        return torch.from_numpy(self.indices[rows]), torch.from_numpy(self.probs[rows])


def data_targets(ids, words, idf, K, *, temperature):
    """list of n id arrays -> indices (n,K), probs (n,K): the words *in* the text, by how much they tell.

        q_b(v) ∝ (tf_b(v) * max(0.001, idf(v)))^(1/temperature),      idf(v) = log(N / df(v))

    over the K heaviest v. PAPER: "data-driven": the meaningful tokens of a text. OURS: tf-idf."""
    indices, probs = np.full((len(ids), K), -1, np.int32), np.zeros((len(ids), K), np.float32)
    for b, text in enumerate(ids):
        word, tf = np.unique(find_words(words, text, [len(text)])[1], return_counts=True)
        weight = tf * np.maximum(idf[word], 1e-3)
        top = np.argsort(-weight, kind="stable")[:K]                   # heaviest first, ties by id
        p = (weight[top] / weight.max(initial=1e-3)) ** (1 / temperature)                      # no overflow
        indices[b, :len(top)], probs[b, :len(top)] = word[top], p / p.sum()
    return indices, probs


@torch.no_grad()
def predict(ids, model, tok, *, before, after):
    """list of n id arrays -> log p (n,V): what the frozen causal backbone answers, as pretrained (s = 1)."""
    h = pooled(ids, model, tok, "last", before=before, after=after, batch_size=32)                   # (n,C)
    return torch.cat([F.log_softmax(head(model)(part.to(model.device)).float(), -1).cpu()
                      for part in h.split(32)])


def model_targets(log_p, mean_log_p, words, K, *, temperature):
    """log p (n,V), its mean over the corpus (V,) -> indices (n,K), probs (n,K): the words that the backbone
    predicts for this text and not for texts in general. They may stand in the text.

        r_b(v) = log p(v | b) - mean_b' log p(v | b'),      q_b = softmax of the K largest r_b / temperature

    A word scores the maximum over its variants. PAPER: "model-derived": tokens *beyond* a text. OURS: how."""
    canonical_id = torch.from_numpy(words.canonical_id)
    r = (log_p - mean_log_p).masked_fill(canonical_id < 0, -torch.inf)                               # (n,V)
    to = canonical_id.clamp_min(0).expand_as(r)      # no word: its r is -inf, so the maximum at 0 stays
    best = torch.full_like(r, -torch.inf).scatter_reduce_(1, to, r, "amax")                          # (n,V)
    r, i = best.topk(K, 1)                                                                           # (n,K)
    p = F.softmax(r / temperature, 1)
    return i.int().masked_fill(p == 0, -1).numpy(), p.numpy()


def coalesce(indices, probs):
    """(N,K), (N,K) -> the same targets, each index once a row, its p added up; freed places hold -1 and 0.

    [5, -1, 5, 2], [.1, .7, .2, .4] -> [-1, 2, 5, -1], [0, .4, .3, 0]"""
    i, order = indices.long().sort(1)
    p = probs.masked_fill(indices < 0, 0).gather(1, order)
    place = F.pad(i[:, 1:] != i[:, :-1], (1, 0)).cumsum(1)             # (N,K) where an index goes: its rank
    return torch.full_like(i, -1).scatter_(1, place, i), torch.zeros_like(p).scatter_add_(1, place, p)


def method_targets(config, tokens, words, *, model, tok):
    """-> the function of --method: list of n id arrays -> indices (n,K), probs (n,K)."""
    K, temperature = config.top_k, config.temperature
    check_words(words, config, tok)
    if config.method in ("data", "both"):
        idf = np.log(len(tokens) / np.maximum(1, document_frequency(tokens, words)))
    if config.method in ("model", "both"):
        before, after = question(tok, config.prompt if config.prompt != "{}" else Config.prompt)
        if (need := config.max_length + len(before + after)) > positions(model):
            raise Error(f"--method {config.method}: expected a model of {need} positions, for a text in its "
                        f"question, got {positions(model)}: lower --max-length, or pass --method data")
        answers = functools.partial(predict, model=model, tok=tok, before=before, after=after)
        sample = random_texts(tokens, config.seed)
        parts = blocks(tqdm(sample, "mean of log p"), 64)
        mean_log_p = sum(answers(part).sum(0) for part in parts) / len(sample)                        # (V,)
    of = {"data": lambda ids, k: data_targets(ids, words, idf, k, temperature=temperature),
          "model": lambda ids, k: model_targets(answers(ids), mean_log_p, words, k, temperature=temperature)}
    if config.method in of:
        return functools.partial(of[config.method], k=K)

    def both(ids):
        # OURS: K/2 tokens a side (one side alone: 4 points worse); a text without words has the model's.
        sides = of["data"](ids, K - K // 2), of["model"](ids, K // 2)
        i, p = (torch.from_numpy(np.concatenate(x, 1)) for x in zip(*sides))
        return [x.numpy() for x in coalesce(i, p / p.sum(1, keepdim=True).clamp_min(1e-30))]
    return both


def own_targets(function, K, V):
    """A user's function, in the form of those above: checked, each token once a row, -1 where p is 0."""
    def own(ids):
        i, p = map(np.asarray, function(ids))
        check_own_targets(i, p, K, V, n=len(ids))
        i, p = np.ascontiguousarray(i, np.int64), np.ascontiguousarray(p, np.float32)    # any type, strides
        i, p = (x.numpy() for x in coalesce(torch.from_numpy(i), torch.from_numpy(p)))
        return np.where(p > 0, i, -1), p
    return own


def loss_without_text(indices, probs, V):
    """mean_b KL(q_b || m), m = mean_b q_b: the loss of the best prediction that ignores the text."""
    there = indices >= 0
    n = there.any(1).sum()                                             # texts that have targets
    m = np.bincount(indices[there], probs[there], V) / n                                             # (V,)
    sum_p_log_p = lambda p: (p * np.log(np.maximum(p, 1e-30))).sum(dtype=np.float64)
    return float(sum_p_log_p(probs) / n - sum_p_log_p(m))


def build_targets(config, tokens, words, *, model, tok, own=None):
    """-> Targets, made once, kept on disk. model: the backbone, frozen and causal; own: see own_targets."""
    N, V, K = len(tokens), len(words.canonical_id), config.top_k
    # whole buckets: a run that ends inside one may read any text of it (bucketed_batch, part 6)
    n = math.ceil(config.steps / BUCKET) * BUCKET * config.batch_size
    texts = np.sort(epoch_permutation(config.seed, 0, N)[:n])

    def make():
        q_of = own or method_targets(config, tokens, words, model=model, tok=tok)
        indices, probs = np.full((len(texts), K), -1, np.int32), np.zeros((len(texts), K), np.float32)
        for rows in blocks(tqdm(range(len(texts)), "targets", unit=" texts"), 256):
            i, p = q_of([tokens[t] for t in texts[rows]])                                    # (n,k), k <= K
            indices[rows, :i.shape[1]], probs[rows, :i.shape[1]] = i, p
        if (indices < 0).all():
            raise Error("--corpus: expected words to learn from, but no text has a single target token")
        return indices, probs

    def write(folder):
        for name, array in zip(("indices.npy", "probs.npy"), make()):
            np.save(folder / name, array)
    read = lambda folder: (np.load(folder / "indices.npy"), np.load(folder / "probs.npy"))
    # parts 1 to 3 of this file make the targets: an edit there makes them anew
    made_by = re.search(" 1. words\n.*? 4. loss\n", Path(__file__).read_text("utf-8"), re.S)[0]
    by_model = config.method != "data" and (str(model.dtype), identity_of(config.backbone), config.seed,
                                            question(tok, Config.prompt), folders.versions())
    # tokens.folder: by corpus, tokenizer with its question, max_length, and plumbing/corpus.py
    key = made_by, SAMPLE, tokens.folder.name, config.method, K, config.temperature, texts.tolist(), by_model
    # own targets are not kept: nothing tells what a function computes
    indices, probs = make() if own else cached("targets", hash_of(*key), write, read)
    return Targets(texts, indices, probs, loss_without_text(indices, probs, V))


def show_targets(config, tokens, words, *, model, tok, own=None):
    """--show-targets: a random sample of the texts, and the q of each."""
    some = random_texts(tokens, config.seed, config.show_targets)
    q_of = own or method_targets(config, tokens, words, model=model, tok=tok)
    for part in blocks(some, 64):
        for text, indices, probs in zip(part, *q_of(part)):
            best = sorted(((p, words.spelling[v]) for v, p in zip(indices, probs) if v >= 0), reverse=True)
            print(f"\n{tok.decode(text.tolist(), skip_special_tokens=True).strip()}\n    "
                  f"{'  '.join(f'{t} {p:.3f}' for p, t in best) or '(no target)'}")


# ---------------------------------------------------------------------------------------------------- 4. loss
# A few lines of torch, which specify it, and kernels in csrc/. plumbing/losses.py has two more operations.
REDUCTIONS = ["none", "mean", "sum"]


def vocab_kl(logits, indices, probs, reduction="mean", impl="auto", inplace=False, check=None):
    """KL divergence of sparse targets from softmax(logits), in nats:

        L_n = sum_k p_nk (log p_nk - log softmax(z_n)[i_nk])          z: logits, i: indices, p: probs

    logits (N,V), indices (N,K) int, probs (N,K) -> () for "mean" and "sum", (N,) for "none". Index -1 is
    padding; duplicates add up; p need not sum to 1. A row without a target gives 0 and is not in the mean.
    `check` validates the values of indices and probs (default: on a CPU; on a GPU this would force a
    synchronisation). `inplace`: the compiled kernel may write the gradient over logits, which must not be
    a leaf that requires grad. ValueError on wrong arguments."""
    check_targets("logits", logits, logits.shape[-1], indices, probs, reduction, impl, check)
    if inplace and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("vocab_kl: logits: expected the result of an operation for inplace=True, got a leaf "
                         "that requires grad")
    if compiled(impl, logits.device.type):
        op = torch.ops.t2t.vocab_kl_ if inplace else torch.ops.t2t.vocab_kl
        return op(logits, indices, probs, REDUCTIONS.index(reduction))
    z = logits if logits.dtype == torch.float64 else logits.float()
    i, p = coalesce(indices, probs.to(z.dtype))
    # by hand: with F.log_softmax a training step takes a tenth longer on a CPU
    z = z - z.detach().amax(1, keepdim=True)         # no overflow, and a large common offset costs no digits
    log_sum = z.exp().sum(1, keepdim=True).log()
    log_softmax = z.gather(1, i.clamp_min(0)) - log_sum                # (N,K) at the targets
    log_softmax = log_softmax.masked_fill(p == 0, 0)                  # 0 log 0 = 0, even if a logit is -inf
    return reduce((torch.special.xlogy(p, p) - p * log_softmax).sum(1), (p > 0).any(1), reduction)


def reduce(loss, valid, reduction):                       # loss (N,), valid (N,) bool: rows of the mean
    if reduction == "none":
        return loss
    return loss.sum() / (valid.sum().clamp_min(1) if reduction == "mean" else 1)


def target_loss(batch, forward, H, scale, *, indices, probs, impl):
    """The loss of a batch, over the texts that have targets:

        L = mean_b KL(q_b || softmax(H(s h_b)))

    Yields a part of L for each micro-batch: call backward on it before the next, so that one graph is held.
    batch: list of (ids, mask) (b,T); forward(ids, mask) -> x (b,T,C), h (b,C); indices, probs (n,K)."""
    valid = processes.total((indices >= 0).any(1).sum()).clamp_min(1)
    sizes = [len(ids) for ids, _ in batch]
    for (ids, mask), i, p in zip(batch, indices.split(sizes), probs.split(sizes)):                    # (b,K)
        _, h = forward(ids, mask)                                                                    # (b,C)
        yield vocab_kl(H(scale * h), i, p, reduction="sum", impl=impl, inplace=True, check=False) / valid


SCALES = [round(float(s), 4) for s in np.geomspace(0.05, 20, 27)]                # OURS: values tried for s


@torch.no_grad()
def measure_scale(h, H, indices, probs):
    """h (N,C) before training, Head, targets (N,K) -> s, with which the loss is least.

    OURS: s is an inverse temperature of the softmax. States and head rows differ in length from model to
    model, so s is measured (SmolLM2: 0.32, 0.40, 0.40 with three seeds)."""
    losses = [vocab_kl(H(s * h), indices, probs, impl="torch", check=False).item() for s in SCALES]
    return SCALES[int(np.argmin(losses))]


# ------------------------------------------------------------------------------------------------ 5. embedder
class Embedder:
    """A model in use. max_length: tokens read, with the question (Config: without). scale: s. mean (C,) of h
    over SAMPLE texts of the corpus is subtracted for sparse vectors."""
    SPARSE_K = 256             # OURS: tokens of a sparse vector; with 64, SciFact is 5 points lower

    def __init__(self, model, tok, pooling, max_length=256, scale=1.0, mean=None):
        self.model, self.tok, self.pooling, self.max_length = model, tok, pooling, max_length
        self.scale, self.mean = scale, mean
        self.before, self.after = around(tok)              # the question: the tokenizer's template

    @classmethod
    def load(cls, folder, device="cpu"):
        """A checkpoint of `train`, a folder or a hub id. Any other model: causal, mean, up to 512 tokens."""
        folder = fetched(folder)
        facts = folders.read_facts(folder)
        used = facts.get("config", {})
        model, tok = load_backbone(str(folder), used.get("attention", "causal"), option="Embedder.load")
        length = min(facts.get("max_length", 512), positions(model))
        return cls(model.to(device), tok, used.get("pooling", "mean"), length, facts.get("scale", 1.0),
                   folders.read_mean(folder, head(model).weight.shape[1]))

    def encode(self, texts, batch_size=64):
        """list of N str -> (N,C) float32, rows of length 1 (or 0, where there is no token at all)"""
        return F.normalize(self.pooled(self.token_ids(texts), batch_size), dim=1).numpy()

    def token_ids(self, texts):
        if isinstance(texts, str):
            raise TypeError("texts: expected a list, got one text: pass [text]")
        return tokenize(self.tok, list(texts), self.max_length - len(self.before + self.after))

    def pooled(self, ids, batch_size=64):
        """list of N id lists, of the texts alone: the question is added here -> h (N,C) float32."""
        return pooled(ids, self.model, self.tok, self.pooling, before=self.before, after=self.after,
                      batch_size=batch_size)

    @torch.no_grad()
    def logits(self, h):
        """h (N,C) -> z (N,V) float32: z = H(s h), by which a vector lights up tokens."""
        return head(self.model)((self.scale * h).to(self.model.device)).float().cpu()

    @functools.cached_property
    def words(self):
        return read_vocabulary(self.tok, len(head(self.model).weight))

    @functools.cached_property
    def variants(self):
        """(V,) the one id for all variants of a word; a token that is no word has its own."""
        canonical_id = self.words.canonical_id
        return torch.from_numpy(np.where(canonical_id >= 0, canonical_id, np.arange(len(canonical_id))))

    def top_tokens(self, texts, k=10):
        """list of N str -> for each the k tokens it lights up, [(token, probability)]. Variants of a word
        count as one token; those of stop words are not merged."""
        lit = []
        for h in self.pooled(self.token_ids(texts)).split(256):        # (b,C); all N rows of V would be large
            p = F.softmax(self.logits(h), -1)                                                        # (b,V)
            p, i = torch.zeros_like(p).index_add_(1, self.variants, p).topk(k, 1)                    # (b,k)
            lit += [[(self.words.spelling[v], w) for v, w in zip(*row)]
                    for row in zip(i.tolist(), p.tolist())]
        return lit

    @torch.no_grad()
    def sparse(self, texts, k=None):
        """list of N str -> y (N,V), rows of length 1: scores of tokens, the k (SPARSE_K) largest, others 0:

            y = top_k(max(0, U (h - m))) / |...|          U: the weight of the head, m: mean of h over texts

        OURS: sparse vectors. A token with a high score in every text does not tell texts apart, so m is
        subtracted. For many texts, SparseEncoder(folder/sparse) gives the same, but not of length 1."""
        h, U = self.pooled(self.token_ids(texts)), head(self.model).weight                          # (N,C)
        centred = h if self.mean is None else h - self.mean
        y = F.linear(centred.to(U), U).float().cpu()                                                # (N,V)
        top = y.clamp_min(0).topk(min(k or self.SPARSE_K, y.shape[1]), 1)
        return F.normalize(torch.zeros_like(y).scatter_(1, top.indices, top.values), dim=1)

    def explain(self, a, b, k=None):
        """Why are two texts alike? -> the cosine of their sparse vectors, [(word, its part)], largest first.

            cos(y_a, y_b) = sum_v y_a(v) y_b(v)"""
        y = self.sparse([a, b], k)                                                                  # (2,V)
        parts = torch.zeros(y.shape[1]).index_add_(0, self.variants, y[0] * y[1])      # a word's variants
        order = parts.argsort(descending=True)[:int((parts > 0).sum())].tolist()
        return parts.sum().item(), [(self.words.spelling[v], parts[v].item()) for v in order]


# ------------------------------------------------------------------------------------------------ 6. training
def bucketed_batch(step, seed, lengths, B, *, bucket=BUCKET):
    """-> (B,) the numbers of the texts of a step. It needs no earlier step: a resumed run keeps the order.

    An epoch is a permutation of the texts; its last, incomplete batch is dropped. Within each bucket of 16
    batches, texts of like length go together: less padding."""
    per_epoch = len(lengths) // B
    epoch, i = divmod(step, per_epoch)
    first = i // bucket * bucket
    n = min(bucket, per_epoch - first)                                 # batches in this bucket
    texts = epoch_permutation(seed, epoch, len(lengths))[first * B:(first + n) * B]
    texts = texts[np.argsort(lengths[texts], kind="stable")].reshape(n, B)
    return texts[np.random.default_rng((seed, epoch, first)).permutation(n)[i - first]]


def learning_rate(step, steps, peak):
    """OURS: linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 10)
    cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))
    return peak * min((step + 1) / warm, cosine)


def make_trainable(model, rank, seed):
    """What learns between embedding and head: LoRA adapters on every linear map, or (rank 0) all weights.

    peft changes model in place; what it returns is needed only to merge the adapters. OURS: head and
    embedding stay as pretrained: a tied pair stays tied, and tokens that the corpus lacks keep their rows."""
    if rank:
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = add_adapters(model, lora)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)
    return model


def fit(embedder, config, *, out, tokens, q, on_step):
    """The training loop -> facts, which the checkpoint records."""
    model, tok, device = embedder.model, embedder.tok, config.device
    before, after = embedder.before, embedder.after
    H, B, lengths = head(model), min(config.batch_size, len(tokens)), tokens.lengths + len(before + after)
    T = int(lengths.max())                                             # lengths (N,): with the question
    budget = config.micro_batch * (config.max_length + len(before + after))        # tokens of a micro-batch
    params = [p for p in model.parameters() if p.requires_grad]
    is_simcse = config.method == "simcse"
    # the loss of the best prediction that ignores the text: simcse: a guess among B; mntp: token frequencies
    constant_loss = q.constant_loss if q else (math.log(B) if is_simcse else token_entropy(tokens, tok))
    must_stay = folders.identity(config) | {        # for --resume; of own targets, only this loss is compared
        "tokenizer": tokenizer_hash(tok),
        "texts of the corpus": tokens.hash, "the loss that ignores the text": round(constant_loss, 3)}

    # model stays in eval mode, as it was loaded: no dropout (simcse switches its own on)
    def forward(ids, mask):                                            # (b,T), (b,T) -> x (b,T,C), h (b,C)
        # without the second context, peft casts to float32 and autocast casts back: a quarter slower
        with (torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"),
              disable_input_dtype_casting(model)):
            x = hidden_states(model, ids, mask)
        return x, pool(x, mask, config.pooling)

    optimizer = torch.optim.AdamW(params, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    run = folders.load_state(out, must_stay, model, optimizer, resume=config.resume)
    if run is None:
        run = {"step": 0, "seconds": 0.0, "scale": 1.0, "losses": []}
        if q:
            # OURS: s is measured on the first 128 texts of training that have targets
            order = epoch_permutation(config.seed, 0, len(tokens))
            some = order[np.isin(order, q.texts[(q.indices >= 0).any(1)])][:128]                     # (n,)
            h = embedder.pooled([tokens[n] for n in some], config.micro_batch).to(device)            # (n,C)
            run["scale"] = processes.same(measure_scale(h, H, *(a.to(device) for a in q.of(some))))
    embedder.scale, first_step = run["scale"], run["step"]
    earlier, started = run["seconds"], time.time()                     # seconds of interrupted runs; time now
    print(f"{sum(p.numel() for p in params):,} weights learn, rate {config.lr:g}, {config.attention}, "
          f"s = {embedder.scale:g}; {len(tokens):,} texts, {config.steps} steps of {B}; {config.dtype} on "
          f"{device}, loss by {config.impl}", flush=True)
    print(memory.of_step(forward, H, model, optimizer=optimizer, T=T, at_once=budget // T, config=config),
          flush=True)

    log = folders.open_log(out, "a" if first_step else "w")
    bar = tqdm(total=config.steps * B, initial=first_step * B, unit=" texts", desc="train",
               disable=bool(RANK))
    with folders.between_steps() as interrupted, log, bar:          # Ctrl-C appends to `interrupted`
        while run["step"] < config.steps:
            torch.manual_seed(config.seed * 1_000_003 + run["step"] + RANK * 10**9)    # the same if resumed
            # simcse tells the texts of a batch apart: it gets mixed lengths, or it could learn length alone
            texts = bucketed_batch(run["step"], config.seed, lengths, B, bucket=1 if is_simcse else BUCKET)
            texts = processes.mine(texts)               # (n,) by torchrun: the share of this process
            size = budget // lengths[texts].max()                      # texts of a micro-batch
            batch = [pad(ask([tokens[n] for n in part], before, after), tok.pad_token_id, device)
                     for part in blocks(texts, size)]                  # list of ids, mask (b,T)
            if is_simcse:
                losses = simcse(batch, forward, model)
            elif config.method == "mntp":
                losses = mntp(batch, forward, H, tok)
            else:
                indices, probs = (a.to(device) for a in q.of(texts))                                 # (n,K)
                losses = target_loss(batch, forward, H, embedder.scale, indices=indices, probs=probs,
                                     impl=config.impl)
            loss = 0.0
            for of_part in losses:                        # one for each micro-batch (simcse: one)
                of_part.backward()
                loss += of_part.item()
            processes.sum_gradients(params)
            loss, stop = processes.total(torch.tensor([loss, len(interrupted)], dtype=torch.float64)).tolist()
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
            if not math.isfinite(loss + norm):
                raise Error(f"step {run['step']}: loss {loss}, gradient norm {norm}: start again with a "
                            f"lower --lr (now {config.lr:g}), or --dtype float32")
            optimizer.param_groups[0]["lr"] = lr = learning_rate(run["step"], config.steps, config.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run |= {"step": run["step"] + 1, "seconds": earlier + time.time() - started,
                    "losses": [*run["losses"], loss][-BUCKET:]}        # as many steps as a bucket has
            log.write(json.dumps({"step": run["step"], "loss": loss, "constant_loss": constant_loss,
                                  "lr": lr, "grad_norm": norm,
                                  "seconds": round(run["seconds"], 1)}) + "\n")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(B)
            if on_step and not RANK:
                on_step(run["step"], embedder)
            if stop or run["step"] == config.steps or run["step"] % config.save_every == 0:
                folders.save_state(out, must_stay, model, optimizer, run=run)
            if stop and run["step"] < config.steps:
                raise KeyboardInterrupt(f"stopped after step {run['step']}: the same command with --resume "
                                        f"{'in place of --overwrite ' * config.overwrite}goes on")
    return {"loss": np.mean(run["losses"]).item(),                     # of the last 16 steps
            "constant_loss": constant_loss, "texts": len(tokens), "texts_seen": config.steps * B,
            "train_seconds": round(run["seconds"], 1), "earlier_seconds": earlier, "corpus_hash": tokens.hash}


def finish(out, embedder, config, *, lit_before, began, loss=None, **facts):
    """Write the checkpoint; show the tokens that texts light up, and lit up before training."""
    lit = embedder.top_tokens(EXAMPLES, 8)
    facts |= {"loss": loss, "config": asdict(config), "scale": embedder.scale,
              "max_length": embedder.max_length, "backbone": origin(config.backbone),
              "seconds": round(time.time() - began, 1), "threads": torch.get_num_threads()}
    folders.save(out, embedder, config, facts)
    line = lambda row: "  ".join(token for token, _ in row)
    for text, old, new in zip(EXAMPLES, lit_before, lit):
        print(f"{text}\n    before   {line(old)}\n    after    {line(new)}")
    if loss is not None:
        print(f"\ntraining: loss {loss:.3f} nats (best prediction that ignores the text: "
              f"{facts['constant_loss']:.3f}), {facts['train_seconds']:.0f} s of {facts['seconds']:.0f} s")
    print(f"{config.out}/ is ready:  SentenceTransformer({config.out!r})  or  python eval.py {config.out}")


def train(config, targets=None, on_step=None):
    """Train, write the checkpoint to config.out, return its path (None with show_targets). For experiments:

    targets: function(list of n id arrays) -> indices (n,k), probs (n,k), 0 < k <= top_k, in place of the
             method's; rows of probs sum to 1, or to 0: no target
    on_step: function(step, embedder), called after every step"""
    began, given = time.time(), checked(config)
    config = settle(given)
    processes.connect(config.device)
    if targets and config.method not in WITH_TARGETS:
        raise Error(f"targets: expected --method {', '.join(WITH_TARGETS)}, got {config.method}")
    out = None if config.show_targets else folders.start(config)
    dtype, trains = getattr(torch, config.dtype), config.method != "none"

    # ---- words and targets, by the backbone as it was pretrained
    with processes.first_alone():                                      # the others read what it has cached
        model, tok = load_backbone(config.backbone, "causal", dtype)
        model.to(config.device)
        set_prompt(tok, config.prompt)
        V, length_in_use = len(head(model).weight), usable_length(model, tok, config.backbone, config)
        words, own = read_vocabulary(tok, V), targets and own_targets(targets, config.top_k, V)
        tokens = tokenize_corpus(config.corpus, tok, config.max_length) if trains else None
        if config.show_targets:
            return show_targets(config, tokens, words, model=model, tok=tok, own=own)
        q = (build_targets(config, tokens, words, model=model, tok=tok, own=own)
             if config.method in WITH_TARGETS else None)
    # the backbone as it was pretrained (s = 1), with --init too
    lit_before = Embedder(model, tok, config.pooling, length_in_use).top_tokens(EXAMPLES, 8)

    # ---- the embedder: loaded again (--init, --attention); weights that learn are float32
    start, option = config.init or config.backbone, "--init" if config.init else "--backbone"
    lora = trains and config.lora_rank > 0
    del model                                                          # never two in memory
    model, its_tok = load_backbone(start, config.attention, dtype if lora else torch.float32, option)
    model.to(config.device)
    if len(head(model).weight) != V or its_tok.get_vocab() != tok.get_vocab():
        raise Error(f"--init: expected a checkpoint made from {config.backbone}, got another vocabulary")
    length_in_use = min(length_in_use, usable_length(model, tok, start, config))
    embedder, facts = Embedder(model, tok, config.pooling, length_in_use), {}

    # ---- training, and what the texts of the corpus have in common
    if trains:
        make_trainable(model, config.lora_rank, config.seed)
        if config.grad_checkpointing:
            memory.recompute_layers(model)
        facts = fit(embedder, config, out=out, tokens=tokens, q=q, on_step=on_step)
        embedder.mean = embedder.pooled(random_texts(tokens, config.seed)).mean(0)                   # (C,)
    if RANK:                                                           # the first process writes
        return processes.finished(config.out)
    if lora:    # under the adapters, weights were rounded to dtype: merge into float32 weights instead
        learned = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
        model = embedder.model = None
        model = load_backbone(start, config.attention)[0]
        adapted = make_trainable(model, config.lora_rank, config.seed)
        if unknown := model.load_state_dict(learned, strict=False).unexpected_keys:
            raise RuntimeError(f"adapters that do not fit the backbone loaded again: {unknown[0]}")
        embedder.model = adapted.merge_and_unload()
    began -= facts.pop("earlier_seconds", 0)         # training time of interrupted runs counts
    finish(out, embedder, config, lit_before=lit_before, began=began, command=command_line(given),
           custom_targets=targets is not None, **facts)
    return processes.finished(config.out)


if __name__ == "__main__":
    run_command(train, CONFIG)
