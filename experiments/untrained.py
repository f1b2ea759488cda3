"""What a backbone is worth as an embedder before training, and what counting words is worth.

    python experiments/compare.py --data-dir DIR --only mean SIF tf-idf

    mean, last          states of the causal model, averaged or the last one
    mean bidirectional  mean, with bidirectional attention
    echo                the text twice, the states of its second copy averaged (arXiv 2402.15449)
    prompt              the last state of: This text: "..." means in one word: "    Here training starts.
    mean - PC           mean, without the first principal component of mean over 2,048 texts of the corpus
    head rows           mean of the rows of the head that belong to the text's tokens
    SIF                 the same, a row weighted by 1e-3 / (1e-3 + frequency), without its first component
    tf-idf              cosine of tf * idf over the words that t2t.py trains on: lexical overlap alone

Frequencies, idf and components come from the corpus, never a task.
"""
import copy
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402

import t2t  # noqa: E402
from plumbing.corpus import around, set_prompt, tokenize, tokenize_corpus  # noqa: E402


NAMES = "mean, last, mean bidirectional, prompt, echo, mean - PC, head rows, SIF, tf-idf".split(", ")


def untrained(backbone, corpus, max_length=256):
    """-> {name: function(list of n texts) -> (n, dimensions)}, the 2,048 texts that PCs are taken from, and
    the hash of the corpus"""
    model, tok = t2t.load_backbone(backbone, "causal")
    H = t2t.head(model).weight.detach().numpy()
    V, words = len(H), t2t.read_vocabulary(tok, len(H))
    tokens = tokenize_corpus(corpus, tok, max_length)
    N = len(tokens)
    idf = np.log(N / np.maximum(1, t2t.document_frequency(tokens, words)))
    frequency = np.bincount(tokens.ids, minlength=V) / len(tokens.ids)
    some = [tok.decode(tokens[n].tolist(), skip_special_tokens=True)
            for n in t2t.epoch_permutation(0, 0, N)[:2048]]
    bare = lambda text: tokenize(tok, [text], max_length)[0]

    def reader(pooling, attention="causal", question="{}"):
        @functools.lru_cache(1)
        def embedder():                                    # loaded at the first reading
            asking = copy.deepcopy(tok)
            set_prompt(asking, question)
            its = model if attention == "causal" else t2t.load_backbone(backbone, attention)[0]
            return t2t.Embedder(its, asking, pooling, max_length + sum(map(len, around(asking))))
        return lambda texts: embedder().pooled(embedder().token_ids(texts)).numpy()

    @torch.no_grad()
    def echo(texts):
        out = np.zeros((len(texts), H.shape[1]), np.float32)
        for n, text in enumerate(texts):
            before, own = around(tok)[0], bare(text)
            if own:
                x = t2t.hidden_states(model, *t2t.pad([before + own + own], tok.pad_token_id))
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

    mean, last, mean_all = reader("mean"), reader("last"), reader("mean", "bidirectional")
    prompt = reader("last", question=t2t.Config.prompt)
    head_rows, sif = rows(np.ones(V)), without_pc(rows(1e-3 / (1e-3 + frequency)))
    found = [mean, last, mean_all, prompt, echo, without_pc(mean), head_rows, sif, tf_idf]
    return dict(zip(NAMES, found)), some, tokens.hash


class Function(AbsEncoder):
    """What mteb asks of a model, around one function."""

    def __init__(self, name, read):
        self.read = read
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"untrained/{name}", "revision": "1"})

    def encode(self, inputs, **_):
        # retrieval hands out "title text" of a document as text, everything else its own column
        return self.read([text for batch in inputs for text in batch["text"]]).astype(np.float32)
