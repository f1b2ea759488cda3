"""The comparison: token targets against contrastive learning, one backbone, as many texts read.

    python experiments/compare.py --data-dir DIR                        # all runs, three seeds; resumes
    python experiments/compare.py --data-dir DIR --only data --seeds 1  # one run of the table
    python experiments/compare.py --data-dir DIR --tune                 # the trials on validation splits
    python experiments/compare.py --data-dir DIR --curves               # quality and key words while training

A trained run is one call of t2t.train a stage; stages follow one another through --init, each with an even
share of the number of texts, drawn anew for each stage. An untrained baseline is a function of
experiments/untrained.py. Every vector is scored raw, which is h, and half whitened (by 2,048 texts of the
corpus): no method wins by a step that helps all of them. tf-idf, of V dimensions, is scored raw only. encode
divides h by its length; this matters in Banking77 alone, whose logistic regression sees the length. Test
splits are scored with the settings of RUNS. --tune compares them with others, on validation splits and raw
vectors. Runs are kept in --runs, the tables beside them; --publish puts them in results/.
"""
import argparse
import gzip
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import mteb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import rankdata, spearmanr, ttest_ind  # noqa: E402
from scipy.stats import t as t_distribution  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import ndcg_score  # noqa: E402
from sklearn.metrics.pairwise import paired_cosine_distances  # noqa: E402
from sklearn.preprocessing import normalize  # noqa: E402

import eval as evaluation  # noqa: E402
import t2t  # noqa: E402
from analyze import bars, key_alignment, sample  # noqa: E402
from plumbing.cache import hash_of, write_json, write_whole  # noqa: E402
from plumbing.cli import Error  # noqa: E402
from plumbing.corpus import set_prompt, tokenize_corpus  # noqa: E402
from untrained import NAMES, Function, untrained  # noqa: E402

STS = ["STS12", "STS13", "STSBenchmark"]
SPLITS = ["STSBenchmark validation", "Banking77 train", "SciFact train"]
CONTRAST = dict(method="simcse", batch_size=32, lr=1e-3)
PREDICT = dict(method="mntp", batch_size=32, lr=3e-4)
WORDS = dict(method="data", batch_size=32, lr=1e-3)
MODEL = dict(method="model", batch_size=32, lr=1e-3)
BOTH = dict(method="both", batch_size=32, lr=1e-3)
ASKED = dict(pooling="last", attention="causal", prompt=t2t.Config.prompt)
AVERAGE = dict(pooling="mean", attention="bidirectional")              # for mntp, which refuses a question
MEAN = AVERAGE | dict(prompt="{}")                                     # no question
RUNS = {                                               # name -> for each stage, settings of t2t.Config
    "simcse": [CONTRAST | ASKED],
    "data": [WORDS | ASKED],
    "model": [MODEL | ASKED],
    "both": [BOTH | ASKED],
    "simcse, mean": [CONTRAST | MEAN],
    "mntp, simcse": [PREDICT | AVERAGE, CONTRAST | MEAN],              # LLM2Vec's unsupervised recipe
    "data, mean": [WORDS | MEAN],
    "model, mean": [MODEL | MEAN],
    "both, mean": [BOTH | MEAN],
}
TRIALS = {                                             # what was chosen, and why: results/details.md
    **RUNS,
    "data, model, mean": [WORDS | MEAN, MODEL | MEAN],
    "both, last, no question": [BOTH | MEAN | dict(pooling="last")],
    **{f"both, mean, {what}": [BOTH | MEAN | settings] for what, settings in {
        "rate 0.0005": dict(lr=5e-4), "rate 0.002": dict(lr=2e-3), "K 16": dict(top_k=16),
        "K 256": dict(top_k=256), "temperature 0.5": dict(temperature=0.5),
        "temperature 2": dict(temperature=2), "rank 4": dict(lora_rank=4), "rank 64": dict(lora_rank=64),
        "all weights": dict(lora_rank=0, lr=2e-4), "batch 64": dict(batch_size=64)}.items()},
    **{f"simcse, mean, batch {B}, rate {lr:g}": [CONTRAST | MEAN | dict(batch_size=B, lr=lr)]
       for B, lr in ((128, 3e-4), (32, 3e-4), (32, 2e-3), (16, 3e-4), (16, 1e-3))},
    "mntp, simcse, rate 0.0003": [PREDICT | AVERAGE, CONTRAST | MEAN | dict(lr=3e-4)],
    "mntp, simcse, batches 64, 128, rate 0.0003": [PREDICT | AVERAGE | dict(batch_size=64),
                                                   CONTRAST | MEAN | dict(batch_size=128, lr=3e-4)],
}
CLAIMS = [(one, x) for one in ("both", "both, mean") for x in (*NAMES, *RUNS)
          if x not in ("both", one)]


