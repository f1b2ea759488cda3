"""Does memory grow with the corpus? Texts to tokens to `data` targets, for corpora of growing size.

    python experiments/scale.py [--texts 10000 100000 1000000] [--backbone smollm2] [--publish]

A corpus of N texts repeats the documentation of the installed packages, each copy with a tenth of its words
replaced by others. Each N runs in a process of its own, with an empty cache: seconds of each part, peak
memory, disk. For the smallest, also scikit-learn's TfidfVectorizer. Writes runs/scale.json, or results/ with
--publish.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import t2t  # noqa: E402
from plumbing import corpus  # noqa: E402
from plumbing.backbones import resolve  # noqa: E402
from plumbing.cache import write_json  # noqa: E402


def write_corpus(file, N):
    texts = list(corpus.texts("docstrings", corpus.Counts()))
    words, rng = [t.split() for t in texts], np.random.default_rng(0)
    others = [w for text in words for w in text]
    with open(file, "w") as out:
        for n in range(N):
            text = list(words[n % len(words)])
            for place in np.flatnonzero(rng.random(len(text)) < 0.1):
                text[place] = others[rng.integers(len(others))]
            out.write(json.dumps({"text": " ".join([*text, str(n)])}) + "\n")     # all distinct


def measure(N, file, folder):
    """-> seconds of each part, peak memory in MB, disk in MB. `data` targets need the tokenizer alone."""
    tok = AutoTokenizer.from_pretrained(folder)
    words = t2t.read_vocabulary(tok, len(tok))
    # not ru_maxrss, which begins at that of the parent
    memory = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    before, times = memory(), [time.perf_counter()]
    config = t2t.Config(method="data", steps=-(-N // t2t.Config.batch_size))   # all texts
    tokens = t2t.tokenize_corpus(str(file), tok, config.max_length)
    times.append(time.perf_counter())
    q = t2t.build_targets(config, tokens, words, model=None, tok=tok)
    times.append(time.perf_counter())
    assert len(q.texts) == N
    cache = Path(os.environ["T2T_CACHE"])
    disk = {kind: round(sum(f.stat().st_size for f in cache.glob(f"{kind}-*/*")) / 1e6)
            for kind in ("tokens", "targets")}
    seconds = dict(zip(("tokens", "targets"), np.diff(times).round(1).tolist()))
    return {"texts": N, "tokens": int(tokens.lengths.sum()), "seconds": seconds,
            "MB before": before, "peak MB": memory(), "disk MB": disk}


def sklearn_seconds(file):
    from sklearn.feature_extraction.text import TfidfVectorizer
    texts, began = [json.loads(line)["text"] for line in open(file)], time.perf_counter()
    TfidfVectorizer().fit_transform(texts)
    return round(time.perf_counter() - began, 1)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--texts", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    p.add_argument("--backbone", default="smollm2")
    p.add_argument("--publish", action="store_true")
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)        # N, FILE: what a process measures
    a = p.parse_args()
    if a.one:
        return print(json.dumps(measure(int(a.one[0]), a.one[1], a.backbone)))
    rows = []
    for N in a.texts:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "texts.jsonl")
            write_corpus(file, N)
            line = [sys.executable, __file__, "--one", str(N), str(file), "--backbone", resolve(a.backbone)]
            out = subprocess.run(line, env={**os.environ, "T2T_CACHE": folder}, check=True, text=True,
                                 stdout=subprocess.PIPE).stdout
            rows.append(json.loads(out.splitlines()[-1]) | {"corpus MB": round(file.stat().st_size / 1e6)})
            if N == min(a.texts):
                rows[-1]["seconds"]["TfidfVectorizer"] = sklearn_seconds(file)
        print(rows[-1], flush=True)
    folder = ROOT / ("results" if a.publish else "runs")
    folder.mkdir(exist_ok=True)
    write_json(folder / "scale.json", {"command": "python experiments/scale.py", "rows": rows, "versions": {
        name: version(name) for name in ("torch", "transformers", "tokenizers", "scikit-learn")}})


if __name__ == "__main__":
    main()
