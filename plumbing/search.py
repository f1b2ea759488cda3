"""Search for eval.py --sparse: dense and sparse vectors searched alike, rankings kept, rankings fused.

A document is a row of a matrix, dense (N,C) or compressed sparse (N,V); all rows have length 1. Rankings are
fused by rank alone, score(d) = sum over rankings of 1 / (60 + rank of d), so nothing is tuned.
"""
import time

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize

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
    """What an encoder gives -> rows of length 1, for cosines: (N,C), or, if sparse, CSR (N,V)."""
    if getattr(x, "is_sparse", False):
        x = x.coalesce().cpu()
        return normalize(csr_matrix((x.values().float().numpy(), x.indices().numpy()), shape=tuple(x.shape)))
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


