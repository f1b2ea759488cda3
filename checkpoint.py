"""What a run leaves on disk: its state while it trains, then the checkpoint, in formats that others read.

    OUT/state/last.pt        while training: everything that the next step depends on
    OUT/                     a SentenceTransformer folder; its weights are the whole causal model and head
    OUT/sparse/              a SparseEncoder folder: the same weights (hard links), and the head
    OUT/usual.safetensors    what ordinary texts light up, for Embedder.sparse
    OUT/t2t.json             every argument, version, hash and loss

Files are written beside their place and renamed: a kill at any moment leaves the old ones or the new, whole.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from backbone import weight_of_first
from corpus import Error


# ----------------------------------------------------------------------------------------- the state of a run
def start_folder(out, resuming):
    """Make OUT -> its place, links followed. Refuse where something else stands, or where an interrupted run
    would be forgotten."""
    if out.name in ("", ".."):
        raise Error(f"--out: expected a folder to be made, got {out}: pass a name such as ckpt")
    out = out.resolve()
    aside = aside_of(out)
    if aside.exists() and not out.exists():                       # killed between the last two renames
        aside.rename(out)
    if out.exists() and not out.is_dir():
        raise Error(f"--out: expected a folder, but {out} is a file: pass another --out")
    if os.path.ismount(out):                                      # the finished one could not take its place
        raise Error(f"--out: expected a folder that can be renamed, but {out} is a mount: pass one inside it")
    inside = {f.name for f in out.iterdir()} if out.exists() else set()
    other = sorted(inside - {"state", "log.jsonl"})
    if "t2t.json" in inside:
        raise Error(f"--out: expected a new folder, but {out} holds a finished checkpoint: remove it, "
                    "or pass another --out")
    if other:
        raise Error(f"--out: expected a new folder, but {out} holds {other[0]}: pass another --out")
    begun = (out / "state" / "last.pt").exists()
    if begun and not resuming:
        raise Error(f"--out: {out} holds an interrupted run: add --resume to go on with it, or remove it")
    if resuming and not begun:
        raise Error(f"--resume: expected an interrupted run in {out}, found none: leave --resume out")
    (out / "state").mkdir(parents=True, exist_ok=True)
    return out


def aside_of(out):
    """Where the unfinished folder stands between two renames: a name that nobody else gives."""
    return out.with_name(f".{out.name}.t2t-old")


def save_state(out, config, model, optimizer, **position):
    file = out / "state" / "last.pt"
    torch.save({"config": dataclasses.asdict(config), "position": position,
                "optimizer": optimizer.state_dict(),
                "weights": {n: p for n, p in model.named_parameters() if p.requires_grad}}, f"{file}.new")
    os.replace(f"{file}.new", file)


def load_state(out, config, model, optimizer, corpus_hash):
    """Put the run back where save_state found it; returns its position. Error if an argument has changed."""
    device = next(model.parameters()).device
    state = torch.load(out / "state" / "last.pt", map_location=device, weights_only=True)
    was, free = state["config"], ("resume", "save_every", "out", "micro_batch")
    changed = [f"--{k.replace('_', '-')} {v} (was {was.get(k)})"
               for k, v in dataclasses.asdict(config).items() if v != was.get(k) and k not in free]
    if changed:
        raise Error(f"--resume: expected the arguments of the interrupted run, got {', '.join(changed)}")
    if state["position"]["corpus"] != corpus_hash:
        raise Error("--resume: expected the corpus of the interrupted run, but its texts have changed")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    lines = (out / "log.jsonl").read_text().splitlines()[:state["position"]["step"]]
    # steps that came after the state are taken, and logged, again
    (out / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    return state["position"]


@contextlib.contextmanager
def between_steps():
    """Ctrl-C inside fills the list that this gives, so that a run ends between two steps and not in one."""
    interrupted, main = [], threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGINT, lambda *_: interrupted.append(1)) if main else None
    try:
        yield interrupted
    finally:
        if main:
            signal.signal(signal.SIGINT, old)


# ------------------------------------------------------------------------------------ the finished checkpoint
def save(out, embedder, config, facts):
    """Write the whole checkpoint beside OUT, then put it in OUT's place."""
    new, aside = out.with_name(f".{out.name}.t2t-new"), aside_of(out)
    for leftover in (new, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    embedder.model.float().save_pretrained(new)
    embedder.tok.save_pretrained(new)
    shared = [f for f in new.iterdir() if f.is_file()]            # weights, config and tokenizer
    (rows, bias), W, first = embedder.word_head(), embedder.W, weight_of_first(embedder.model)
    C, layers = rows.shape[1], [("WeightedLayerPooling", "0_FirstLast")] if first else []
    W = torch.eye(C) if W is None and first else W
    modules = [("Transformer", ""), *layers, ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
    modules = modules[:-1] if W is None else modules
    sentence_transformers_folder(new, config, "SentenceTransformer", modules, "cosine")
    (new / "1_Pooling").mkdir()
    write_json(new / "1_Pooling" / "config.json", {
        "word_embedding_dimension": C, "include_prompt": True,
        "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": config.pooling != "last",
        "pooling_mode_lasttoken": config.pooling == "last"})
    if W is not None:
        W = length(first) * torch.as_tensor(W)
        write_dense(new / "2_Dense", W, None, "torch.nn.modules.linear.Identity")
    if embedder.usual is not None:
        save_file({"usual": embedder.usual.float().cpu()}, new / "usual.safetensors")
    sparse_folder(new / "sparse", shared, layers, (length(first) * rows, bias), config)
    for folder in (new, new / "sparse") if first else ():
        layers = embedder.model.config.get_text_config().num_hidden_layers
        write_layers(folder / "0_FirstLast", layers, C, first)
    write_json(new / "t2t.json", facts | {"ours": ours(config, embedder)})
    (new / "README.md").write_text(card(config, facts))
    if (out / "log.jsonl").exists():
        shutil.copy(out / "log.jsonl", new)
    out.rename(aside)
    new.rename(out)
    shutil.rmtree(aside)


def sentence_transformers_folder(folder, config, model_type, modules, similarity, **settings):
    """What loads the modules, (class, folder) each, under old names, which all versions in use can read."""
    package = {"SpladePooling": "sparse_encoder.models"}
    kind = lambda name: f"sentence_transformers.{package.get(name, 'models')}.{name}"
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": kind(name)}
        for i, (name, path) in enumerate(modules)])
    write_json(folder / "config_sentence_transformers.json",
               {"model_type": model_type, "similarity_fn_name": similarity, **settings})
    write_json(folder / "sentence_bert_config.json",
               {"max_seq_length": config.max_length, "do_lower_case": False})


