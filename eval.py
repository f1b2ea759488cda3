"""Score saved embedders on MTEB (English, v2) through the `mteb` package, side by side.

    python eval.py ckpt                                   # 41 tasks, data from the hub: hours on a CPU
    python eval.py ckpt smollm2 --tasks STSBenchmark STS12   # two models on two tasks: minutes
    python eval.py ckpt --benchmark "NanoBEIR"            # any benchmark of mteb
    python eval.py ckpt --tasks STS12 --data-dir DIR      # no network: data in DIR/<hub dataset path>/
    python eval.py ckpt --sparse                          # its sparse vectors against dense, BM25, fusions

CKPT is a sentence-transformers folder, a hub id, or a bare causal LM: a folder, a .gguf file or smollm2 (read
as it is: causal, mean over tokens). Scores are filed in --out under a hash of what is in the folder, and of
--dtype: a retrained checkpoint never gets old ones, and after an interruption the same command goes on. --out
also has the table.
Exit status: 0 all scored, 2 a mistake in the call, 3 some task not scored, 130 interrupted.
"""
import argparse
import copy
import difflib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

from plumbing.cache import download, file_hash, hash_of, write_json, write_whole
from plumbing.cli import Error, flag, print_anything
# no mteb or torch up here: --help and wrong arguments answer at once

BENCHMARK = "MTEB(eng, v2)"
BARE_LENGTH = 512  # tokens: usual for LM embedders on MTEB; a bare LM names no limit but its positions
# What the vectors depend on: weights, configuration, tokenizer, modules, code; not README, t2t.json, logs.
READ = ("*.safetensors", "*.bin", "*config*.json", "modules.json", "tokenizer*", "vocab*", "merges.txt",
        "added_tokens.json", "special_tokens_map.json", "*.index.json", "*.model", "*.jinja", "*.py")
brief = lambda error: f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"

# --------------------------------------------------------------------------------------------- 1. checkpoints
def find(path):
    """The folder of a checkpoint (a hub id is fetched); refuses at once what cannot be a model."""
    folder = Path(path)
    if path == "smollm2" and not folder.exists() or path.endswith(".gguf"):
        from plumbing.backbones import resolve
        return Path(resolve(path, "CKPT"))
    try:
        if not folder.exists() and path.count("/") == 1 and path[0] not in "./~":
            folder = download(path, [*READ, *(f"*/{pattern}" for pattern in READ)])
        files = model_files(folder)
        problem = ("without config.json" if not {"modules.json", "config.json"} & {f.name for f in files} else
                   "without weights" if not {".safetensors", ".bin"} & {f.suffix for f in files} else None)
    except Exception as error:  # no such folder or hub id, no network, a broken modules.json
        problem = f"which cannot be read ({brief(error)})"
    if problem:
        raise Error(f"expected the folder of a model, got {path}, {problem}; train one, or copy all of it")
    return folder

def model_files(folder):
    """The files that decide the vectors: at the top, and everywhere in the folders of its modules."""
    listing = folder / "modules.json"
    paths = [m["path"] for m in json.loads(listing.read_text("utf-8"))] if listing.is_file() else []
    if outside := [path for path in paths if Path(path).is_absolute() or ".." in Path(path).parts]:
        raise ValueError(f"modules.json names {outside[0]}, outside of the folder")
    files = set(folder.iterdir()).union(*((folder / path).rglob("*") for path in paths if path))
    return sorted(f for f in files if f.is_file() and f.name != "generation_config.json"
                  and any(f.match(pattern) for pattern in READ))

def contents_hash(files, root, salt=""):
    return hash_of(salt, [(f.relative_to(root).as_posix(), file_hash(f)) for f in files])

def revision(folder, dtype="float32"):
    """What scores are filed under: the contents, and how it is read, which none of its files says."""
    bare = not (folder / "modules.json").is_file()
    salt = f"causal, mean, {BARE_LENGTH}, no template" * bare + dtype * (dtype != "float32")
    return contents_hash(model_files(folder), folder, salt)

