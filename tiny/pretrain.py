"""Pretrain tiny/, the small Llama that Text2Token trains by default, from a folder of English text alone.

    python tiny/pretrain.py CORPUS --out runs/tiny    # 2 CPU cores: hours; GPU: minutes; killed? add --resume

CORPUS is a folder of *.jsonl.gz files, one {"text", "source"} object a line; val.jsonl.gz in it is held back.
Four steps, each kept on disk, so that a second start goes on where the first one stopped:

    1. tokenizer   byte-level BPE, 16,384 entries, a space before every text: one spelling a word
    2. rows        <s> text </s> <s> text </s> ... packed into rows of T = 512; attention never crosses a text
    3. embedding   the tied input/output table E (V,C) starts as spectral factors of word co-occurrence
    4. training    next-token cross-entropy, AdamW, warm-up and cosine

Why step 3: two CPU cores see a tenth of the corpus through the model in an hour, but can *count* all of it in
a minute. E E^T ~ log p(v,w)/(p(v)p(w)) is what word2vec converges to (Levy & Goldberg 2014); the Llama starts
from it.

B rows   T tokens   C width   V vocabulary
"""
import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2


def passages(path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        yield from map(json.loads, f)


# ----------------------------------------------------------------------------------------------- 1. tokenizer
def train_tokenizer(shards, V):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),        # numbers are spelled, never words of their own
        pre_tokenizers.ByteLevel(add_prefix_space=True)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        (r["text"] for s in shards for r in passages(s)),
        trainers.BpeTrainer(vocab_size=V, special_tokens=["<pad>", "<s>", "</s>"], min_frequency=2,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # A text is <s> text; no </s>: an embedder reads the text, it does not end it.
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   padding_side="right", model_max_length=512)


# ---------------------------------------------------------------------------------------------------- 2. rows
def tokenize(tok, texts, chunk=10_000):
    """texts -> one long uint16 array: <s> a b c </s> <s> d e </s> ..."""
    out = []
    for i in tqdm(range(0, len(texts), chunk), desc="tokenize"):
        for e in tok._tokenizer.encode_batch(texts[i:i + chunk]):
            out.append(np.array(e.ids + [EOS], dtype=np.uint16))
    return np.concatenate(out)


def row(tokens, T, i):
    """Row i: ids (T+1,), and which text each position belongs to (T+1,)."""
    ids = torch.from_numpy(tokens[i * T: i * T + T + 1].astype(np.int64))
    return ids, (ids == BOS).cumsum(0)


def batch(tokens, T, rows, device):
    """-> inputs (B,T), targets (B,T), -100 across a text's end, place in its text (B,T), mask (B,1,T,T)"""
    ids, doc = map(torch.stack, zip(*(row(tokens, T, i) for i in rows)))
    x, y, d = ids[:, :-1], ids[:, 1:].clone(), doc[:, :-1]
    y[x == EOS] = -100                                              # <s> after </s> is no prediction
    at = torch.arange(T)
    first = torch.where(x == BOS, at, 0).cummax(1).values
    mask = (d[:, :, None] == d[:, None, :]) & (at[:, None] >= at[None, :])
    return [t.to(device) for t in (x, y, at - first, mask[:, None])]


# ----------------------------------------------------------------------------------------------- 3. embedding
def spectral_embedding(tokens, V, C, window=5, smooth=0.75, std=0.02):
    """E (V,C) = U S^(1/2) of the positive pointwise mutual information of words at most `window` apart."""
    n = np.zeros(V * V, np.float32)
    doc = (tokens == BOS).cumsum()
    ids = tokens.astype(np.int64)
    for d in range(1, window + 1):                                  # a neighbour at distance d counts 1/d
        same = (doc[d:] == doc[:-d]) & (ids[:-d] > EOS) & (ids[d:] > EOS)
        np.add.at(n, (ids[:-d] * V + ids[d:])[same], np.float32(1 / d))
    n = torch.from_numpy(n).view(V, V)
    n = n + n.T
    p = n.sum(1)
    q = p.clamp_min(1e-9) ** smooth                  # flattened context counts: rare words are not overrated
    n.mul_(q.sum()).div_(p.clamp_min(1e-9)[:, None]).div_(q[None, :])
    n = n.clamp_min_(1).log_()
    U, S, _ = torch.svd_lowrank(n, q=C + 32, niter=3)
    E = U[:, :C] * S[:C].sqrt()
    E -= E[p > 0].mean(0)                                         # softmax ignores a constant; cosines do not
    E[p == 0] = 0
    E *= std / E[p > 0].std()
    return E + torch.randn(V, C) * std * (p == 0)[:, None]


