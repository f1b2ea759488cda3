"""python eval.py CKPT --sparse: what its sparse vectors are worth, beside dense ones and BM25.

Sparse vectors are read through the head (CKPT/sparse, a SparseEncoder; lexical.py says how) and searched as
BM25 is: a document is a row of a compressed sparse matrix over words. Rankings are also fused by rank alone,
score(d) = sum over rankings of 1 / (60 + rank of d), so nothing is tuned.
"""
import json
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize

from corpus import write_whole

TASKS = ["SciFact", "LIMITSmallRetrieval", "STS12", "STS13", "STSBenchmark"]
DEPTH = 1000                                           # of the rankings that are fused


class Store:
    """Documents of one task, searched exactly and in memory: dense (N,C), or sparse (N,V)."""

    def __init__(self):
        self.docs, self.seconds = None, 0.0

    def add_documents(self, embeddings, ids):
        self.docs = matrix(embeddings)
        self.bytes = sum(a.nbytes for a in (self.docs.data, self.docs.indices, self.docs.indptr)) if sparse(
            self.docs) else self.docs.nbytes
        self.nonzeros = (self.docs.nnz if sparse(self.docs) else self.docs.size) / self.docs.shape[0]

    def search(self, queries, top_k, similarity_fn, top_ranked=None, query_idx_to_id=None):
        self.began = time.perf_counter()
        q = matrix(queries)
        scores = q @ self.docs.T
        scores = scores.toarray() if sparse(scores) else scores
        top = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        self.seconds = time.perf_counter() - self.began
        return np.take_along_axis(scores, top, 1).tolist(), top.tolist()

    def clear(self):
        self.docs = None


def sparse(m):
    return isinstance(m, csr_matrix)


def matrix(x):
    """What an encoder gives -> unit rows (N,C), for cosine, or, if sparse, CSR (N,V), for dot products."""
    if getattr(x, "is_sparse", False):
        x = x.coalesce().cpu()
        return csr_matrix((x.values().numpy(), x.indices().numpy()), shape=tuple(x.shape))
    return normalize(np.asarray(x, np.float32))


class Remembering:
    """A search model of mteb that remembers its rankings, for fusion, and how long a query took."""

    def __init__(self, inner, store=None, dense=False):
        self.inner, self.store, self.dense = inner, store, dense
        self.mteb_model_meta = inner.mteb_model_meta

    def index(self, corpus, **settings):
        self.inner.index(corpus, **settings)
        if self.store:                                 # all that search still reads of it; a list is faster
            self.inner.task_corpus = {"id": list(corpus["id"])}

    def search(self, queries, **settings):
        t0 = time.perf_counter()
        self.rankings = self.inner.search(queries, **settings | {"top_k": DEPTH})
        n, store = len(queries), self.store
        searching = store.seconds if store else time.perf_counter() - t0
        self.cost = {"ms to encode a query": round(1000 * (store.began - t0) / n, 3) if store else None,
                     "ms to search": round(1000 * searching / n, 3)}
        if self.store:
            self.cost |= {"non-zeros a document": round(self.store.nonzeros, 1),
                          "index MB": round(self.store.bytes / 1e6, 2)}
        return self.rankings


class Fusion:
    """Rankings of others, fused: a document's sum of 1 / (60 + rank), as in Cormack and others, 2009."""

    def __init__(self, name, parts):
        from mteb.models import ModelMeta
        self.parts = parts
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"fused/{name}", "revision": "1"})

    def index(self, corpus, **_):
        pass

    def search(self, queries, top_k, **_):
        fused = {}
        for query in queries["id"]:
            scores = fused[query] = {}
            for part in self.parts:
                # a document without a word in common is not ranked: BM25 and the sparse vectors give it 0
                found = sorted(part.rankings[query].items(), key=lambda x: (-x[1], x[0]))
                for rank, document in enumerate([d for d, s in found if s > 0 or part.dense], 1):
                    scores[document] = scores.get(document, 0) + 1 / (60 + rank)
        return fused


