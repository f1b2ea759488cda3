"""Texts a second of training: t2t.py with token targets, t2t.py with SimCSE, and sentence-transformers' own
trainer with its SimCSE-style loss.

    python experiments/speed.py [--rounds 3] [--steps 4] [--backbone smollm2] [--publish]

Same backbone (LoRA 16), question, texts (docstrings), batch (64), length (64 and the question), precision.
They take turns; the first step of each turn is left out. Writes runs/speed.json, or results/ with --publish.
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

import peft  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
from sentence_transformers.losses import MultipleNegativesRankingLoss  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import t2t  # noqa: E402
from plumbing import corpus  # noqa: E402
from plumbing.baselines import set_attention_dropout  # noqa: E402
from plumbing.cache import write_json  # noqa: E402

B = 64


def ours(method, backbone, folder, steps):
    """-> seconds of each step but the first"""
    ticks = []
    t2t.train(t2t.Config(backbone=backbone, method=method, out=f"{folder}/{method}-{time.time()}",
                         steps=steps, batch_size=B, device="cpu"),
              on_step=lambda *_: ticks.append(time.perf_counter()))
    return [b - a for a, b in zip(ticks, ticks[1:])]


class Ticks(TrainerCallback):
    def __init__(self):
        self.at = []

    def on_step_end(self, *args, **kwargs):
        self.at.append(time.perf_counter())


def peer(folder, start, texts, steps, bfloat16):
    """sentence-transformers: a text is its own positive, under two dropouts of attention (0.3, as here)"""
    model, ticks = SentenceTransformer(start, device="cpu"), Ticks()
    model.max_seq_length = t2t.Config.max_length + sum(map(len, corpus.around(model.tokenizer)))
    set_attention_dropout(model, 0.3)
    model.add_adapter(peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    some = [texts[n] for n in t2t.epoch_permutation(42, 0, len(texts))[:B * steps]]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/st", max_steps=steps, per_device_train_batch_size=B, report_to="none",
        bf16=bfloat16, save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        learning_rate=3e-5)
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"anchor": some, "positive": some}),
        loss=MultipleNegativesRankingLoss(model), callbacks=[ticks]).train()
    return [b - a for a, b in zip(ticks.at, ticks.at[1:])]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--backbone", default="smollm2")
    p.add_argument("--publish", action="store_true", help="write to results/, not to runs/")
    a = p.parse_args()
    texts, seconds = list(corpus.texts("docstrings")), {"data": [], "simcse": [], "sentence-transformers": []}
    used = t2t.settle(t2t.Config())
    with tempfile.TemporaryDirectory() as folder:
        start = t2t.train(t2t.Config(backbone=a.backbone, method="none", out=f"{folder}/start"))
        for _ in range(a.rounds):
            seconds["sentence-transformers"] += peer(folder, start, texts, a.steps, used.dtype == "bfloat16")
            for method in ("simcse", "data"):
                seconds[method] += ours(method, a.backbone, folder, a.steps)
    rate = {k: {"median": round(B / statistics.median(s), 1), "best": round(B / min(s), 1)}
            for k, s in seconds.items()}
    facts = {"command": " ".join(["python", *sys.argv]), "texts_per_s": rate, "n_steps": len(seconds["data"]),
             "times_sentence_transformers": round(
                 rate["data"]["median"] / rate["sentence-transformers"]["median"], 2),
             "dtype": used.dtype, "load": os.getloadavg()[0], "threads": torch.get_num_threads(),
             "torch": torch.__version__}
    out = ROOT / ("results" if a.publish else "runs") / "speed.json"
    out.parent.mkdir(exist_ok=True)
    write_json(out, facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