def load(path, device="auto", dtype="float32", sparse=False):
    """A SentenceTransformer from a checkpoint, a bare causal LM, or a hub id; sparse: the SparseEncoder of a
    checkpoint."""
    folder = find(path)
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, SparseEncoder
    transformers.utils.logging.disable_progress_bar()  # a bar a model, over in no time
    if device == "cuda" and not torch.cuda.is_available():
        raise Error("expected a CUDA device for --device cuda, got none; use --device cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        if sparse:
            model = SparseEncoder(str(folder / "sparse"), device=device)
        else:
            modules = None if (folder / "modules.json").is_file() else read_bare(folder)
            model = SentenceTransformer(None if modules else str(folder), modules=modules, device=device)
        model.to(getattr(torch, dtype)).eval()
        model[0].register_forward_pre_hook(some_token)
        model.encode(["a few words", "", "word " * BARE_LENGTH], show_progress_bar=False)
    except Exception as error:  # truncated weights, a broken tokenizer, shapes or modules that do not fit
        refusal = Error(f"expected a model that reads texts in {path}, got {brief(error)}; copy it again, or "
                        "try another")
        raise error if isinstance(error, Error) else refusal from None
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise Error(f"expected finite weights in {path}, got NaN or infinity; use an earlier checkpoint")
    return model

def some_token(module, args):
    """Texts without a single token, in a batch of their own, are one of padding: models fail on no tokens."""
    batch = args[0]
    if "input_ids" in batch and not batch["input_ids"].numel():
        empty = batch["input_ids"].new_zeros(len(batch["input_ids"]), 1).long()
        batch.update(input_ids=empty, attention_mask=empty)

def read_bare(folder):
    """[Transformer, mean Pooling] of a causal LM without sentence-transformers files."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from plumbing.backbones import positions, read_backbone
    model, tok = read_backbone(str(folder), "causal", option="CKPT")  # refuses what is damaged, or no decoder
    length = min(positions(model), BARE_LENGTH)
    del model  # never two in memory
    code = {"trust_remote_code": False}  # else a console is asked to run it
    # text as it is: else sentence-transformers would put it into the chat template of an instruct model
    as_text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    reader = Transformer(str(folder), max_seq_length=length, model_kwargs=code, processor_kwargs=code,
                         config_kwargs={"is_causal": True, **code},
                         modality_config=as_text, module_output_name="token_embeddings")
    # padding is masked out: which token stands there does not matter; on the left it would shift positions
    reader.tokenizer.pad_token, reader.tokenizer.padding_side = tok.pad_token, "right"
    return [reader, Pooling(reader.get_embedding_dimension(), pooling_mode="mean")]

# ---------------------------------------------------------------------------------------- 2. tasks and scores
def pick(names, benchmark=BENCHMARK):
    """mteb's tasks, English only; the benchmark's own objects where it has them: it limits splits too."""
    import mteb
    try:
        chosen = {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}
    except KeyError:
        near = difflib.get_close_matches(benchmark, [b.name for b in mteb.get_benchmarks()]) or [BENCHMARK]
        raise Error(f"expected a benchmark of mteb, got {benchmark}; "
                    f"use one such as {', '.join(near)}") from None
    for name in set(names or ()) - set(chosen):
        try:
            task = chosen[name] = mteb.get_task(name, languages=["eng"], exclusive_language_filter=True)
        except (KeyError, ValueError):  # no such task; no subset of it in English
            task = None
        if not task or "eng" not in task.languages or task.modalities != ["text"]:
            english = {t.metadata.name for t in mteb.get_tasks(languages=["eng"], exclude_superseded=False)}
            near = ", ".join(difflib.get_close_matches(name, sorted(english - {name}))) or "STSBenchmark"
            raise Error(f"expected an MTEB task on English text, got {name}; use one such as {near}")
    picked = [chosen[name] for name in dict.fromkeys(names or chosen)]
    return [part for task in picked for part in (task.metadata.tasks if task.is_aggregate else [task])]

def localize(task, data_dir):
    """The task on DIR/<hub path>/, filed by its contents; on a copy, as mteb shares metadata in a process."""
    folder, local = Path(data_dir, task.metadata.dataset["path"]), copy.copy(task)
    contents = contents_hash(sorted(f for f in folder.rglob("*") if f.is_file()), folder)
    source = {**task.metadata.dataset, "path": str(folder.absolute()), "revision": f"local-{contents}"}
    local.metadata = task.metadata.model_copy(update={"dataset": source})

    def load_data(*args, load=local.load_data, **settings):
        import datasets  # knows a local folder by its last name alone, and would serve the rows of another
        rows = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = Path(rows, source["revision"])
        try:
            load(*args, **settings)
        finally:
            datasets.config.HF_DATASETS_CACHE = rows
    local.load_data = load_data
    return local

def offline(data_dir):
    """Nothing from a hub, all from `data_dir`, if there is one."""
    if data_dir:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, at its import
        if not Path(data_dir).is_dir():
            raise Error(f"expected a folder for --data-dir, got {data_dir}; check the path")

def folder_for(out):
    """Make --out, and write there once: a full disk is found now, not after hours."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as trial:
            trial.write(bytes(100_000))
    except OSError as error:
        raise Error(f"expected a folder for --out, got {out} ({brief(error)}); pick another") from None

def check_results(out, tasks):
    """Refuse to mix with scores of another mteb or other data; set files aside that have no score."""
    from mteb.results import TaskResult
    expected = {task.metadata.name: task.metadata.revision for task in tasks}
    for file in sorted(Path(out).glob(f"results/*/{'[0-9a-f]' * 20}/*.json")):
        try:
            if file.stem == "model_meta":
                json.loads(file.read_text("utf-8"))["name"]
                continue
            found = TaskResult.from_disk(file)
            float(found.get_score())
        except Exception:  # cut short by a crash, or of another's making; pydantic has its own exceptions
            print(f"eval.py: {file} is damaged and will be made again", file=sys.stderr)
            file.rename(file.with_suffix(".damaged"))
            continue
        for key, want in (("mteb_version", version("mteb")), ("dataset_revision", expected.get(file.stem))):
            if want and (got := getattr(found, key)) != want:
                raise Error(f"expected {key} {want} in {out}, got {got} in {file.stem}; change --out")

def score(task, models, cache, *, data_dir, batch_size):
    """({label: TaskResult}, one line on why there are not more) of one task; its data is loaded once, and not
    at all if earlier runs have all scores."""
    import mteb
    found = {k: cache.load_task_result(task.metadata.name, m.mteb_model_meta) for k, m in models.items()}
    found = {k: r for k, r in found.items() if r and not r.get_missing_evaluations(task)}
    where, doing = task.metadata.dataset["path"], "data not loaded"
    try:  # whatever a data set's own loader or its rows raise: hours of other tasks are not lost for it
        for label in [label for label in models if label not in found]:
            if data_dir and not Path(where).is_dir():
                return found, f"no folder {os.path.relpath(where, data_dir)} in {data_dir}"
            task.load_data()  # nothing to do from the second model on
            doing = f"{label} not scored"
            options = {"batch_size": batch_size, "show_progress_bar": sys.stderr.isatty()}
            found[label] = mteb.evaluate(models[label], [task], cache=cache, encode_kwargs=options,
                                         co2_tracker=False, show_progress_bar=False).task_results[0]
    except Exception as error:
        return found, f"{doing}: {brief(error)}"
    finally:
        task.unload_data()
    return found, None

def into_card(path, rows, tasks):
    """Put scores, {task: score}, into the front matter of the card at `path`, where the hub reads them."""
    from huggingface_hub import EvalResult, ModelCard
    card = ModelCard.load(path)
    by_task = lambda results: {(r.dataset_type, r.dataset_config, r.metric_type): r for r in results}
    new = [EvalResult(task_type=tasks[name].type, dataset_type=tasks[name].dataset["path"],
                      dataset_name=name, dataset_config=name, metric_type=tasks[name].main_score,
                      metric_value=float(value)) for name, value in rows.items()]
    both = by_task(card.data.eval_results or ()) | by_task(new)
    card.data.model_name, card.data.eval_results = path.resolve().parent.name, list(both.values())
    write_whole(path, str(card))

def evaluate(paths, tasks=None, data_dir=None, out="runs/mteb", *, batch_size=32, device="auto",
             dtype="float32", benchmark=BENCHMARK, command=""):
    """Score checkpoints on tasks (names; None: all of the benchmark); the table, also written to `out`."""
    offline(data_dir)
    start, folders = time.time(), {path: find(path) for path in paths}
    folder_for(out)
    import mteb
    import torch
    tasks = pick(tasks, benchmark)
    public = {task.metadata.name: task.metadata for task in tasks}
    tasks = [localize(task, data_dir) if data_dir else task for task in tasks]
    check_results(out, tasks)
    models, names = {}, [Path(os.path.abspath(path)).name for path in folders]
    for name, (path, folder) in zip(names, folders.items()):
        # mteb calls every local folder alike and would serve one the scores of another: we name them.
        filed = {"name": f"local/{name}" if Path(path).exists() else path,
                 "revision": revision(folder, dtype)}
        model = mteb.models.SentenceTransformerEncoderWrapper(load(path, device, dtype))
        model.mteb_model_meta = model.mteb_model_meta.model_copy(update=filed)
        models[path if names.count(name) > 1 else name] = model
    cache, rows, missing = mteb.ResultCache(out), [], {}
    for number, task in enumerate(tasks, 1):
        name, began = task.metadata.name, time.time()
        found, reason = score(task, models, cache, data_dir=data_dir, batch_size=batch_size)
        missing |= {name: reason} if reason else {}
        rows.append({"task": name, "type": task.metadata.type, "metric": task.metadata.main_score,
                     "scores": {k: round(100 * found[k].get_score(), 4) for k in models if k in found},
                     "seconds": {k: round(found[k].evaluation_time or 0, 1) for k in models if k in found}})
        print(f"[{number}/{len(tasks)}] {name}:", *(f"{k} {s:.2f}" for k, s in rows[-1]["scores"].items()),
              f"({reason or f'{time.time() - began:.1f} s'})", file=sys.stderr, flush=True)
    table = {"command": command, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
             "seconds": round(time.time() - start, 1), "threads": torch.get_num_threads(),
             "batch_size": batch_size, "dtype": dtype,
             "device": str(next(iter(models.values())).model.device),
             "versions": {p: version(p) for p in ("mteb", "torch", "transformers", "sentence-transformers")},
             "revisions": {label: model.mteb_model_meta.revision for label, model in models.items()},
             "tasks": rows, **means(rows, list(models)), "missing": missing}
    try:
        write_json(Path(out, "table.json"), table)
        write_whole(Path(out, "table.md"), render(table))
    except OSError as error:                           # main still prints the table
        print(f"eval.py: table not written to {out}: {brief(error)}", file=sys.stderr)
    for label, path in zip(models, folders):
        if Path(path, "t2t.json").is_file() and dtype == "float32":    # of t2t.py: its card names its scores
            scores = {row["task"]: row["scores"][label] for row in rows if label in row["scores"]}
            try:
                into_card(Path(path, "README.md"), scores, public)
            except Exception as error:                 # a card of the user's own, or read-only
                print(f"eval.py: scores not put into {path}/README.md: {brief(error)}", file=sys.stderr)
    return table

# ------------------------------------------------------------------------------------------ 3. the table
def means(rows, labels):
    """Means per category, over tasks and over categories, of what every checkpoint has: like for like."""
    mean = lambda scores: {k: sum(s[k] for s in scores) / len(scores) if scores else None for k in labels}
    shared = [row for row in rows if all(label in row["scores"] for label in labels)]
    types = {kind: mean([row["scores"] for row in shared if row["type"] == kind])
             for kind in dict.fromkeys(row["type"] for row in shared)}
    return {"means_of": f"{len(shared)} of {len(rows)}", "types": types,
            "mean_task": mean([row["scores"] for row in shared]), "mean_type": mean(list(types.values()))}

def render(table):
    """Markdown, padded so that it reads as well in a terminal."""
    labels = list(table["revisions"])
    texts = lambda scores: ["-" if scores.get(k) is None else f"{scores[k]:.2f}" for k in labels]
    cells = [["category", "task", "metric", *labels]]
    cells += [[row["type"], row["task"], row["metric"], *texts(row["scores"])] for row in table["tasks"]]
    cells += [[kind, "**mean**", "", *texts(scores)] for kind, scores in table["types"].items()]
    cells += [["**all**", "**mean over tasks**", table["means_of"], *texts(table["mean_task"])],
              ["**all**", "**mean over categories**", str(len(table["types"])), *texts(table["mean_type"])]]
    widths = [max(5, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w if i < 3 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    pads = [str.ljust] * 3 + [str.rjust] * len(labels)
    text = [f"| {' | '.join(pad(*cell) for pad, *cell in zip(pads, row, widths))} |" for row in cells] + [""]
    text += [f"- not scored: {task}: {reason}" for task, reason in table["missing"].items()]
    versions = ", ".join(" ".join(pair) for pair in table["versions"].items())
    text += [f"Scores x 100; {table['seconds']} s in {table['dtype']} on {table['device']}, threads "
             f"{table['threads']}, batch size {table['batch_size']}; {versions}; {table['date']}; "
             f"`{table['command']}`"]
    return "\n".join(text) + "\n"

# ----------------------------------------------------------------------------------- 4. --sparse
SPARSE_TASKS = ["SciFact", "LIMITSmallRetrieval", "STS12", "STS13", "STSBenchmark"]

class Remembering:
    """A search model of mteb that remembers its rankings, {query: {document: score}}, for fusion."""
    def __init__(self, inner):
        self.index, self.search_in, self.mteb_model_meta = inner.index, inner.search, inner.mteb_model_meta

    def search(self, queries, **settings):
        self.rankings = self.search_in(queries, **settings | {"top_k": 1000})
        return self.rankings

class Fusion:
    """Rankings of others, fused by rank alone, so that nothing is tuned: a document's sum of 1 / (60 + rank)
    (Cormack and others, 2009)."""
    def __init__(self, names, ranked):
        from mteb.models import ModelMeta
        self.names, self.ranked = names, ranked
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"fused/{'-'.join(names)}", "revision": "1"})

    def index(self, corpus, **_):
        pass

    def search(self, queries, **_):
        from mteb.models.hybrid_wrappers import fuse_rrf
        def ranking(name, query):  # BM25 and the sparse vectors give 0 to a document without a word in common
            found = self.ranked[name].rankings[query].items()
            return {document: s for document, s in found if s > 0 or name == "dense"}
        return {query: fuse_rrf([ranking(name, query) for name in self.names], [1] * len(self.names))
                for query in queries["id"]}

def compare_sparse(path, tasks, *, batch_size, device, dtype="float32"):
    """Scores x 100 of dense, sparse, BM25 and their fusions on mteb tasks -> {row: {task: score}}, and
    {task: why scores are missing}"""
    import mteb
    from mteb.models import SearchEncoderWrapper, SentenceTransformerEncoderWrapper, SparseEncoderWrapper
    encoders = {"dense": SentenceTransformerEncoderWrapper(load(path, device, dtype)),
                "sparse": SparseEncoderWrapper(load(path, device, dtype, sparse=True))}
    table, missing, options = {}, {}, {"batch_size": batch_size, "show_progress_bar": False}

    def score(name, model, task):
        got = mteb.evaluate(model, [task], cache=None, encode_kwargs=options, co2_tracker=False,
                            show_progress_bar=False)
        row = table.setdefault(name, {})
        row[task.metadata.name] = round(100 * got.task_results[0].get_score(), 2)
        print(f"{task.metadata.name}, {name}: {row[task.metadata.name]:.2f}", file=sys.stderr, flush=True)

    def score_all(task):
        task.load_data()
        if task.metadata.type != "Retrieval":
            for name, encoder in encoders.items():
                score(name, encoder, task)
            return
        ranked = {name: Remembering(SearchEncoderWrapper(encoder)) for name, encoder in encoders.items()}
        ranked["BM25"] = Remembering(mteb.get_model("mteb/baseline-bm25s"))
        for name, model in ranked.items():
            score(name, model, task)
        for names in (*combinations(ranked, 2), tuple(ranked)):
            score(" + ".join(names), Fusion(names, ranked), task)

    for task in tasks:
        try:
            score_all(task)
        except Exception as error:                     # of a loader, or of its rows; other tasks go on
            missing[task.metadata.name] = brief(error)
            print(f"{task.metadata.name} not scored: {brief(error)}", file=sys.stderr)
        finally:
            task.unload_data()
    return table, missing

def render_sparse(table, tasks):
    """{row: {task: score}} -> Markdown"""
    lines = ["| | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[t]:.2f}" if t in row else "" for t in tasks) + " |")
    return "\n".join(lines) + "\n"