def sparse_folder(folder, shared, layers, word_head, config):
    """States, the head of words at each, SPLADE's log(1 + relu) and maximum, K largest: Embedder.sparse."""
    folder.mkdir()
    for f in shared:
        try:
            os.link(f, folder / f.name)
        except OSError:                                           # a file system without hard links
            shutil.copy(f, folder)
    modules = [("Transformer", ""), *layers, ("Dense", "1_Dense"), ("SpladePooling", "2_SpladePooling")]
    sentence_transformers_folder(folder, config, "SparseEncoder", modules, "dot",
                                 max_active_dims=config.top_k)
    write_dense(folder / "1_Dense", *word_head, "torch.nn.modules.linear.Identity",
                module_input_name="token_embeddings")
    (folder / "2_SpladePooling").mkdir()
    write_json(folder / "2_SpladePooling" / "config.json", {
        "pooling_strategy": "max", "activation_function": "relu",
        "word_embedding_dimension": len(word_head[0])})


def write_dense(folder, weight, bias, activation, **settings):
    folder.mkdir()
    write_json(folder / "config.json", {
        "in_features": weight.shape[1], "out_features": len(weight), "bias": bias is not None,
        "activation_function": activation, **settings})
    dense = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    dense = {k: v.detach().float().cpu().contiguous() for k, v in dense.items()}
    save_file(dense, folder / "model.safetensors")


def read_dense(folder, model):
    """W (C,C) of a checkpoint that has one, else None."""
    file = folder / "2_Dense" / "model.safetensors"
    W = load_file(file)["linear.weight"].numpy() if file.exists() else None
    return None if W is None else W.T / length(weight_of_first(model))


def read_usual(folder):
    """(2,V) of a checkpoint that has it, else None: see lexical.measure_usual."""
    file = folder / "usual.safetensors"
    return load_file(file)["usual"] if file.exists() else None


def write_layers(folder, layers, C, first):
    """backbone.states after first_last in sentence-transformers: (last + first * embedding) / (1 + first)"""
    folder.mkdir()
    write_json(folder / "config.json", {"word_embedding_dimension": C, "num_hidden_layers": layers,
                                        "layer_start": 0})
    weights = torch.zeros(layers + 1)
    weights[0], weights[-1] = first, 1
    save_file({"layer_weights": weights}, folder / "model.safetensors")


def length(first):
    """By how much states are longer than those of WeightedLayerPooling: what follows it makes up for that."""
    return (1 + first) / 2 if first else 1.0


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def ours(config, embedder):
    """What of a run the paper does not state, as far as it was used."""
    data, model = config.method in ("data", "both"), config.method in ("model", "both")
    targets, trained = data or model, config.method != "none"
    used = {"tf-idf weights": data, "first piece of a split word": data,
            "log p minus its mean over the corpus": model,
            "mean of embedding and last layer": weight_of_first(embedder.model) > 0,
            "input tokens left out": targets and config.dropout != 0,
            "mean of states scaled for the head": embedder.scale != 1,
            "loss at single tokens": targets and config.token_loss > 0, "frozen head": trained,
            "every hyper-parameter": trained, "whitening": embedder.W is not None,
            "sparse vectors: SPLADE's maximum": True,
            "sparse vectors: standardised": embedder.usual is not None}
    return [name for name, yes in used.items() if yes]


def card(config, facts):
    trained = "" if facts["loss"] is None else (
        f" on {facts['texts_seen']:,} texts of `{Path(config.corpus).name}`, to a loss of "
        f"{facts['loss']:.3f} nats (the best constant prediction: {facts['constant']:.3f})")
    origin = {"simcse": "A baseline, SimCSE (arXiv 2104.08821)", "none": "Not trained",
              "mntp": "A baseline, masked next-token prediction (arXiv 2404.05961)"}.get(
                  config.method, "The method is that of arXiv 2510.10224")
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {config.backbone}
tags: [sentence-transformers, feature-extraction, text2token]
---
# A Text2Token embedder

`{config.backbone}`, method `{config.method}`{trained}. All arguments, versions and hashes: t2t.json.

```python
from sentence_transformers import SentenceTransformer, SparseEncoder
dense, sparse = SentenceTransformer("this folder"), SparseEncoder("this folder/sparse")
```

{origin}; choices of this implementation are listed in t2t.json under "ours".
"""