KEPT = ("command", "loss", "constant_loss", "texts_seen", "seconds", "versions", "corpus_hash")


def commit_of(folders):
    """Of this code, "-dirty" if any has been changed since; None outside a git checkout, and where one of the
    folders stands already, perhaps by other code."""
    if any(folder.exists() for folder in folders):
        return None
    git = lambda line: subprocess.run(line.split(), cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        return git("git rev-parse --short HEAD") + "-dirty" * bool(git("git status -s *.py csrc")) or None
    except OSError:                                    # no git
        return None


# -------------------------------------------------------------------------------------------------- one run
def place(name, seed, a):
    return Path(a.runs) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def places(name, stages, seed, a):
    """The folders of a run, one a stage; the last is the run's own."""
    return [place(f"{name} stage {n}", seed, a) for n in range(1, len(stages))] + [place(name, seed, a)]


def train(name, stages, seed, a, watch=None):
    """The Embedder of a run and its folder, trained unless it stands in --runs."""
    before = None
    for stage, (folder, settings) in enumerate(zip(places(name, stages, seed, a), stages)):
        config = t2t.Config(backbone=a.backbone, corpus=a.corpus, max_length=a.max_length, init=before,
                            out=str(folder), seed=seed + 1000 * stage,     # so other texts
                            resume=(folder / "state" / "last.pt").exists(),
                            steps=a.texts // len(stages) // settings["batch_size"], save_every=100,
                            **settings)
        if not (folder / "t2t.json").exists():
            t2t.train(config, None, watch)
        made = json.loads((folder / "t2t.json").read_text())["config"]
        used = t2t.settle(config)
        free = "resume", "impl", "out", "init"         # folders may move
        other = {k: v for k, v in made.items() if k not in free and v != getattr(used, k)}
        if other:
            raise Error(f"--runs: expected {config} in {folder}, got {other}: pass another")
        before = str(folder)
    return t2t.Embedder.load(folder), folder


def whitening_matrix(h, power=0.5, ridge=0.01):
    """h (N,C) -> W (C,C) float32, symmetric: h W spreads more evenly over the directions that h uses.

        u = h / |h|,     S = mean_n u_n u_n^T divided by its mean eigenvalue,     W = (S + ridge I)^(-power/2)

    Half whitening; power 1 (arXiv 2103.15316) makes all directions alike. The mean direction has
    half of the sum of squares (SmolLM2) and dominates every cosine. S is not centred, so W shrinks it too.
    Fewer than 4 C texts give a noisy S: then the ridge is 4 C / N times as large."""
    u, (N, C) = torch.nn.functional.normalize(h.double(), dim=1), h.shape
    eigenvalues, E = torch.linalg.eigh(u.T @ u / N)
    eigenvalues = eigenvalues.clamp_min(0) / eigenvalues.mean() + ridge * max(1, 4 * C / N)
    return (E * eigenvalues ** (-power / 2) @ E.T).float()


def once(read):
    """read, each text once: both columns and all tasks share vectors."""
    kept = {}

    def reading(texts):
        new = list(dict.fromkeys(t for t in texts if t not in kept))
        kept.update(zip(new, read(new).astype(np.float32) if new else ()))
        return np.stack([kept[t] for t in texts])
    return reading


def reader(embedder, folder):
    """A checkpoint -> function(list of n texts) -> h (n,C), and what its t2t.json says."""
    made = json.loads((folder / "t2t.json").read_text())
    embedder.model.to(getattr(torch, made["config"]["dtype"]))         # as it was trained: twice as fast
    return once(lambda texts: embedder.pooled(embedder.token_ids(texts)).numpy()), made


def cosines(read, one, two):
    """As mteb: from the distance of unit vectors, so that two zero vectors are alike and zero and another
    half alike. (tf-idf gives zeros where a text has stop words alone.)"""
    return 1 - paired_cosine_distances(read(one), read(two))


def score(read, tasks):
    """-> {task: main score x 100}, {STS task: (cosines, gold)}: the items that the bootstrap draws from"""
    scores, items = {}, {}
    for task in tasks:
        name = task.metadata.name
        task.load_data()                               # once: unload_data would forget that it is local
        if name in STS:                                # as mteb does it (tests/test_compare.py), items kept
            rows = task.dataset["test"]
            gold = np.array(rows["score"], np.float32)
            items[name] = cosines(read, rows["sentence1"], rows["sentence2"]), gold
            scores[name] = 100 * spearmanr(*items[name]).statistic
        else:
            found = mteb.evaluate(Function("run", read), [task], cache=None, co2_tracker=False,
                                  show_progress_bar=False)
            scores[name] = 100 * found.task_results[0].get_score()
    return {k: round(float(v), 2) for k, v in scores.items()}, items


def read_run(file, a):
    """What `run` has kept -> facts, {vectors/task: (2,n) cosines and gold}; Error if it is another run."""
    arrays = dict(np.load(file))
    facts = json.loads(str(arrays.pop("facts")))
    same = {"settings": RUNS.get(facts["name"]), **ground(a)}
    if other := {k: facts.get(k) for k, v in same.items() if facts.get(k) != v}:
        raise Error(f"--runs: expected {({k: same[k] for k in other})} in {file}, got {other}: pass another")
    return facts, arrays


def run(name, seed, tasks, a, *, baselines, some):
    """Train and score one run, unless it stands in --runs; write it there."""
    file = place(name, seed, a).with_suffix(".npz")
    kept, arrays = {"name": name, "seed": seed, "settings": RUNS.get(name), **ground(a), "scores": {}}, {}
    if file.exists():
        kept, arrays = read_run(file, a)
    missing = [t for t in tasks if t.metadata.name not in kept["scores"].get("raw", {})]
    if not missing:
        return
    t0, facts = time.time(), {}
    if name in baselines:
        read = once(baselines[name])
    else:
        here = commit_of(places(name, RUNS[name], seed, a))
        read, made = reader(*train(name, RUNS[name], seed, a))
        facts = {k: made[k] for k in KEPT if k in made} | {"commit": here}
    readings = {"raw": read}
    if name != "tf-idf":                               # V dimensions are not whitened
        W = whitening_matrix(torch.from_numpy(read(some))).numpy()
        readings["whitened"] = lambda texts: read(texts) @ W
    for how, reading in readings.items():
        scores, items = score(reading, missing)
        kept["scores"].setdefault(how, {}).update(scores)
        arrays |= {f"{how}/{t}": np.stack(x).astype(np.float32) for t, x in items.items()}
        print(f"{name} (seed {seed}), {how}:", scores, flush=True)
    kept |= facts | {"evaluation_seconds": round(time.time() - t0)}
    beside = file.with_suffix(".partial")              # no name that report would read
    with open(beside, "wb") as f:
        np.savez_compressed(f, **arrays | {"facts": json.dumps(kept)})
    beside.rename(file)


# --------------------------------------------------------------------------------------------------- tuning
def validation(data_dir):
    """-> function(read) -> {split: score x 100}, of splits on which settings may be chosen: STSBenchmark
    validation (Spearman); Banking77 train (logistic regression, 8 texts a label, accuracy on 1,200 others);
    SciFact train (nDCG@10, 200 queries, their documents and 300 others)"""
    rows = lambda path: [json.loads(line) for line in gzip.open(Path(data_dir, "mteb", path), "rt")]
    pairs, bank = rows("stsbenchmark-sts/validation.jsonl.gz"), rows("banking77/train.jsonl.gz")
    label, order = np.array([r["label"] for r in bank]), np.random.default_rng(0).permutation(len(bank))
    fitted = np.concatenate([order[label[order] == k][:8] for k in np.unique(label)])
    others = np.random.default_rng(0).permutation(np.setdiff1d(order, fitted))[:1200]

    relevant = {}                                      # query -> its documents
    for r in rows("scifact/qrels/train.jsonl.gz"):
        relevant.setdefault(str(r["query-id"]), set()).add(str(r["corpus-id"]))
    document = {r["_id"]: f"{r.get('title', '')} {r['text']}".strip()
                for r in rows("scifact/corpus.jsonl.gz")}
    text = {r["_id"]: r["text"] for r in rows("scifact/queries.jsonl.gz")}
    rng = np.random.default_rng(0)
    queries = list(rng.permutation(sorted(relevant))[:200])
    found = set().union(*(relevant[q] for q in queries))
    documents = sorted(found) + list(rng.permutation(sorted(set(document) - found))[:300])
    hit = np.array([[d in relevant[q] for d in documents] for q in queries], float)  # (queries,docs)

    def scores(read):
        sts = spearmanr(cosines(read, [r["sentence1"] for r in pairs], [r["sentence2"] for r in pairs]),
                        [r["score"] for r in pairs]).statistic
        x, y = (normalize(read([bank[n]["text"] for n in some])) for some in (fitted, others))
        accuracy = LogisticRegression().fit(x, label[fitted]).score(y, label[others])
        similarity = (normalize(read([text[q] for q in queries]))
                      @ normalize(read([document[d] for d in documents])).T)
        found = sts, accuracy, ndcg_score(hit, similarity, k=10)
        return {k: round(100 * float(v), 2) for k, v in zip(SPLITS, found)}
    return scores


def tune(a):
    """Train and score the trials that --runs does not have yet, then write their table."""
    file, scores = Path(a.runs) / "trials.jsonl", validation(a.data_dir)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = [d for d in done if d.get("ground") == ground(a)]
    for seed, name in itertools.product(a.seeds, a.only or TRIALS):
        if any((d["name"], d["seed"], d["settings"]) == (name, seed, TRIALS[name]) for d in done):
            continue
        t0, here = time.time(), commit_of(places(f"trial {name}", TRIALS[name], seed, a))
        read, made = reader(*train(f"trial {name}", TRIALS[name], seed, a))
        done.append({"name": name, "seed": seed, "settings": TRIALS[name], "ground": ground(a),
                     "raw": scores(read), "commit": here, **without_folders({k: made[k] for k in KEPT}),
                     "all_seconds": round(time.time() - t0)})
        with open(file, "a") as f:
            f.write(json.dumps(done[-1]) + "\n")
        print(name, seed, done[-1]["raw"], flush=True)
        for stage in places(f"trial {name}", TRIALS[name], seed, a):
            shutil.rmtree(stage)
    splits = " | ".join(SPLITS)
    text = [f"Validation splits, {a.texts:,} texts of {Path(a.corpus).name}, up to {a.max_length} tokens, a "
            "run; scores x 100, means over seeds", "",
            f"| | seeds | {splits} | mean | of each seed |", "|---|---:|" + "---:|" * (len(SPLITS) + 2)]
    for name in TRIALS:
        found = [d for d in done if d["name"] == name and d["settings"] == TRIALS[name]]
        if not found:
            continue
        table = np.array([list(d["raw"].values()) for d in found])                         # (seeds,splits)
        cells = [name, str(len(found)), *(f"{x:.1f}" for x in (*table.mean(0), table.mean())),
                 "  ".join(f"{x:.1f}" for x in table.mean(1))]
        text.append(f"| {' | '.join(cells)} |")
    out = str((ROOT / "results" if a.publish else Path(a.runs)) / f"trials-{Path(a.corpus).stem}-{a.texts}")
    write_json(Path(out + ".json"), done)
    write_whole(Path(out + ".md"), "\n".join(text) + "\n")
    print("\n".join(text))


# ---------------------------------------------------------------------------------------------------- curves
CURVES = {"both": ("Text2Token", "tab:green"), "simcse": ("SimCSE", "tab:blue")}
SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)      # of the texts, after which it is measured


