"""What a run leaves on disk: its state while it trains, then the checkpoint, in formats that others read.

    OUT/state/               while training: last.pt, everything that the next step depends on, and log.jsonl
    OUT/                     a SentenceTransformer folder; its weights are the whole causal model and head
    OUT/sparse/              a SparseEncoder folder: the same weights (hard links), and the head
    OUT/mean.safetensors     mean (C,) of the dense vectors of the corpus, which the sparse ones subtract
    OUT/t2t.json             every setting as it was used, versions, hashes and losses

Files are written beside their place and renamed: a kill at any moment leaves the old ones or the new, whole.
"""
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import threading
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing import processes
from plumbing.backbones import identity_of
from plumbing.cache import os_errors, write_json, write_whole
from plumbing.cli import RANK, Error, flag, out_of_memory, why


# ----------------------------------------------------------------------------------------- the state of a run
def start(config):
    """Make --out -> its place, links followed. Refuse where something else stands, or where an interrupted
    run would be forgotten."""
    out = Path(config.out)
    if out.name in ("", ".."):
        raise Error(f"--out: expected a folder to be made, got {out}: pass a name such as ckpt")
    out = out.resolve()
    if RANK:                                                      # the first of several processes writes
        return out
    aside = aside_of(out)
    if aside.exists():                                            # a run was killed amid the last renames
        aside.rename(out) if not out.exists() else shutil.rmtree(aside)
    if out.exists() and not out.is_dir():
        raise Error(f"--out: expected a folder, but {out} is a file: pass another --out")
    corpus = Path(config.corpus).resolve()
    if config.method != "none" and config.corpus != "docstrings" and corpus.is_dir() and (
            out.is_relative_to(corpus) and not any(part[0] == "." for part in out.relative_to(corpus).parts)):
        raise Error(f"--out: expected a folder outside of --corpus {config.corpus}, whose files are read as "
                    f"texts, got {config.out}: pass another --out")
    if os.path.ismount(out):                                     # the finished one could not take its place
        raise Error(f"--out: expected a folder that can be renamed, but {out} is a mount: pass one inside it")
    if out.parent.is_dir() and not os.access(out.parent, os.W_OK):            # nor here
        raise Error(f"--out: expected a folder beside which others can be made, but {out.parent} can not be "
                    f"written: pass {out / 'ckpt'}" if out.is_dir() and os.access(out, os.W_OK) else
                    f"--out: expected a folder that can be written, got {out.parent}: pass another --out")
    inside = {f.name for f in out.iterdir()} if out.exists() else set()
    begun, ours = (out / "state" / "last.pt").exists(), {"last.pt", "log.jsonl", "lock"}
    if "state" in inside and (out / "state").is_dir():            # a user may have a folder of that name
        whole = {f.name.removesuffix(".new").removesuffix(".partial") for f in (out / "state").iterdir()}
        inside = inside - {"state"} | {f"state/{name}" for name in whole - ours}
    if begun and config.resume:
        return locked(out)
    if config.overwrite and ("t2t.json" in inside or not inside):
        pass                                                     # what is there stays until the new one is
    elif "t2t.json" in inside:
        raise Error(f"--out: {out} holds a finished checkpoint: add --overwrite to replace it, or pass "
                    "another --out")
    elif other := sorted(inside):
        raise Error(f"--out: expected a new folder, but {out} holds {other[0]}: pass another --out")
    elif begun:
        raise Error(f"--out: {out} holds an interrupted run: add --resume to go on with it, or --overwrite")
    if config.resume:
        print(f"--resume: no interrupted run in {out}, so this one starts from the beginning", flush=True)
    (out / "state").mkdir(parents=True, exist_ok=True)
    return locked(out)