def evaluate_sparse(paths, tasks=None, data_dir=None, out="runs/mteb", *, batch_size=32, device="auto",
                    dtype="float32", benchmark=BENCHMARK, command=""):
    """The table of each checkpoint, and which tasks have no scores; tables also go to OUT/sparse-NAME.json
    and .md, NAME the folder's (with the folders above it, if two are called alike)."""
    offline(data_dir)
    import torch
    pages, all_missing = [], {}
    folder_for(out)
    names = [Path(path).resolve().name for path in paths]
    for path in paths:                                 # a wrong one is refused before hours of work
        if not (find(path) / "sparse" / "modules.json").is_file():
            raise Error(f"expected CKPT/sparse for --sparse, got none in {path}; train it with t2t.py")
    for path, name in zip(paths, names):
        name = "-".join(Path(path).resolve().parts[1:]) if names.count(name) > 1 else name
        chosen = pick(tasks or (SPARSE_TASKS if benchmark == BENCHMARK else None), benchmark)
        chosen = [localize(t, data_dir) if data_dir else t for t in chosen]
        t0 = time.time()
        table, missing = compare_sparse(path, chosen, batch_size=batch_size, device=device, dtype=dtype)
        all_missing |= missing
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        facts = {"command": command, "date": date, "dtype": dtype, "rows": table, "missing": missing,
                 "seconds": round(time.time() - t0, 1), "threads": torch.get_num_threads(),
                 "versions": {p: version(p) for p in ("mteb", "torch", "sentence-transformers", "bm25s")}}
        found = [t.metadata.name for t in chosen if t.metadata.name not in missing]
        pages.append(f"{name}, scores x 100\n\n{render_sparse(table, found)}"
                     + "".join(f"- not scored: {task}: {why}\n" for task, why in missing.items()))
        write_json(Path(out, f"sparse-{name}.json"), facts)
        write_whole(Path(out, f"sparse-{name}.md"), pages[-1])
    return "".join(pages), all_missing