def compare(path, tasks, batch_size, device):
    """Scores x 100 of dense, sparse, BM25 and their fusions on mteb tasks -> {row: {column: value}}, and
    {task: why it has no scores}"""
    import mteb
    from mteb.models import SearchEncoderWrapper, SentenceTransformerEncoderWrapper, SparseEncoderWrapper
    from sentence_transformers import SparseEncoder

    import eval as evaluation
    folder = Path(path, "sparse")
    if not (folder / "modules.json").is_file():
        raise evaluation.Error(f"expected CKPT/sparse for --sparse, got none in {path}; train it with t2t.py")
    dense = evaluation.load(path, device)              # it looks whether the device is there
    sparse_encoder = SparseEncoder(str(folder), device=None if device == "auto" else device)
    encoders = {"dense": SentenceTransformerEncoderWrapper(dense),
                "sparse": SparseEncoderWrapper(sparse_encoder)}
    table, missing, options = {}, {}, {"batch_size": batch_size, "show_progress_bar": False}

    def score(name, model, task):
        got = mteb.evaluate(model, [task], cache=None, encode_kwargs=options, co2_tracker=False,
                            show_progress_bar=False)
        row = table.setdefault(name, {})
        row[task.metadata.name] = round(100 * got.task_results[0].get_score(), 2)
        print(f"{task.metadata.name}, {name}: {row[task.metadata.name]:.2f}", file=sys.stderr, flush=True)

    for task in tasks:
        try:
            task.load_data()
        except Exception as error:                     # a loader raises what it likes; other tasks go on
            missing[task.metadata.name] = evaluation.brief(error)
            print(f"{task.metadata.name}: data not loaded: {evaluation.brief(error)}", file=sys.stderr)
            continue
        if task.metadata.type != "Retrieval":
            for name, encoder in encoders.items():
                score(name, encoder, task)
            continue
        ranked = {}
        for name, encoder in encoders.items():
            store = Store()
            wrapped = SearchEncoderWrapper(encoder, index_backend=store)
            ranked[name] = Remembering(wrapped, store, name == "dense")
        ranked["BM25"] = Remembering(mteb.get_model("mteb/baseline-bm25s"))
        for name, model in ranked.items():
            score(name, model, task)
            table[name].setdefault("cost", {})[task.metadata.name] = model.cost
        for names in (*map(list, combinations(ranked, 2)), list(ranked)):
            score(" + ".join(names), Fusion("-".join(names), [ranked[n] for n in names]), task)
        task.unload_data()
    return table, missing


def render(table, tasks):
    """Markdown; costs are of the first retrieval task."""
    costs = ["non-zeros a document", "index MB", "ms to encode a query", "ms to search"]
    first = next((t for t in tasks if t in table.get("dense", {}).get("cost", {})), None)
    columns = [*tasks, *costs * bool(first)]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in table.items():
        cost = row.get("cost", {}).get(first, {})
        show = [f"{row[t]:.2f}" if t in row else "" for t in tasks] + [
            "" if cost.get(c) is None else f"{cost[c]:g}" for c in costs * bool(first)]
        lines.append(f"| {name} | " + " | ".join(show) + " |")
    return "\n".join(lines) + "\n"


def evaluate(paths, tasks=None, data_dir=None, out="results/mteb", batch_size=32, device="auto", command=""):
    """The table of each checkpoint, and which tasks have no scores; tables also go to OUT/sparse-NAME.json
    and .md, NAME the folder's (with the folders above it, if two are called alike)."""
    import eval as evaluation
    evaluation.offline(data_dir)
    from importlib.metadata import version

    import torch
    pages, all_missing = [], {}
    evaluation.folder_for(out)
    names = [Path(path).resolve().name for path in paths]
    for path, name in zip(paths, names):
        evaluation.find(path)
        name = "-".join(Path(path).resolve().parts[1:]) if names.count(name) > 1 else name
        chosen = evaluation.pick(tasks or TASKS)
        chosen = [evaluation.localize(t, data_dir) if data_dir else t for t in chosen]
        t0 = time.time()
        table, missing = compare(path, chosen, batch_size, device)
        all_missing |= missing
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        facts = {"command": command, "date": date, "rows": table, "missing": missing,
                 "seconds": round(time.time() - t0, 1), "threads": torch.get_num_threads(),
                 "versions": {p: version(p) for p in ("mteb", "torch", "sentence-transformers", "bm25s")}}
        found = [t.metadata.name for t in chosen if t.metadata.name not in missing]
        pages.append(f"{name}, scores x 100\n\n{render(table, found)}"
                     + "".join(f"- not scored: {task}: {why}\n" for task, why in missing.items()))
        write_whole(Path(out, f"sparse-{name}.json"), json.dumps(facts, indent=1) + "\n")
        write_whole(Path(out, f"sparse-{name}.md"), pages[-1])
    return "".join(pages), all_missing