def locked(out):
    """Lock the folder `out` against other processes until the run ends; return it."""
    LOCKS.append(open(out / "state" / "lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"--out: expected a folder for this run alone, but another run writes to {out}: wait for "
                    "it, or pass another --out") from None
    except OSError:
        pass                                                      # a file system without locks
    return out


LOCKS = []               # open files: a lock ends when its file is closed, or with the process


def aside_of(out):
    """Where the old OUT waits while the new one takes its place; `start` mends what a kill left."""
    return out.with_name(f".{out.name}.t2t-old")


def identity(config):
    """What a resumed run must share with the one that was interrupted, as far as the settings decide it."""
    free = ("resume", "overwrite", "save_every", "out", "micro_batch", "grad_checkpointing")
    used = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    return used | {"weights of the backbone": identity_of(config.backbone),
                   "weights of --init": identity_of(config.init) if config.init else None}


def save_state(out, must_stay, model, optimizer, *, run):
    """must_stay: what --resume must find unchanged; run: the step, the scale and what has been counted. Of
    several processes the first writes."""
    if RANK:
        return processes.barrier()
    file = out / "state" / "last.pt"
    state = {"identity": must_stay, "run": run, "optimizer": optimizer.state_dict(),
             "weights": {n: p for n, p in model.named_parameters() if p.requires_grad}}
    with writing(out, Path(f"{file}.new")) as new, open(new, "wb") as stream:    # torch may not know its name
        torch.save(state, stream)
    os.replace(f"{file}.new", file)
    processes.barrier()


@contextlib.contextmanager
def writing(folder, new):
    """A full disk: one line, and no half of `new`."""
    try:
        with os_errors():
            yield new
    except OSError as e:
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 1e6
        raise Error(f"--out: expected to write in {folder}, where {free:,.0f} MB are free: "
                    f"{why(e)[:100]}") from None


def open_log(out, mode):
    return open(os.devnull if RANK else out / "state" / "log.jsonl", mode, buffering=1)         # by lines


def load_state(out, must_stay, model, optimizer, *, resume):
    """Put the run back where save_state left it -> run, or None if there is no state. Error if a setting, the
    corpus or the backbone has changed."""
    file = out / "state" / "last.pt"
    if not resume:
        file.unlink(missing_ok=True)
    begun = file.exists()
    if processes.same(begun) != begun:
        raise Error(f"--out: expected a folder that all processes share, got {out}, whose state not all see")
    if not begun:
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        was, run = state["identity"], state["run"]
        changed = [f"{flag(k) if k.isidentifier() else k} {v} (was {was.get(k)})"
                   for k, v in must_stay.items() if v != was.get(k)]
        if not changed:
            put_back(state, model, optimizer)
    except Exception as e:                                        # torch has many types for a damaged file
        if isinstance(e, OSError) or out_of_memory(e):
            raise
        raise Error(f"--resume: expected the state of a run, but {file} is damaged ({why(e)[:80]}): pass "
                    "--overwrite to start again") from None
    if changed:
        raise Error(f"--resume: expected what the interrupted run had, got {', '.join(changed)}")
    if not RANK:                        # steps that came after the state are taken, and logged, again
        log = out / "state" / "log.jsonl"
        lines = log.read_text("utf-8", "replace").splitlines()[:run["step"]] if log.exists() else []
        write_whole(log, "".join(line + "\n" for line in lines))
    return run


@torch.no_grad()
def put_back(state, model, optimizer):
    """Weights and moments of a state into model and optimizer; ValueError or others if they do not fit."""
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in learned.items():
        if state["weights"][name].shape != p.shape:               # copy_ would broadcast
            raise ValueError(f"{name} has another shape")
        p.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    if optimizer.state.keys() - set(learned.values()) or not optimizer.state:
        raise ValueError("moments of other weights, or none")
    for p, m in optimizer.state.items():                          # a weight that no text uses has none
        if not p.shape == m["exp_avg"].shape == m["exp_avg_sq"].shape:
            raise ValueError("moments of another shape")
    if [type(state["run"][k]) for k in ("step", "seconds", "scale", "losses")] != [int, float, float, list]:
        raise ValueError("no step, seconds, scale and losses")


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
    # inside, names are ASCII: safetensors and tokenizers fail on others where the locale is not UTF-8
    with writing(out, new), contextlib.chdir(new):
        here = Path()
        embedder.model.cpu().float().save_pretrained(here)
        embedder.tok.save_pretrained(here)
        if config.prompt != "{}":               # classes of single models would put back their own template
            settings = json.loads(Path("tokenizer_config.json").read_text("utf-8"))
            settings = {k: v for k, v in settings.items() if k not in ("add_bos_token", "add_eos_token")}
            write_json(here / "tokenizer_config.json",
                       settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
        shared = [f for f in here.iterdir() if f.is_file()]       # weights, config and tokenizer
        save_dense(here, embedder)
        save_sparse(here / "sparse", shared, embedder)
        if embedder.mean is not None:
            save_file({"mean": embedder.mean}, here / "mean.safetensors")
        facts = facts | {"ours": ours(config), "versions": versions()}
        write_json(here / "t2t.json", facts)
        write_whole(here / "README.md", model_card(config, facts))
        if (out / "state" / "log.jsonl").exists():
            shutil.copy(out / "state" / "log.jsonl", here)
    was_checkpoint = (out / "t2t.json").exists()                  # then --overwrite replaces all
    out.rename(aside)
    new.rename(out)
    for f in () if was_checkpoint else aside.iterdir():           # what a user has put there meanwhile stays,
        if f.name != "state" and not (out / f.name).exists():     # unless the checkpoint has that name
            f.rename(out / f.name)
    while LOCKS:                                                  # NFS does not remove what is open
        LOCKS.pop().close()
    shutil.rmtree(aside, ignore_errors=True)                      # `start` removes what is left


def save_dense(folder, embedder):
    """[Transformer, Pooling, Normalize]: h, of length 1"""
    write_modules(folder, embedder, "SentenceTransformer", ["Transformer", "Pooling", "Normalize"])
    write_pooling(folder / "1_Pooling", embedder)
    (folder / "2_Normalize").mkdir()


def save_sparse(folder, shared, embedder):
    """[Transformer, Pooling, Dense]: max(0, U (h - mean)), the K largest, by cosine: Embedder.sparse"""
    folder.mkdir()
    for f in shared:
        try:
            os.link(f, folder / f.name)
        except OSError:                                           # a file system without hard links
            shutil.copy(f, folder)
    write_pooling(folder / "1_Pooling", embedder)
    U = embedder.model.get_output_embeddings().weight.detach().float().cpu().contiguous()          # (V,C)
    write_modules(folder, embedder, "SparseEncoder", ["Transformer", "Pooling", "Dense"],
                  max_active_dims=min(embedder.SPARSE_K, len(U)))
    mean = torch.zeros(U.shape[1]) if embedder.mean is None else embedder.mean
    write_dense(folder / "2_Dense", U, -(U @ mean))


def write_dense(folder, weight, bias):
    folder.mkdir()
    write_json(folder / "config.json", {"in_features": weight.shape[1], "out_features": len(weight),
                                        "bias": True,
                                        "activation_function": "torch.nn.modules.activation.ReLU"})
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")


def write_modules(folder, embedder, model_type, modules, **settings):
    """What loads the modules, under names which all versions in use can read."""
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
         "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)])
    write_json(folder / "config_sentence_transformers.json", {
        "model_type": model_type, "similarity_fn_name": "cosine",
        "__version__": {"sentence_transformers": version("sentence-transformers"), "torch": torch.__version__,
                        "transformers": version("transformers")}, **settings})
    write_json(folder / "sentence_bert_config.json",
               {"max_seq_length": embedder.max_length, "do_lower_case": False})


def write_pooling(folder, embedder):
    folder.mkdir()
    write_json(folder / "config.json", {
        "word_embedding_dimension": embedder.model.get_output_embeddings().weight.shape[1],
        "include_prompt": True,
        "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": embedder.pooling == "mean",
        "pooling_mode_lasttoken": embedder.pooling == "last"})


def read_facts(folder):
    """t2t.json of a checkpoint, checked where it decides the vectors; {} of anything else."""
    path = Path(folder) / "t2t.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text("utf-8"))
        used, length = facts["config"], facts["max_length"]
        good = (used["attention"] in ("bidirectional", "causal") and used["pooling"] in ("mean", "last")
                and isinstance(length, int) and length >= 1 and 0 < facts["scale"] < math.inf)
    except (ValueError, KeyError, TypeError, RecursionError):      # no JSON, or other JSON than ours
        good = False
    if not good:
        raise Error(f"Embedder.load: expected {path} as training wrote it, with attention, pooling, "
                    "max_length and scale, got something else: copy the checkpoint again")
    return facts


def read_mean(folder, C):
    """mean (C,) of a checkpoint; None of anything else."""
    path = Path(folder) / "mean.safetensors"
    if not path.is_file():
        return None
    try:
        mean = load_file(path)["mean"]
    except (SafetensorError, KeyError):
        mean = torch.empty(0)
    if mean.shape != (C,) or not mean.isfinite().all():
        raise Error(f"Embedder.load: expected {C} finite numbers called mean in {path}, got something else: "
                    "copy the checkpoint again")
    return mean


def ours(config):
    """What of a run the paper's abstract does not state."""
    data, model = config.method in ("data", "both"), config.method in ("model", "both")
    used = {"tf-idf weights": data, "first piece of a split word": data,
            "log p minus its mean over the corpus": model,
            **dict.fromkeys(("form of the loss", "measured scale in front of the head"), data or model),
            "LoRA": config.method != "none" and config.lora_rank > 0,
            **dict.fromkeys(("frozen embedding", "every hyper-parameter"), config.method != "none"),
            "the question": config.prompt != "{}", "attention and pooling": True, "sparse vectors": True}
    return [name for name, yes in used.items() if yes]


def versions():
    return {p: version(p) for p in ("torch", "transformers", "peft", "tokenizers", "numpy", "gguf",
                                    "sentence-transformers")}


def model_card(config, facts):
    """A README.md whose front matter the hub accepts: base_model is a hub id or not there."""
    base, corpus = facts["backbone"], config.corpus
    meta = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity",
            "base_model": base.get("hub"), "license": base.get("license"),
            "language": "en" if corpus == "docstrings" else None,
            "datasets": f"[{corpus.split(':')[1]}]" if corpus.startswith("hub:") else None,
            "tags": "[sentence-transformers, sparse-encoder, feature-extraction, text2token]"}
    front = "\n".join(f"{k}: {v}" for k, v in meta.items() if v)
    name = base.get("hub") or base["name"]
    trained = "Not trained." if facts["loss"] is None else (
        f"Trained on {min(facts['texts'], facts['texts_seen']):,} texts of "
        f"{'package documentation' if corpus == 'docstrings' else Path(corpus).name}, to a loss of "
        f"{facts['loss']:.3f} nats (best prediction that ignores the text: {facts['constant_loss']:.3f}).")
    library = facts["versions"]["sentence-transformers"]
    source = {"simcse": "A baseline, SimCSE (arXiv 2104.08821)", "none": "A baseline: the backbone as it is",
              "mntp": "A baseline, masked next-token prediction (arXiv 2404.05961)"}.get(
                  config.method, "The method is that of arXiv 2510.10224")
    return f"""---
{front}
---
# {name} as a text embedder

{trained} Method: `{config.method}`. {source}; main choices that are not the paper's are listed in t2t.json
under "ours", with every setting, version and hash. Made with sentence-transformers {library}.

```python
from sentence_transformers import SentenceTransformer, SparseEncoder
dense, sparse = SentenceTransformer("this folder"), SparseEncoder("this folder/sparse")
```
"""
