"""Texts a second of training: t2t.py against sentence-transformers' own trainer with its SimCSE-style loss.

    python results/speed.py [--rounds 3] [--steps 6]

Same backbone (tiny/, bidirectional, mean pooling, 128 tokens, float32), texts (docstrings), batch (128), all
weights. The two take turns; the first step of each turn is left out. SimCSE encodes every text twice, to get
its positives; t2t encodes it once, adds the head, and batches like lengths. Writes results/speed.json.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
from sentence_transformers.losses import MultipleNegativesRankingLoss  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import corpus  # noqa: E402
import t2t  # noqa: E402

B = 128


def ours(folder, steps):
    """-> seconds of each step but the first"""
    ticks = []
    t2t.train(t2t.Config(out=f"{folder}/t2t-{time.time()}", steps=steps, batch_size=B),
              on_step=lambda *_: ticks.append(time.perf_counter()))
    return [b - a for a, b in zip(ticks, ticks[1:])]


class Ticks(TrainerCallback):
    def __init__(self):
        self.at = []

    def on_step_end(self, *args, **kwargs):
        self.at.append(time.perf_counter())


def simcse(folder, start, texts, steps):
    model, ticks = SentenceTransformer(start, device="cpu"), Ticks()
    some = [texts[n] for n in t2t.order_of_texts(42, 0, len(texts))[:B * steps]]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/st", max_steps=steps, per_device_train_batch_size=B, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=3e-5)
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"anchor": some, "positive": some}),
        loss=MultipleNegativesRankingLoss(model), callbacks=[ticks]).train()
    return [b - a for a, b in zip(ticks.at, ticks.at[1:])]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=6)
    a = p.parse_args()
    texts, seconds = list(corpus.texts("docstrings")), {"t2t": [], "simcse": []}
    with tempfile.TemporaryDirectory() as folder:
        start = t2t.train(t2t.Config(method="none", out=f"{folder}/start"))    # tiny/ as SentenceTransformer
        for _ in range(a.rounds):
            seconds["simcse"] += simcse(folder, start, texts, a.steps)
            seconds["t2t"] += ours(folder, a.steps)
    rate = {k: {"median": round(B / statistics.median(s), 1), "best": round(B / min(s), 1)}
            for k, s in seconds.items()}
    facts = {"command": " ".join(["python", *sys.argv]), "texts_per_s": rate, "n_steps": len(seconds["t2t"]),
             "ratio_of_medians": round(rate["t2t"]["median"] / rate["simcse"]["median"], 2),
             "load": os.getloadavg()[0], "threads": torch.get_num_threads(), "torch": torch.__version__}
    (ROOT / "results" / "speed.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
