"""What a backbone is worth as an embedder before training, and what counting words is worth.

    python experiments/untrained.py --data-dir DIR [--backbone smollm2] [--corpus docstrings] [--tasks NAME]

    mean, last          states of the causal model, averaged or the last one
    mean bidirectional  mean, with bidirectional attention: where training starts
    echo                the text twice, the states of its second copy averaged (arXiv 2402.15449)
    prompt              the last state of: This text: "..." means in one word: "
    mean - PC           mean, without the first principal component of mean over 2,048 texts of the corpus
    head rows           mean of the rows of the head that belong to the text's tokens
    SIF                 the same, a row weighted by 1e-3 / (1e-3 + frequency), without its first component
    tf-idf              cosine of tf * idf over the words that t2t.py trains on: lexical overlap alone

Frequencies, idf and components come from --corpus, never a task. Writes runs/untrained-CORPUS.json and .md,
with --publish results/untrained-CORPUS.json and .md.
"""
import argparse
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

import eval as evaluation  # noqa: E402
import t2t  # noqa: E402
from plumbing.cache import write_json  # noqa: E402
from plumbing.corpus import tokenize, tokenize_corpus  # noqa: E402


NAMES = "mean, last, mean bidirectional, prompt, echo, mean - PC, head rows, SIF, tf-idf".split(", ")


def untrained(backbone, corpus, max_length=256):
    """-> {name: function(list of n texts) -> (n, dimensions)}, and the 2,048 texts that PCs are taken from"""
    model, tok = t2t.load_backbone(backbone, "causal")
    H, special = t2t.head(model).weight.detach().numpy(), set(tok.all_special_ids)
    V, words = len(H), t2t.read_vocabulary(tok, len(H))
    tokens = tokenize_corpus(corpus, tok, max_length)
    N = len(tokens)
    idf = np.log(N / np.maximum(1, t2t.document_frequency(tokens, words)))
    frequency = np.bincount(tokens.ids, minlength=V) / len(tokens.ids)
    some = [tok.decode(tokens[n].tolist(), skip_special_tokens=True)
            for n in t2t.epoch_permutation(0, 0, N)[:2048]]
    before, after = t2t.ONE_WORD.split("{}")
    before, after = tok(before)["input_ids"], tok(after, add_special_tokens=False)["input_ids"]
    bare = lambda text: [i for i in tokenize(tok, [text], max_length)[0] if i not in special]

    sees_all, _ = t2t.load_backbone(backbone, "bidirectional")
    embedder = lambda how, model=model: t2t.Embedder(model, tok, how, max_length)
    read = lambda e: lambda texts: e.pooled(e.token_ids(texts)).numpy()

    def prompt(texts):
        return embedder("last").pooled([before + bare(t) + after for t in texts]).numpy()

    @torch.no_grad()
    def echo(texts):
        out = np.zeros((len(texts), H.shape[1]), np.float32)
        for n, text in enumerate(texts):
            ids = tokenize(tok, [text], max_length)[0]
            own = [i for i in ids if i not in special]
            if own:
                x = t2t.hidden_states(model, *t2t.pad([ids + own], tok.pad_token_id))
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
        for n, ids in enumerate(tokenize(tok, texts, max_length)):
            np.add.at(out[n], t2t.find_words(words, np.array(ids, int), [len(ids)])[1], 1)
        return out * idf

    mean, last, mean_all = map(read, (embedder("mean"), embedder("last"), embedder("mean", sees_all)))
    head_rows, sif = rows(np.ones(V)), without_pc(rows(1e-3 / (1e-3 + frequency)))
    found = [mean, last, mean_all, prompt, echo, without_pc(mean), head_rows, sif, tf_idf]
    return dict(zip(NAMES, found)), some


class Function(AbsEncoder):
    """What mteb asks of a model, around one function."""

    def __init__(self, name, read):
        self.read = read
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"untrained/{name}", "revision": "1"})

    def encode(self, inputs, **_):
        # retrieval hands out "title text" of a document as text, everything else its own column
        return self.read([text for batch in inputs for text in batch["text"]]).astype(np.float32)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--backbone", default="smollm2")
    p.add_argument("--corpus", default="docstrings")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--baselines", nargs="+")
    p.add_argument("--publish", action="store_true", help="write to results/, not to runs/")
    p.add_argument("--tasks", nargs="+",
                   default=["STS12", "STS13", "STSBenchmark", "Banking77Classification", "SciFact"])
    a = p.parse_args()
    tasks = [evaluation.localize(t, a.data_dir) for t in evaluation.pick(a.tasks)]
    t0, table = time.time(), {}
    found, _ = untrained(a.backbone, a.corpus)
    chosen = {k: v for k, v in found.items() if not a.baselines or k in a.baselines}
    for task in tasks:                                 # baselines inside: the data is loaded once
        task.load_data()
        for name, read in chosen.items():
            result = mteb.evaluate(Function(name, read), [task], cache=None, co2_tracker=False,
                                   show_progress_bar=False)
            score = round(100 * result.task_results[0].get_score(), 2)
            table.setdefault(name, {})[task.metadata.name] = score
            print(name, task.metadata.name, score, flush=True)
        task.unload_data()
    out = ROOT / ("results" if a.publish else "runs") / f"untrained-{Path(a.corpus).name}"
    out.parent.mkdir(exist_ok=True)
    write_json(out.with_suffix(".json"), {
        "command": f"python experiments/untrained.py --corpus {Path(a.corpus).name} --data-dir DIR",
        "backbone": Path(a.backbone).name, "seconds": round(time.time() - t0), "torch": torch.__version__,
        "mteb": mteb.__version__, "threads": torch.get_num_threads(), "scores": table})
    names = [t.metadata.name for t in tasks]
    lines = ["| baseline | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {r} | " + " | ".join(f"{s[n]:.2f}" for n in names) + " |" for r, s in table.items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