# ----------------------------------------------------------------------------------- 5. the command line
def main(argv=None):
    parser = argparse.ArgumentParser("eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda line: parser.exit(2, f"eval.py: error: {line}\n")  # argparse would add its usage
    parser.add_argument("paths", nargs="+", metavar="CKPT", help="a model folder, or a hub id")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="default: all of the benchmark")
    parser.add_argument("--benchmark", metavar="NAME", default=BENCHMARK, help="default: %(default)s")
    parser.add_argument("--data-dir", metavar="DIR", help="data in DIR/<hub dataset path>/, offline")
    parser.add_argument("--out", metavar="DIR", default="runs/mteb", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of arithmetic; bfloat16 is faster where the processor computes it")
    parser.add_argument("--sparse", action="store_true", help="compare sparse vectors, dense ones and BM25")
    args = parser.parse_args(argv)
    print_anything()
    try:
        if empty := [name for name, value in vars(args).items() if value == "" or "" in (
                value if isinstance(value, list) else ())]:
            option = "CKPT" if empty[0] == "paths" else flag(empty[0])
            raise Error(f"expected a value for {option}, got an empty one; is a variable not set?")
        if args.batch_size < 1:
            raise Error(f"expected a positive number for --batch-size, got {args.batch_size}; try 32")
        options = vars(args) | {"command": shlex.join(["python", "eval.py", *(argv or sys.argv[1:])])}
        if options.pop("sparse"):
            page, missing = evaluate_sparse(**options)
            print(page, end="")
            return 3 if missing else 0
        table = evaluate(**options)
    except Error as error:
        parser.error(error)
    except OSError as error:
        parser.error(f"expected to read models and write to {args.out} and the cache, got {brief(error)}")
    except KeyboardInterrupt:
        kept = "" if args.sparse else f"; scores are kept in {args.out}, run it again"
        print(f"\neval.py: interrupted{kept}", file=sys.stderr)
        return 130
    print(render(table), end="")
    return 3 if table["missing"] else 0

if __name__ == "__main__":
    logging.captureWarnings(True)  # print errors alone: no notices, load reports, bars over rows
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    sys.exit(main())