# ------------------------------------------------------------------------------------------------ 4. training
def loss_sum(model, x, y, pos, mask):
    """Summed next-token cross-entropy (nats) and number of predictions, logits a micro-batch at a time."""
    out = model.model(input_ids=x, position_ids=pos, attention_mask=mask, use_cache=False)
    h, keep = out.last_hidden_state, y != -100                      # (B,T,C), (B,T)
    return F.cross_entropy(model.lm_head(h[keep]).float(), y[keep], reduction="sum"), int(keep.sum())


@torch.no_grad()
def validate(model, tok, path, T, device, limit):
    """Mean loss per token, for each source and over all, on the first `limit` characters of a source."""
    by = {}
    for r in passages(path):
        s = r["source"].split("/")[0]
        if sum(map(len, by.setdefault(s, []))) < limit:
            by[s].append(r["text"])
    total, out = [0.0, 0], {}
    for s, texts in sorted(by.items()):
        a = np.concatenate([np.array(e.ids + [EOS], np.uint16) for e in tok._tokenizer.encode_batch(texts)])
        a = np.concatenate([a, np.full(-(len(a) - 1) % T, EOS, np.uint16)])
        L, n = 0.0, 0
        for i in range(0, (len(a) - 1) // T, 4):
            b = batch(a, T, range(i, min(i + 4, (len(a) - 1) // T)), device)
            l, k = loss_sum(model, *b)
            L, n = L + l.item(), n + k
        out[s] = round(L / n, 4)
        total = [total[0] + L, total[1] + n]
    return dict(out, all=round(total[0] / total[1], 4))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("corpus", type=Path)
    p.add_argument("--out", type=Path, default=Path("runs/tiny"))
    p.add_argument("--vocab", type=int, default=16384)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--ffn", type=int, default=1024)
    p.add_argument("--length", type=int, default=512, help="tokens in a row")
    p.add_argument("--batch", type=int, default=4, help="rows in a step")
    p.add_argument("--micro", type=int, default=4, help="rows at a time")
    p.add_argument("--tokens", type=float, default=20e6, help="tokens to train on")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=50, help="steps")
    p.add_argument("--init", choices=["spectral", "random"], default="spectral", help="the embedding's start")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--save-every", type=int, default=100, help="steps")
    p.add_argument("--resume", action="store_true")
    a = p.parse_args()
    T, V, device = a.length, a.vocab, "cuda" if torch.cuda.is_available() else "cpu"
    shards = sorted(s for s in a.corpus.glob("*.jsonl.gz") if s.name != "val.jsonl.gz")
    if not shards:
        raise SystemExit(f"pretrain.py: expected *.jsonl.gz files in {a.corpus}, found none")
    a.out.mkdir(parents=True, exist_ok=True)

    if not (a.out / "tokenizer.json").exists():
        train_tokenizer(shards, V).save_pretrained(a.out)
    tok = PreTrainedTokenizerFast.from_pretrained(a.out)
    if not (a.out / "tokens.npy").exists():
        texts = [r["text"] for s in shards for r in passages(s)]
        np.save(a.out / "tokens.npy", tokenize(tok, texts))
    tokens = np.load(a.out / "tokens.npy", mmap_mode="r")
    torch.manual_seed(a.seed)
    if a.init == "spectral" and not (a.out / "embedding.pt").exists():
        torch.save(spectral_embedding(np.asarray(tokens), V, a.width), a.out / "embedding.pt")

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=a.width // 64,
        num_key_value_heads=a.width // 64, intermediate_size=a.ffn, max_position_embeddings=T,
        rms_norm_eps=1e-6, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS)).to(device)
    if a.init == "spectral":
        model.model.embed_tokens.weight.data.copy_(torch.load(a.out / "embedding.pt"))
    # Adam moves every weight by about lr a step, whatever the gradient: at the matrices' rate it would
    # overwrite the counted embedding (std 0.02) within ten steps, so E gets a tenth of it.
    E, E_scale = model.model.embed_tokens.weight, 0.1 if a.init == "spectral" else 0.5
    matrices = [w for w in model.parameters() if w.ndim == 2 and w is not E]
    gains = [w for w in model.parameters() if w.ndim == 1]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1, "scale": 1.0},
                             {"params": gains, "weight_decay": 0.0, "scale": 1.0},
                             {"params": [E], "weight_decay": 0.0, "scale": E_scale}],
                            lr=a.lr, betas=(0.9, 0.95), fused=True)
    steps = math.ceil(a.tokens / (a.batch * T))
    n_rows = (len(tokens) - 1) // T
    start, seconds, state = 0, 0.0, a.out / "state.pt"
    if a.resume and state.exists():
        s = torch.load(state, map_location=device)
        model.load_state_dict(s["model"])
        opt.load_state_dict(s["opt"])
        start, seconds = s["step"], s["seconds"]
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters, {len(tokens):,} tokens in "
          f"{n_rows:,} rows, {steps} steps of {a.batch * T} tokens on {device}")

    def save(step):
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step,
                    "seconds": seconds + time.time() - t0}, str(state) + ".new")
        os.replace(str(state) + ".new", state)

    # The order of rows depends on (seed, epoch) alone, so a resumed run sees what an uninterrupted one would.
    order = {}
    rows_of = lambda k: [order.setdefault(e, np.random.default_rng((a.seed, e)).permutation(n_rows))[j]
                         for i in range(k * a.batch, (k + 1) * a.batch) for e, j in [divmod(i, n_rows)]]
    t0, log = time.time(), open(a.out / "log.jsonl", "a")
    for k in (bar := tqdm(range(start, steps), initial=start, total=steps, mininterval=5)):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * k / steps)) / 2
        for g in opt.param_groups:
            g["lr"] = a.lr * g["scale"] * min((k + 1) / a.warmup, cosine)
        x, y, pos, mask = batch(tokens, T, rows_of(k), device)
        n, L = int((y != -100).sum()), 0.0
        for m in range(0, a.batch, a.micro):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                l, _ = loss_sum(model, *(t[m:m + a.micro] for t in (x, y, pos, mask)))
            (l / n).backward()
            L += l.item() / n
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(L + norm):
            raise SystemExit(f"pretrain.py: loss {L} at step {k}: lower --lr")
        opt.step()
        opt.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{L:.3f}", norm=f"{norm:.2f}")
        log.write(json.dumps({"step": k, "loss": round(L, 4), "norm": round(norm, 3),
                              "s": round(time.time() - t0, 1)}) + "\n")
        log.flush()
        if (k + 1) % a.save_every == 0:
            save(k + 1)
    save(steps)
    seconds += time.time() - t0

    model.eval().to(torch.bfloat16).save_pretrained(a.out)
    val = validate(model.float(), tok, a.corpus / "val.jsonl.gz", T, device, 200_000)
    (a.out / "pretrain.json").write_text(json.dumps(
        {"args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "corpus"},
         "steps": steps, "tokens_seen": steps * a.batch * T, "seconds": round(seconds), "device": device,
         "torch": torch.__version__, "threads": torch.get_num_threads(),
         "validation_loss": val}, indent=1) + "\n")
    print(json.dumps(val, indent=1))


if __name__ == "__main__":
    main()
