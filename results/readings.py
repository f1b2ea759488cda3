"""What a backbone is worth as an embedder before training: eight ways to read it, and four that count words.

    python results/readings.py --data-dir DIR [--backbone tiny] [--corpus docstrings] [--tasks NAME ...]

    mean, last         states of the causal model, averaged or the last one
    first-last         mean, of states and embeddings alike (backbone.first_last)
    mean both ways     mean, with bidirectional attention: where LLM2Vec's recipe starts
    both ways          first-last, with bidirectional attention: where token targets start
    echo               the text twice, the states of its second copy averaged (arXiv 2402.15449)
    prompt             the last state of: This text: "..." means in one word: "
    mean - PC          mean, without the first principal component of mean over 2,048 texts of the corpus
    head rows          mean of the rows of the head that belong to the text's tokens
    SIF                the same, a row weighted by 1e-3 / (1e-3 + frequency), without its first component
    tf-idf             cosine of tf * idf over the canonical words that t2t.py trains on: pure lexical overlap
    LSA                its first C singular directions over 32,000 texts of the corpus

Frequencies, idf and components come from --corpus, never a task. Writes results/readings-CORPUS.json and .md.
"""
import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mteb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402
from sklearn.decomposition import TruncatedSVD  # noqa: E402
from sklearn.preprocessing import normalize  # noqa: E402

import eval as evaluation  # noqa: E402
import t2t  # noqa: E402


NAMES = ("mean, last, mean both ways, first-last, both ways, prompt, echo, mean - PC, head rows, SIF, "
         "tf-idf, LSA").split(", ")


def readings(backbone, corpus, max_length=128):
    """-> {name: function(list of n texts) -> (n, dimensions)}, and the 2,048 texts that PCs are taken from"""
    model, tok = t2t.load_backbone(backbone, "causal")
    H, special = t2t.head(model).weight.detach().numpy(), set(tok.all_special_ids)
    V, words = len(H), t2t.read_vocabulary(tok, len(H))
    tokens = t2t.corpus_tokens(corpus, tok, max_length, words)
    N = len(tokens.start) - 1
    idf = np.log(N / np.maximum(1, tokens.df))
    frequency = np.bincount(tokens.ids, minlength=V) / len(tokens.ids)
    some = [tok.decode(tokens.text(n).tolist(), skip_special_tokens=True)
            for n in t2t.order_of_texts(0, 0, N)[:2048]]
    before, after = tok(t2t.PROMPT[0])["input_ids"], tok(t2t.PROMPT[1], add_special_tokens=False)["input_ids"]
    bare = lambda text: [i for i in t2t.tokenize(tok, [text], max_length)[0] if i not in special]

    both_layers, sees_all, both_ways = (
        t2t.load_backbone(backbone, a)[0] for a in ("causal", "bidirectional", "bidirectional"))
    t2t.first_last(both_layers)
    t2t.first_last(both_ways)
    embedder = lambda how, model=model: t2t.Embedder(model, tok, how, max_length)
    read = lambda e: lambda texts: e.pooled(e.ids(texts))

    def prompt(texts):
        return embedder("last").pooled([before + bare(t) + after for t in texts])

    @torch.no_grad()
    def echo(texts):
        out = np.zeros((len(texts), H.shape[1]), np.float32)
        for n, text in enumerate(texts):
            ids = t2t.tokenize(tok, [text], max_length)[0]
            own = [i for i in ids if i not in special]
            if own:
                x = t2t.states(model, *t2t.pad([ids + own], tok.pad_token_id))
                out[n] = x[0, -len(own):].mean(0).numpy()
        return out

    def without_pc(read):
        pc = []

        def reading(texts):
            if not pc:
                pc.append(np.linalg.svd(read(some), full_matrices=False)[2][0])
            x = read(texts)
            return x - np.outer(x @ pc[0], pc[0])
        return reading

    def rows(weight):
        def read(texts):
            ids = [np.array(bare(t), int) for t in texts]
            return np.stack([(weight[i, None] * H[i]).sum(0) / max(1, len(i)) for i in ids])
        return read

    def tf_idf(texts):
        out = np.zeros((len(texts), V), np.float32)
        for n, ids in enumerate(t2t.tokenize(tok, texts, max_length)):
            np.add.at(out[n], t2t.find_words(words, np.array(ids, int), [len(ids)])[1], 1)
        return out * idf

    def lsa():
        factors = []

        def reading(texts):
            if not factors:
                many = [tokens.text(n) for n in t2t.order_of_texts(0, 0, N)[:32000]]
                text, word = t2t.find_words(words, np.concatenate(many), [len(i) for i in many])
                counts = csr_matrix((idf[word], (text, word)), (len(many), V))             # tf * idf
                factors.append(TruncatedSVD(H.shape[1], random_state=0).fit(normalize(counts)).components_.T)
            return normalize(tf_idf(texts)) @ factors[0].astype(np.float32)
        return reading

    mean, last, mean_all, first_last, starts = map(read, (
        embedder("mean"), embedder("last"), embedder("mean", sees_all), embedder("mean", both_layers),
        embedder("mean", both_ways)))
    head_rows, sif = rows(np.ones(V)), without_pc(rows(1e-3 / (1e-3 + frequency)))
    found = [mean, last, mean_all, first_last, starts, prompt, echo, without_pc(mean), head_rows, sif, tf_idf,
             lsa()]
    return dict(zip(NAMES, found)), some


class Reading(AbsEncoder):
    """What mteb asks of a model, around one function."""

    def __init__(self, name, read):
        self.read = read
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"reading/{name}", "revision": "1"})

    def encode(self, inputs, **_):
        # retrieval hands out "title text" of a document as text, everything else its own column
        return self.read([text for batch in inputs for text in batch["text"]]).astype(np.float32)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--backbone", default="tiny")
    p.add_argument("--corpus", default="docstrings")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--readings", nargs="+")
    p.add_argument("--tasks", nargs="+",
                   default=["STS12", "STS13", "STSBenchmark", "Banking77Classification", "SciFact"])
    a = p.parse_args()
    tasks = [evaluation.localize(t, a.data_dir) for t in evaluation.pick(a.tasks)]
    t0, table = time.time(), {}
    found, _ = readings(a.backbone, a.corpus)
    chosen = {k: v for k, v in found.items() if not a.readings or k in a.readings}
    for task in tasks:                                 # readings inside: they share states
        task.load_data()
        for name, read in chosen.items():
            result = mteb.evaluate(Reading(name, read), [task], cache=None, co2_tracker=False,
                                   show_progress_bar=False)
            score = round(100 * result.task_results[0].get_score(), 2)
            table.setdefault(name, {})[task.metadata.name] = score
            print(name, task.metadata.name, score, flush=True)
        task.unload_data()
    out = ROOT / "results" / f"readings-{Path(a.corpus).name}"
    facts = {"command": f"python results/readings.py --corpus {Path(a.corpus).name} --data-dir DIR",
             "backbone": Path(a.backbone).name, "seconds": round(time.time() - t0),
             "torch": torch.__version__, "mteb": mteb.__version__, "threads": torch.get_num_threads(),
             "scores": table}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    names = [t.metadata.name for t in tasks]
    lines = ["| reading | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {r} | " + " | ".join(f"{s[n]:.2f}" for n in names) + " |" for r, s in table.items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