def curves(a):
    """Train one run of each method, measured on the way; draw whether quality and key words rise together.

    Quality: Spearman of 500 pairs of STSBenchmark validation, x 100. Key words: of 500 texts of the corpus,
    the share of a text's n words that are among the n most probable (analyze.key_alignment), x 100."""
    path = Path(a.data_dir, "mteb", "stsbenchmark-sts", "validation.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt")][::3]
    file, seed = Path(a.runs) / f"curves-{a.seeds[0]}.json", a.seeds[0]
    facts = json.loads(file.read_text()) if file.exists() else {}
    same = lambda name: {"settings": RUNS[name], "ground": ground(a)}
    todo = [name for name in CURVES if {k: facts.get(name, {}).get(k) for k in same(name)} != same(name)]
    for folder in [place(name, seed, a) for name in todo]:
        if (folder / "t2t.json").exists():
            raise Error(f"--curves: expected to measure while training, but {folder} is trained: remove it, "
                        "or pass another seed")
    for name in todo:
        points, steps = [], a.texts // RUNS[name][0]["batch_size"]
        shutil.rmtree(place(name, seed, a), ignore_errors=True)    # points of an interrupted run are lost
        here = commit_of([])

        def measure(step, embedder):
            if step in {round(share * steps) for share in SHARES}:
                read = lambda texts: embedder.pooled(embedder.token_ids(texts))
                sts = spearmanr(cosines(read, *([r[f"sentence{n}"] for r in rows] for n in (1, 2))),
                                [r["score"] for r in rows]).statistic
                ids = sample(tokenize_corpus(a.corpus, embedder.tok, a.max_length), 500)
                key = key_alignment(embedder.logits(embedder.pooled(ids)), embedder.words, ids)
                points.append([step * a.texts // steps, round(100 * sts, 2), round(100 * key, 2)])
                print(name, points[-1], flush=True)
        measure(0, t2t.Embedder(*asked(a)))
        embedder, folder = train(name, RUNS[name], seed, a, measure)            # which `run` then scores
        made = json.loads((folder / "t2t.json").read_text())
        facts[name] = {**same(name), "seed": seed, "commit": here, "texts, STS, key words": points,
                       **without_folders({k: made[k] for k in KEPT})}
        if name == "both":
            facts[name]["tokens"] = [e.top_tokens(SHOWN, 8)[0] for e in (t2t.Embedder(*asked(a)), embedder)]
        write_json(file, facts)
    picture(facts, ROOT / "results" if a.publish else Path(a.runs), a)


def asked(a):
    """What training starts from: the backbone, its tokenizer with the question, the pooling"""
    model, tok = t2t.load_backbone(a.backbone, t2t.Config.attention)
    set_prompt(tok, t2t.Config.prompt)
    return model, tok, t2t.Config.pooling


SHOWN = ["She plays the violin in a small orchestra."]


def picture(facts, folder, a):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, *right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained",
                                       width_ratios=(1.6, 1, 1))
    for name, (label, colour) in CURVES.items():
        x, *lines = zip(*facts[name]["texts, STS, key words"])
        for y, style, what in zip(lines, ("-", "--"), ("STSBenchmark", "key words lit")):
            left.plot(x, y, style, color=colour, marker=".", label=f"{label}: {what}")
    low, high = left.get_ylim()                        # room for the legend
    left.set(title="while training", xlabel=f"texts read ({Path(a.corpus).stem})", ylabel="x 100",
             ylim=(low, high + 0.35 * (high - low)))
    left.legend(fontsize=8, loc="upper center", ncols=2, columnspacing=1)
    bars(right, *facts["both"]["tokens"])
    fig.suptitle(f"Quality and key words while training; the tokens that “{SHOWN[0]}” lights up",
                 parse_math=False)
    fig.savefig(folder / "curves.png", dpi=110)
    write_json(folder / "curves.json", facts)


# ---------------------------------------------------------------------------------------------------- tables
def pairs(tasks):
    """Loaded STS tasks -> {task: (n,) a number for each pair of texts}: the same pair has one in all tasks,
    whichever way round, in whatever case and punctuation."""
    found, plain = {}, lambda text: " ".join(re.findall(r"\w+", text.lower()))
    return {task.metadata.name: np.array([
        found.setdefault(tuple(sorted((plain(r["sentence1"]), plain(r["sentence2"])))), len(found))
        for r in task.dataset["test"]]) for task in tasks}


def difference(one, two, pair, draws=1000):
    """Mean Spearman(one) - mean Spearman(two), x 100 -> it, and its 95 % interval, over pairs and seeds.

    one, two: for each seed {task: (2,n) cosines and gold}; pair: {task: (n,)}, see pairs. Pairs: a bootstrap,
    in which a draw takes as many as there are, with replacement, the same for all tasks and both sides (ranks
    are those in the whole task). Seeds: s^2 / S of each side. The variances add up; Student's t, with the
    degrees of freedom of Welch and Satterthwaite, makes the interval. A side with one seed says nothing about
    others: then the interval is for that run."""
    rng, M = np.random.default_rng(0), 1 + max(p.max() for p in pair.values())
    times = rng.multinomial(M, np.full(M, 1 / M), draws).astype(float)                     # (draws,M)

    def spearman(run):
        """-> (draws + 1,) mean over tasks, last of all pairs, once each"""
        r = 0
        for t in pair:
            x, y = rankdata(run[t], axis=1)
            x, y = x / len(x) - 0.5, y / len(y) - 0.5
            w = np.vstack([times[:, pair[t]], np.ones(len(x))])                            # (draws + 1,n)
            w /= w.sum(1, keepdims=True)
            X, Y = w @ x, w @ y
            r = r + (w @ (x * y) - X * Y) / np.sqrt((w @ x**2 - X**2) * (w @ y**2 - Y**2)) / len(pair)
        return r
    a, b = (np.array([spearman(run) for run in runs]) for runs in (one, two))              # (S,draws + 1)
    parts = [((a.mean(0) - b.mean(0))[:-1].var(ddof=1), draws - 1)]                      # variance, freedom
    parts += [(r[:, -1].var(ddof=1) / len(r), len(r) - 1) for r in (a, b) if len(r) > 1]
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / max(1e-30, sum(v**2 / n for v, n in parts))
    half = t_distribution.ppf(0.975, max(1, freedom)) * variance**0.5
    mean = a[:, -1].mean() - b[:, -1].mean()
    return [round(100 * float(v), 2) for v in (mean, mean - half, mean + half)]


def without_folders(run):
    """A run's facts, the paths in its command by their last names alone"""
    return run | {"command": re.sub(r"/\S*/", "", run["command"])} if "command" in run else run


def interval(values):
    """mean and half the width of the 95 % interval of Student's t over seeds (None for one seed)"""
    x = np.array(values, float)
    half = t_distribution.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else None
    return round(float(x.mean()), 2), None if half is None else round(float(half), 2)


def ground(a):
    """What the runs of one table share."""
    return {"corpus": Path(a.corpus).name, "corpus_hash": a.corpus_hash, "texts": a.texts,
            "max_length": a.max_length, "backbone": Path(a.backbone).name}


def published_runs(name, new, old):
    """The runs of a row: new ones, and those that were published with the same settings and another seed."""
    seeds = {f["seed"] for f in new}
    kept = old.get("runs", []) if old.get("settings") == RUNS.get(name, "an untrained baseline") else []
    for run, now in itertools.product(kept, new):
        if now["seed"] == run["seed"] and (lost := set(run["scores"]["raw"]) - {"mean STS"}
                                           - set(now["scores"]["raw"])):
            raise Error(f"--publish: expected of {name}, seed {run['seed']}, all tasks that are in results/, "
                        f"got no {', '.join(sorted(lost))}: score them too (--tasks)")
    new = [without_folders({k: f[k] for k in ("seed", "scores", *KEPT, "commit") if k in f}) for f in new]
    return sorted([f for f in kept if f["seed"] not in seeds] + new, key=lambda f: f["seed"])


def row_of(name, runs):
    """A row of the table: the mean of each task over seeds, and half of its interval."""
    row = {"settings": RUNS.get(name, "an untrained baseline"),
           "seeds": [f["seed"] for f in runs if name in RUNS], "runs": runs}
    for how in ("raw", "whitened"):
        scores = [f["scores"][how] for f in runs if how in f["scores"]]
        for x in scores:                               # in place: claim_of reads it
            if set(STS) <= set(x):
                x["mean STS"] = round(float(np.mean([x[t] for t in STS])), 2)
        if scores:
            names = dict.fromkeys(k for x in scores for k in x)
            row[how] = {t: interval([x[t] for x in scores if t in x]) for t in names}
    return row


def claim_of(one, two, how, *, table, arrays, pair, old):
    """The difference between two rows: over pairs of texts and seeds, where those of all their runs are at
    hand; else as it was published of the same runs; else over seeds alone; or None."""
    way = lambda name: how if how in table[name] else "raw"            # tf-idf is not whitened
    claim = {"claim": f"{one} > {two}", "vectors": " > ".join(dict.fromkeys(map(way, (one, two)))),
             "seeds": [len(table[name]["runs"]) for name in (one, two)],
             "of": hash_of([[f["seed"], f["scores"]] for name in (one, two) for f in table[name]["runs"]])}
    items = [[{t: at[f"{way(name)}/{t}"] for t in STS} for at in arrays.get(name, [])
              if all(f"{way(name)}/{t}" in at for t in STS)] for name in (one, two)]
    if list(map(len, items)) == claim["seeds"]:
        return claim | {"mean STS": difference(*items, pair)}
    for c in old:
        if all(c.get(k) == claim[k] for k in claim):
            return c
    x, y = ([f["scores"][how]["mean STS"] for f in table[name]["runs"]
             if "mean STS" in f["scores"].get(how, {})] for name in (one, two))
    if min(len(x), len(y)) > 1:
        between = ttest_ind(x, y, equal_var=False).confidence_interval()
        return claim | {"seeds": [len(x), len(y)], "over": "seeds alone", "mean STS": [
            round(float(v), 2) for v in (np.mean(x) - np.mean(y), *between)]}


def report(a):
    """compare-CORPUS-TEXTS.json and .md from all that stands in --runs; with --publish, in results/, where
    other methods and seeds stay as they were published."""
    order, known, stem = [*NAMES, *RUNS], {}, f"compare-{Path(a.corpus).stem}-{a.texts}"
    if a.publish and (ROOT / "results" / f"{stem}.json").exists():
        known = json.loads((ROOT / "results" / f"{stem}.json").read_text())
        if known["ground"] != ground(a):
            raise Error(f"--publish: expected runs of {known['ground']}, got {ground(a)}")
    facts, arrays = {}, {}
    for name in order:
        if found := sorted(Path(a.runs).glob(f"{place(name, '[0-9]*', a).name}.npz")):
            facts[name], arrays[name] = zip(*(read_run(file, a) for file in found))
    old = known.get("rows", {})
    table = {name: row_of(name, made) for name in order
             if (made := published_runs(name, facts.get(name, []), old.get(name, {})))}
    complete = any(set(STS) <= {k.split("/")[1] for k in at} for found in arrays.values() for at in found)
    tasks = [evaluation.localize(t, a.data_dir) for t in evaluation.pick(STS)] if complete else []
    for task in tasks:
        task.load_data()
    pair = pairs(tasks)
    claims = [claim_of(one, two, how, table=table, arrays=arrays, pair=pair, old=known.get("claims", []))
              for one, two in CLAIMS for how in ("raw", "whitened") if one in table and two in table]
    claims = list({(c["claim"], c["vectors"]): c for c in claims if c}.values())
    shared = {f"{s} in {t}": int(np.isin(pair[s], pair[t]).sum()) for s in pair for t in pair if s != t}
    command = (f"python experiments/compare.py --corpus {Path(a.corpus).name} --texts {a.texts} "
               f"--max-length {a.max_length} --data-dir DIR")
    write_table((ROOT / "results" if a.publish else Path(a.runs)) / stem, {
        "command": command, "ground": ground(a), "rows": table, "claims": claims,
        "test pairs that stand in another task": shared or known.get("test pairs that stand in another task"),
        "versions": {p: version(p) for p in ("torch", "transformers", "mteb", "scipy")}})


def write_table(out, facts):
    """facts of `report` -> OUT.json, and as Markdown OUT.md"""
    columns, where = [*STS, "mean STS", "Banking77Classification"], facts["ground"]
    head = " | ".join([" ", "seeds", *columns, "mean STS, half whitened"])
    text = [f"{where['texts']:,} texts of {where['corpus']}, up to {where['max_length']} tokens, a run; "
            "scores x 100, raw vectors; mean and 95 % interval over seeds", "", f"| {head} |",
            "|---|---:|" + "---:|" * (len(columns) + 1)]
    show = lambda x: "" if x is None else f"{x[0]:.2f}" + ("" if x[1] is None else f" ± {x[1]:.2f}")
    for name, row in facts["rows"].items():
        cells = [show(row["raw"].get(c)) for c in columns] + [show(row.get("whitened", {}).get("mean STS"))]
        text.append(f"| {name} | {len(row['seeds']) or ''} | {' | '.join(cells)} |")
    text += ["", f"{len(facts['claims'])} differences of mean STS, each with a 95 % interval of its own (a "
             "twentieth may miss), over pairs of texts and seeds (marked *: over seeds alone, by Welch's t, "
             "since the pairs of some runs were not kept); where a trained side has one seed, for that run",
             "", "| claim | vectors | seeds | difference | 95 % |",
             "|---|---|---|---:|---:|"]
    for c in facts["claims"]:
        (n, m), (mean, low, high) = c["seeds"], c["mean STS"]
        text.append(f"| {c['claim']} | {c['vectors']} | {n}, {m} | {mean:+.2f} | {low:+.2f} to {high:+.2f}"
                    f"{' *' if 'over' in c else ''} |")
    write_json(out.with_name(out.name + ".json"), facts)
    write_whole(out.with_name(out.name + ".md"), "\n".join(text) + "\n")
    print("\n".join(text))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data-dir", required=True)
    p.add_argument("--corpus", default="docstrings")
    p.add_argument("--backbone", default="smollm2")
    p.add_argument("--runs", help="default: runs/compare-CORPUS-TEXTS")
    p.add_argument("--only", nargs="+")
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    p.add_argument("--texts", type=int, default=32000)
    p.add_argument("--max-length", type=int, default=t2t.Config.max_length)
    p.add_argument("--tasks", nargs="+", default=[*STS, "Banking77Classification"])
    p.add_argument("--tune", action="store_true", help="the trials")
    p.add_argument("--curves", action="store_true", help="the picture, of the first seed")
    p.add_argument("--publish", action="store_true", help="write the tables to results/, not to --runs")
    a = p.parse_args()
    a.runs = a.runs or str(ROOT / "runs" / f"compare-{Path(a.corpus).stem}-{a.texts}")
    known = [*TRIALS] if a.tune else [*NAMES, *RUNS]
    if unknown := set(a.only or ()) - set(known):
        p.error(f"--only: expected some of {str(known)[1:-1]}, got {str(sorted(unknown))[1:-1]}")
    if a.curves and (a.tune or a.only):
        p.error("--curves: expected neither --tune nor --only")
    evaluation.offline(a.data_dir)                     # a wrong folder fails now, not after training
    Path(a.runs).mkdir(parents=True, exist_ok=True)
    baselines, some, a.corpus_hash = untrained(a.backbone, a.corpus, max_length=256)   # as checkpoints read
    if a.tune or a.curves:
        del baselines                                  # and the model in them
        return tune(a) if a.tune else curves(a)
    tasks = [evaluation.localize(t, a.data_dir) for t in evaluation.pick(a.tasks)]
    for n, seed in enumerate(a.seeds):
        for name in a.only or [*baselines, *RUNS]:
            if n == 0 or name not in baselines:        # a baseline has no seed
                run(name, 0 if name in baselines else seed, tasks, a, baselines=baselines, some=some)
    report(a)


if __name__ == "__main__":
    try:
        main()
    except Error as e:
        sys.exit(f"compare.py: error: {e}")
