"""Training: it learns, resumes bit for bit, gives a checkpoint that all libraries read alike, ends kindly."""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ANIMALS, PLACES, PROCESSES, family, sentences
from torch.testing import assert_close

import t2t
from plumbing import cli as cli_module
from plumbing import folders
from plumbing.cli import Error
from t2t import Config, Embedder, bucketed_batch, learning_rate, train

ROOT = Path(t2t.__file__).parent


def config(backbone, texts_file, out, **more):
    """Small, and in float32 on all weights, where two runs that should agree do so to the last bit."""
    base = dict(backbone=str(backbone), corpus=str(texts_file), out=str(out), method="data", steps=6,
                batch_size=16, lr=4e-3, lora_rank=0, max_length=64, save_every=2, device="cpu",
                dtype="float32")
    if more.get("method", "data") in t2t.WITH_TARGETS:
        base["top_k"] = 8
    return Config(**{**base, **more})


def weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "model.safetensors")


class Stop(Exception):
    pass


def crash_at(n):
    """For on_step: ends a run after step n."""
    def on_step(step, _):
        if step == n:
            raise Stop
    return on_step


def log(folder):
    folder = Path(folder) / "state" if (Path(folder) / "state").exists() else Path(folder)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- the order
def test_every_text_once_an_epoch():
    lengths = np.random.default_rng(0).integers(3, 99, 1000)
    for epoch in (0, 3):
        seen = np.concatenate([bucketed_batch(epoch * 31 + i, 7, lengths, 32) for i in range(31)])
        assert len(np.unique(seen)) == 31 * 32
    first = bucketed_batch(0, 7, lengths, 32)
    assert not np.array_equal(first, bucketed_batch(31, 7, lengths, 32))                     # epochs differ
    assert not np.array_equal(first, bucketed_batch(0, 8, lengths, 32))                       # seeds differ
    np.testing.assert_array_equal(bucketed_batch(40, 7, lengths, 32), bucketed_batch(40, 7, lengths, 32))
    grouped = np.mean([np.ptp(lengths[bucketed_batch(i, 7, lengths, 32)]) for i in range(16)])
    assert grouped < 0.2 * np.ptp(lengths)                                           # like lengths together


def test_learning_rate_by_hand():
    assert [learning_rate(s, 100, 1.0) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(55, 100, 1.0) == pytest.approx(0.55)
    assert learning_rate(100, 100, 1.0) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------- learning
def test_it_learns_and_the_vocabulary_is_frozen(backbone, learned):
    facts = json.loads((learned / "t2t.json").read_text())
    last = [r["loss"] for r in log(learned)[-30:]]
    assert np.mean(last) < facts["constant_loss"] - 0.3                   # better than any constant
    before, after = weights(backbone), weights(learned)
    assert set(before) == set(after)                             # the head is still tied
    for name in before:
        assert torch.equal(after[name], before[name]) == (name == "model.embed_tokens.weight"), name
    texts = [(a, f"The {a} sees the {a} in the {p}.") for a in ANIMALS for p in PLACES]

    def lit(folder):                                # in how many texts the animal is among the first five
        rows = Embedder.load(folder).top_tokens([text for _, text in texts], 5)
        return np.mean([animal in [token for token, _ in row] for (animal, _), row in zip(texts, rows)])
    assert lit(backbone) < 0.4 and lit(learned) > 0.7
    lines = log(learned)
    assert [r["step"] for r in lines] == list(range(1, 1001))
    assert set(lines[0]) == {"step", "loss", "constant_loss", "lr", "grad_norm", "seconds"}


@pytest.mark.parametrize("length", [8, 64])                         # longer and shorter texts than this
def test_micro_batches_give_the_same_gradient(backbone, texts_file, tmp_path, length):
    runs = [train(config(backbone, texts_file, tmp_path / str(n), steps=1, micro_batch=n, max_length=length))
            for n in (8, 16, 1)]
    norms = [log(r)[0]["grad_norm"] for r in runs]
    losses = [log(r)[0]["loss"] for r in runs]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_adapters_are_merged(backbone, texts_file, tmp_path):
    out = train(config(backbone, texts_file, tmp_path / "a", lora_rank=4, lr=1e-2))
    before, after = weights(backbone), weights(out)
    assert set(before) == set(after)                        # no adapter is left, and the head is still tied
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "proj" in k}


def test_own_targets_and_own_step(backbone, texts_file, tmp_path, tok):
    dog = tok(" dog", add_special_tokens=False)["input_ids"][-1]
    seen = []

    def always_dog(rows):
        return np.full((len(rows), 1), dog, np.int32), np.ones((len(rows), 1), np.float32)
    out = train(config(backbone, texts_file, tmp_path / "a", steps=30, lr=2e-2),
                targets=always_dog, on_step=lambda step, e: seen.append((step, e.encode(["x"]).shape)))
    assert seen == [(s, (1, 32)) for s in range(1, 31)]
    assert [row[0][0] for row in Embedder.load(out).top_tokens(["The cat.", "The river."])] == ["dog", "dog"]


def test_a_token_that_own_targets_name_twice_counts_once(backbone, texts_file, tmp_path):
    """Two texts in turn, tokens 7 and 9: named twice with 1/2 each, their entropy is 0, so the loss of the
    best constant is log 2."""
    calls = itertools.count()

    def twice(rows):
        token = [7 if next(calls) % 2 else 9 for _ in rows]
        return np.array([[v, v] for v in token], np.int32), np.full((len(rows), 2), 0.5, np.float32)
    train(config(backbone, texts_file, tmp_path / "a", steps=1), targets=twice)
    facts = json.loads((tmp_path / "a" / "t2t.json").read_text())
    assert facts["constant_loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_own_targets_of_any_type_and_strides():
    """Ids as the function gets them (uint32), and views that run backwards."""
    i = np.array([[5, 7, 5], [9, 8, 3]], np.uint32)[:, ::-1]
    own = t2t.own_targets(lambda rows: (i, np.array([[0.5, 0.25, 0.25], [0, 0, 1]])[:, ::-1]), 8, 10)
    indices, probs = own([[1], [2]])
    with pytest.raises(Error, match="a row for each of 3 texts, got 2"):
        own([[1], [2], [3]])
    assert [dict(zip(*row)) for row in zip(indices.tolist(), probs.tolist())] == [
        {5: 0.75, 7: 0.25, -1: 0.0}, {3: 1.0, -1: 0.0}]


def test_own_targets_may_not_be_wider_than_k(backbone, texts_file, tmp_path):
    wide = lambda rows: (np.tile(np.arange(9, dtype=np.int32), (len(rows), 1)),
                         np.ones((len(rows), 9), np.float32))
    with pytest.raises(Error, match=r"k <= top_k = 8, and probs \(n,k\), got int32 \(\d+, 9\)"):
        train(config(backbone, texts_file, tmp_path / "a", top_k=8), targets=wide)


@pytest.mark.parametrize("index, p, says", [
    (7, [0.5], "a sum of 1 a row"), (7, [math.nan], "a sum of 1 a row"), (7, [1.5, -0.5], "not negative"),
    (500, [1.0], "indices from -1 to 499, got 500"), (-2, [1.0], "indices from -1 to 499, got -2"),
    (7.0, [1.0], "got float64")])
def test_own_targets_are_checked(index, p, says):
    with pytest.raises(Error, match=f"targets: expected .*{says}"):
        t2t.check_own_targets(np.full((3, len(p)), index), np.tile(p, (3, 1)), 8, 500, n=3)


def test_own_targets_are_resumed_with_the_same_function_alone(backbone, texts_file, tmp_path):
    four = np.arange(100, 104, dtype=np.int32)
    even = lambda rows: (np.stack([four + len(row) % 5 for row in rows]),
                         np.full((len(rows), 4), 0.25, np.float32))
    whole = train(config(backbone, texts_file, tmp_path / "whole"), targets=even)
    with pytest.raises(Stop):
        train(config(backbone, texts_file, tmp_path / "part"), targets=even, on_step=crash_at(5))
    with pytest.raises(Error, match="the loss that ignores the text"):
        train(config(backbone, texts_file, tmp_path / "part", resume=True))
    part = train(config(backbone, texts_file, tmp_path / "part", resume=True), targets=even)
    assert_close(weights(part), weights(whole), rtol=0, atol=0)
    with pytest.raises(Error, match="targets: expected --method data, model, both, got simcse"):
        train(Config(method="simcse", out=str(tmp_path / "b")), targets=even)


def test_out_may_be_a_link(backbone, texts_file, tmp_path):
    """To a folder on another disk, say: the checkpoint lands there, and the link stays one."""
    (tmp_path / "big").mkdir()
    (tmp_path / "ckpt").symlink_to(tmp_path / "big")
    out = train(config(backbone, texts_file, tmp_path / "ckpt", steps=1))
    assert Path(out).is_symlink() and (tmp_path / "big" / "t2t.json").exists()
    assert Embedder.load(out).encode(["x"]).shape == (1, 32)


def test_init_where_the_tokenizer_names_no_padding(backbone, tok, texts_file, tmp_path):
    """Then some token serves as padding, which the checkpoint names: still the same vocabulary."""
    from transformers import PreTrainedTokenizerFast
    mine = shutil.copytree(backbone, tmp_path / "mine")
    for name in "tokenizer.json", "tokenizer_config.json":
        (mine / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer).save_pretrained(mine)
    first = train(config(mine, texts_file, tmp_path / "a", steps=1))
    assert train(config(mine, texts_file, tmp_path / "b", steps=1, init=first))


def test_stages_and_none(backbone, texts_file, tmp_path):
    none = train(Config(backbone=str(backbone), out=str(tmp_path / "none"), method="none", device="cpu"))
    first = train(config(backbone, texts_file, tmp_path / "first"))
    second = train(config(backbone, texts_file, tmp_path / "second", init=first, steps=1, lr=1e-9))
    for k, w in weights(none).items():
        assert_close(w, weights(backbone)[k])
    a, b = weights(first), weights(second)
    for k in a:                                          # the second stage starts where the first one ended
        assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)
    assert (Path(none) / "sparse").exists()


@pytest.mark.parametrize("settings", [
    dict(attention="causal", pooling="last"), dict(dtype="bfloat16", steps=2)])
def test_every_way_runs(backbone, texts_file, tmp_path, settings):
    out = train(config(backbone, texts_file, tmp_path / "a", **{"steps": 3, **settings}))
    assert all(np.isfinite(r["loss"]) for r in log(out))


def test_more_batch_than_texts(backbone, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences(5)))
    out = train(config(backbone, tmp_path / "a.txt", tmp_path / "out", batch_size=64))
    assert json.loads((Path(out) / "t2t.json").read_text())["texts_seen"] == 6 * 5


# --------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("rank, dtype", [(0, "float32"), (4, "bfloat16")])
def test_resumed_equals_uninterrupted(backbone, texts_file, tmp_path, rank, dtype):
    whole = train(config(backbone, texts_file, tmp_path / "whole", lora_rank=rank, dtype=dtype))
    with pytest.raises(Stop):
        train(config(backbone, texts_file, tmp_path / "part", lora_rank=rank, dtype=dtype),
              on_step=crash_at(5))                               # the state is that of step 4
    assert [f.name for f in (tmp_path / "part").iterdir()] == ["state"]
    part = train(config(backbone, texts_file, tmp_path / "part", lora_rank=rank, dtype=dtype, resume=True))
    assert_close(weights(part), weights(whole), rtol=0, atol=0)
    for a, b in zip(log(part), log(whole), strict=True):
        assert {k: a[k] for k in a if k != "seconds"} == {k: b[k] for k in b if k != "seconds"}
    assert not (Path(part) / "state").exists()


def cli(*args, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen([sys.executable, "t2t.py", *map(str, args)], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_ctrl_c_leaves_a_state(backbone, texts_file, tmp_path):
    out = tmp_path / "out"
    args = ["--backbone", backbone, "--corpus", texts_file, "--out", out, "--batch-size", 16, "--top-k", 8,
            "--steps", 4000, "--save-every", 2, "--device", "cpu", "--dtype", "float32", "--method", "data"]
    run = cli(*args)
    for _ in range(3000):
        if (out / "state" / "last.pt").exists() and len(log(out)) > 5:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command with --resume goes on" in err and "Traceback" not in err
    assert torch.load(out / "state" / "last.pt", weights_only=True)["run"]["step"] == log(out)[-1]["step"]
    with pytest.raises(Error, match="add --resume"):            # without: refused, nothing is lost
        train(config(backbone, texts_file, out))


def test_ctrl_c_says_how_to_go_on(backbone, texts_file, tmp_path):
    stop = lambda step, _: step == 2 and os.kill(os.getpid(), signal.SIGINT)
    for more, how in ({}, "goes on"), ({"overwrite": True}, "in place of --overwrite goes on"):
        with pytest.raises(KeyboardInterrupt, match=f"after step 3: the same command with --resume {how}"):
            train(config(backbone, texts_file, tmp_path / "a", **more), on_step=stop)
    assert train(config(backbone, texts_file, tmp_path / "a", resume=True))


def test_a_folder_beside_which_nothing_can_be_made(backbone, texts_file, tmp_path, monkeypatch):
    """The checkpoint appears by renaming, so this would fail after training."""
    (tmp_path / "a").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with pytest.raises(Error, match=f"--out: .* {tmp_path} can not be written: pass {tmp_path}/a/ckpt"):
        train(config(backbone, texts_file, tmp_path / "a"))
    assert train(config(backbone, texts_file, tmp_path / "a" / "ckpt", steps=1))


def test_resume_with_changed_arguments(backbone, texts_file, tmp_path):
    with pytest.raises(Stop):                          # on_step comes before the saving: step 2 finds one
        train(config(backbone, texts_file, tmp_path / "c", save_every=1), on_step=crash_at(2))
    with pytest.raises(Error, match=r"--lr 0.5 \(was 0.004\), --seed 7 \(was 42\)"):
        train(config(backbone, texts_file, tmp_path / "c", resume=True, lr=0.5, seed=7))


def test_another_backbone_is_refused(backbone, texts_file, tmp_path):
    """Other weights in the same folder, between the stop and --resume."""
    mine = shutil.copytree(backbone, tmp_path / "mine")
    with pytest.raises(Stop):
        train(config(mine, texts_file, tmp_path / "a"), on_step=crash_at(3))
    family("llama", V=500, tie_word_embeddings=True).save_pretrained(mine)
    with pytest.raises(Error, match="weights of the backbone"):
        train(config(mine, texts_file, tmp_path / "a", resume=True))


def test_a_weight_that_no_text_uses_is_resumed(backbone, texts_file, tmp_path, monkeypatch):
    """Such as those of the part of a model that sees: AdamW has no moments for it."""
    real = t2t.make_trainable

    def with_unused(model, rank, seed):
        adapted = real(model, rank, seed)
        model.unused = torch.nn.Parameter(torch.ones(3))
        return adapted
    monkeypatch.setattr(t2t, "make_trainable", with_unused)
    with pytest.raises(Stop):
        train(config(backbone, texts_file, tmp_path / "a"), on_step=crash_at(3))
    assert len(log(train(config(backbone, texts_file, tmp_path / "a", resume=True)))) == 6


def test_another_tokenizer_is_refused(backbone, texts_file, tmp_path):
    """The same words under other numbers: the weights would read other tokens."""
    mine = shutil.copytree(backbone, tmp_path / "mine")
    with pytest.raises(Stop):
        train(config(mine, texts_file, tmp_path / "a"), on_step=crash_at(3))
    text = (mine / "tokenizer.json").read_text()
    ids = json.loads(text)["model"]["vocab"]
    one, two = (f'"{word}":{ids[word]}' for word in ("\u0120dog", "\u0120cat"))
    text = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    swapped = text.replace(one, one.replace("dog", "?")).replace(two, two.replace("cat", "dog"))
    (mine / "tokenizer.json").write_text(swapped.replace(one.replace("dog", "?"), one.replace("dog", "cat")))
    with pytest.raises(Error, match="--resume: .*tokenizer"):
        train(config(mine, texts_file, tmp_path / "a", resume=True))


def test_what_others_put_into_out_stays(backbone, texts_file, tmp_path):
    """Before a run: refused, also in a folder called state. While it runs: kept."""
    (tmp_path / "a" / "state").mkdir(parents=True)
    (tmp_path / "a" / "state" / "notes.txt").write_text("mine")
    with pytest.raises(Error, match="holds state/notes.txt"):
        train(config(backbone, texts_file, tmp_path / "a", steps=1))
    out = train(config(backbone, texts_file, tmp_path / "b", steps=1),
                on_step=lambda *_: (tmp_path / "b" / "notes.txt").write_text("mine"))
    assert (Path(out) / "notes.txt").read_text() == "mine" and not (Path(out) / "state").exists()


def hold(out, held):
    folders.start(Config(out=out))
    held.set()
    time.sleep(600)


def test_two_runs_do_not_share_a_folder(backbone, texts_file, tmp_path):
    """Even before the first saving."""
    held = PROCESSES.Event()
    first = PROCESSES.Process(target=hold, args=(str(tmp_path / "a"), held))
    first.start()
    try:
        assert held.wait(300)
        with pytest.raises(Error, match="another run writes to"):
            train(config(backbone, texts_file, tmp_path / "a", steps=1))
    finally:
        first.kill()
        first.join()
    assert train(config(backbone, texts_file, tmp_path / "a", steps=1))    # its lock has ended with it


def test_a_clusters_own_variables(backbone, tmp_path):
    """They start no processes: none waits for others that do not come. (RANK alone: see the console that is
    not UTF-8.)"""
    args = ["--backbone", str(backbone), "--method", "none", "--out", str(tmp_path / "a"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "t2t.py", *args], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 2 and "expected torchrun to start several processes" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "a" / "t2t.json").exists()


def test_a_reader_that_goes_away_and_a_console_that_is_closed(backbone, texts_file, tmp_path):
    line = (f"{sys.executable} t2t.py --backbone {backbone} --corpus {texts_file} --method data --top-k 8 "
            "--device cpu --show-targets 300")
    piped = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [subprocess.Popen(["bash", "-c", f"{line} {end}"], **piped)
            for end in ("| head -1; exit ${PIPESTATUS[0]}", ">&- 2>&-")]
    for run in both:
        _, err = run.communicate(timeout=300)
        assert run.returncode in (0, 141) and "error" not in err and "Traceback" not in err


def test_out_may_not_be_in_the_corpus(backbone, texts_file, tmp_path):
    """On --resume, the log of the run would be read as texts."""
    shutil.copy(texts_file, tmp_path)
    with pytest.raises(Error, match="--out: expected a folder outside of --corpus"):
        train(config(backbone, tmp_path, tmp_path / "ckpt", steps=1))


def test_init_with_fewer_positions(backbone, tok, texts_file, tmp_path):
    """What is read in use, and --max-length, are at most its positions."""
    family("llama", len(tok), max_position_embeddings=40).save_pretrained(tmp_path / "short")
    tok.save_pretrained(tmp_path / "short")
    settings = dict(steps=1, init=str(tmp_path / "short"))
    with pytest.raises(Error, match="expected at most 8, since .*short has 40 positions and the question "
                                    "takes 32, got 64"):
        train(config(backbone, texts_file, tmp_path / "a", **settings))
    out = train(config(backbone, texts_file, tmp_path / "b", **settings, max_length=8))
    assert Embedder.load(out).max_length == 40


def test_a_model_too_short_for_the_question(tok, texts_file, tmp_path):
    family("llama", len(tok), max_position_embeddings=16).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    for prompt, says in ("{}", "--method both: expected a model of 40 positions.*, got 16: lower"), (
            Config.prompt, "--prompt: expected a question that fits, but it takes .* has 16 positions"):
        with pytest.raises(Error, match=says):
            train(config(tmp_path / "m", texts_file, tmp_path / "a", method="both", prompt=prompt,
                         max_length=8))


def test_maps_that_take_no_adapters(backbone, texts_file, tmp_path, monkeypatch):
    """A Linear of a model's own, with a weight for each half of its input."""
    class Halves(torch.nn.Linear):
        def forward(self, x):
            return torch.cat([F.linear(*pair) for pair in zip(x.chunk(2, -1), self.weight.chunk(2))], -1)

    real = t2t.load_backbone

    def with_halves(*args, **kwargs):
        model, tok = real(*args, **kwargs)
        model.model.layers[0].mlp.gate_proj = Halves(16, 64, bias=False)
        return model, tok
    monkeypatch.setattr(t2t, "load_backbone", with_halves)
    assert train(config(backbone, texts_file, tmp_path / "a", steps=1))
    with pytest.raises(Error, match="--lora-rank: .* pass --lora-rank 0"):
        train(config(backbone, texts_file, tmp_path / "b", steps=1, lora_rank=4))


def test_resume_with_nothing_to_resume_starts(backbone, texts_file, tmp_path, capsys):
    """A job scheduler repeats one command."""
    out = train(config(backbone, texts_file, tmp_path / "a", resume=True, steps=1))
    assert "no interrupted run" in capsys.readouterr().out and len(log(out)) == 1


def test_overwrite(backbone, texts_file, tmp_path):
    out = train(config(backbone, texts_file, tmp_path / "a", steps=1))
    with pytest.raises(Error, match="holds a finished checkpoint: add --overwrite"):
        train(config(backbone, texts_file, out))
    with pytest.raises(Stop):                                 # the old one stays until the new one is there
        train(config(backbone, texts_file, out, steps=2, overwrite=True), on_step=crash_at(1))
    assert Embedder.load(out).encode(["x"]).shape == (1, 32)
    again = train(config(backbone, texts_file, out, steps=3, overwrite=True))
    assert len(log(again)) == 3 and not (Path(out) / "state").exists()


def test_overwrite_of_a_mistake_keeps_the_interrupted_run(backbone, texts_file, tmp_path):
    with pytest.raises(Stop):
        train(config(backbone, texts_file, tmp_path / "a"), on_step=crash_at(5))
    with pytest.raises(Error, match="no-such-file"):
        train(config(backbone, "no-such-file.txt", tmp_path / "a", overwrite=True))
    train(config(backbone, texts_file, tmp_path / "a", resume=True))


def test_what_a_kill_amid_the_last_renames_left(backbone, texts_file, tmp_path):
    """OUT aside and none in place: it is put back. Both: the one aside goes."""
    out, aside = tmp_path / "a", tmp_path / ".a.t2t-old"
    train(config(backbone, texts_file, out))
    out.rename(aside)
    with pytest.raises(Error, match="holds a finished checkpoint"):
        train(config(backbone, texts_file, out))
    aside.mkdir()
    with pytest.raises(Error, match="holds a finished checkpoint"):
        train(config(backbone, texts_file, out))
    assert not aside.exists()


# --------------------------------------------------------------------------------------------- the checkpoint
@pytest.fixture(scope="module")
def checkpoint(backbone, texts_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("a") / "ckpt"
    return Path(train(config(backbone, texts_file, out, steps=200, lr=1e-2)))


def relative(a, b):
    return np.abs(a - b).max(1) / np.abs(b).max(1)


def test_one_vector_everywhere(checkpoint):
    from sentence_transformers import SentenceTransformer
    texts = sentences(20) + ["dog", "A much longer text. " + " ".join(sentences(20))]
    a = Embedder.load(checkpoint).encode(texts, batch_size=1)
    assert relative(Embedder.load(checkpoint).encode(texts, batch_size=64), a).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-6)
    st = SentenceTransformer(str(checkpoint), device="cpu")
    assert st.max_seq_length == 256                                  # in use; training read 64
    for side in ("right", "left"):
        st.tokenizer.padding_side = side
        assert relative(st.encode(texts), a).max() < 1e-5
    import eval as evaluation
    assert relative(evaluation.load(str(checkpoint), "cpu").encode(texts), a).max() < 1e-5


def test_one_file_of_weights(checkpoint, learned, backbone):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    assert model.config.is_causal is True
    assert AutoConfig.from_pretrained(learned).is_causal is False    # it was bidirectional
    assert AutoTokenizer.from_pretrained(checkpoint).padding_side == "right"
    assert os.path.samefile(checkpoint / "model.safetensors", checkpoint / "sparse" / "model.safetensors")
    own = weights(backbone)["model.embed_tokens.weight"]
    assert_close(model.get_output_embeddings().weight, own, rtol=0, atol=0)


def test_sparse_encoder_reads_the_head(checkpoint):
    from sentence_transformers import SparseEncoder
    texts = ["The wolf follows the goat in the desert.", "A bird.", *sentences(5)]
    e, sparse = Embedder.load(checkpoint), SparseEncoder(str(checkpoint / "sparse"), device="cpu")
    z = sparse.encode(texts).to_dense().cpu()                        # in one batch, padded
    assert (z > 0).sum(1).max() <= e.SPARSE_K
    assert_close(F.normalize(z, dim=1), e.sparse(texts), rtol=1e-4, atol=1e-4)
    assert sparse.similarity_fn_name == "cosine"
    W, h = t2t.head(e.model).weight.double(), e.pooled(e.token_ids(texts[:1]))[0].double()
    top = (W @ (h - e.mean.double())).clamp_min(0).topk(e.SPARSE_K)  # the first text by hand, in float64
    want = torch.zeros(len(W)).double().scatter_(0, top.indices, top.values)
    assert_close(z[0].double(), want, rtol=1e-4, atol=1e-4)
    [found] = sparse.decode(sparse.encode(texts[:1]), top_k=1)
    assert found[0][0] == e.tok.convert_ids_to_tokens([int(z[0].argmax())])[0]


def test_explain_adds_up(checkpoint):
    e, (a, b) = Embedder.load(checkpoint), ("The wolf sees the goat.", "A goat hears the wolf.")
    y = F.normalize(e.sparse([a, b], 20).double(), dim=1)
    score, parts = e.explain(a, b, 20)
    assert score == pytest.approx((y[0] * y[1]).sum().item(), abs=1e-6)
    assert score == pytest.approx(sum(p for _, p in parts), abs=1e-5)
    assert {"wolf", "goat"} & {w.lower() for w, _ in parts} and len({w for w, _ in parts}) == len(parts)
    assert [p for _, p in parts] == sorted((p for _, p in parts), reverse=True)
    assert e.explain(b, a, 20)[0] == pytest.approx(score, abs=1e-6)
    assert e.explain(a, a)[0] == pytest.approx(1, abs=1e-5)


def test_what_is_written_down(checkpoint):
    facts = json.loads((checkpoint / "t2t.json").read_text())
    assert facts["config"]["seed"] == 42 and facts["versions"]["torch"] == torch.__version__
    assert facts["corpus_hash"] and facts["loss"] and facts["constant_loss"] and facts["texts"] == 400
    assert "--lr=0.01" in facts["command"]
    assert facts["scale"] in t2t.SCALES
    used = facts["config"]                                   # what was used: nothing is left to be resolved
    assert set(used) == set(Config.__dataclass_fields__)
    assert "auto" not in used.values() and {k for k, v in used.items() if v is None} == {"init"}


def test_the_command_makes_the_same_config(monkeypatch):
    settings = Config(grad_checkpointing=True, prompt="-{} in 'one'", lr=0.01, init="a b", overwrite=True)
    monkeypatch.setattr(cli_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", shlex.split(cli_module.command_line(settings))[1:])
    assert cli_module.parse(Config, "") == dataclasses.replace(settings, overwrite=False)


def test_model_card(backbone, texts_file, tmp_path):
    """Of a folder, no base_model: the hub refuses a path. Of the default, its name on the hub."""
    from huggingface_hub import ModelCard
    from plumbing.folders import model_card
    out = train(config(backbone, texts_file, tmp_path / "a", steps=1))
    card = ModelCard.load(Path(out) / "README.md")
    assert card.data.base_model is None and card.data.to_dict()["library_name"] == "sentence-transformers"
    facts = json.loads((Path(out) / "t2t.json").read_text())
    facts["backbone"] = {"name": "smollm2", "license": "apache-2.0",
                         "hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    card = ModelCard(model_card(Config(), facts))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert card.data.language == "en" and "sentence-transformers 6" in card.text
    card = ModelCard(model_card(Config(corpus="hub:a/b:c"), facts))
    assert card.data.datasets == ["a/b"] and card.data.language is None


def test_publishing_reads_the_folder(checkpoint, tmp_path):
    """push_to_hub of sentence-transformers writes the folder again: the same vectors, the same weights."""
    from sentence_transformers import SentenceTransformer
    st, again = SentenceTransformer(str(checkpoint), device="cpu"), tmp_path / "again"
    st.save_pretrained(str(again))
    texts = sentences(3)
    assert_close(torch.tensor(SentenceTransformer(str(again), device="cpu").encode(texts)),
                 torch.tensor(st.encode(texts)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPTNeoXTokenizer"])
def test_the_prompt_is_in_the_checkpoint(backbone, texts_file, tmp_path, kind):
    """Every library that reads it asks, also where the class of the tokenizer has a template of its own."""
    from sentence_transformers import SentenceTransformer, SparseEncoder
    shutil.copytree(backbone, tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(
        settings | {"tokenizer_class": kind, "add_bos_token": True, "unk_token": "</s>"}))
    prompts = "the wolf sees {} in the river.", "{}"
    out, plain = (train(config(tmp_path / "m", texts_file, tmp_path / str(n), steps=1, prompt=prompt))
                  for n, prompt in enumerate(prompts))
    shutil.copytree(out, tmp_path / "moved")                         # also with another folder's weights
    shutil.copy(Path(plain, "model.safetensors"), tmp_path / "moved")
    e, bare = Embedder.load(tmp_path / "moved"), Embedder.load(plain)
    first = len(bare.before)                                         # <s>: this class does not put it there
    assert bare.before == e.before[:first] == [1] * (kind == "PreTrainedTokenizerFast") and not bare.after
    texts = ["a goat", "", "The lion hears the mouse. " * 99]
    by_hand = F.normalize(bare.pooled([
        [*e.before[first:], *row, *e.after] for row in e.token_ids(texts)]), dim=1)
    assert e.tok.decode([*e.before[first:], *e.after]).split() == "the wolf sees in the river.".split()
    assert_close(torch.from_numpy(e.encode(texts)), by_hand, rtol=1e-5, atol=1e-6)
    dense, sparse = (kind(str(tmp_path / "moved" / part), device="cpu")
                     for kind, part in ((SentenceTransformer, ""), (SparseEncoder, "sparse")))
    assert_close(torch.from_numpy(dense.encode(texts)), by_hand, rtol=1e-5, atol=1e-6)
    assert sparse.tokenizer("a goat")["input_ids"] == [*e.before, *e.token_ids(["a goat"])[0], *e.after]


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("args, says", [
    (["--method", "magic"], "invalid choice"), (["--steps", "0"], "--steps: expected 1 or more, got 0"),
    (["--batch-size", "-3"], "--batch-size: expected 1 or more"),
    (["--lr", "nan"], "--lr: expected a finite number, 1e-12 or more, got nan"),
    (["--seed", "20250101123456"], "--seed: expected at most 10^12"),
    (["--method", "none", "--init", "ckpt"], "--init: expected a method that uses it"),
    (["--method", "simcse", "--top-k", "8"], "--top-k: expected a method that uses it (data, model, both)"),
    (["--resume", "--overwrite"], "expected either --resume (go on) or --overwrite (start again), got both"),
    (["--temperature", "0"], "--temperature: expected"), (["--prompt", "Say it:"], "expected {} once, where"),
    (["--method", "mntp", "--prompt", "Say {}:"], "--prompt: expected a method that uses it"),
    (["--stesp", "3"], "unrecognized arguments"),
    (["--method", "simcse", "--batch-size", "1"], "--batch-size: expected 2 or more"),
    (["--method", "mntp", "--show-targets", "3"], "--show-targets: expected a method that uses it"),
    (["--impl", "fast"], "invalid choice")])
def test_bad_arguments_end_at_once(args, says):
    t0 = time.time()
    run = cli(*args)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 2 and says in err and "Traceback" not in err
    assert time.time() - t0 < 2


def test_help_is_quick():
    t0 = time.time()
    out, _ = cli("--help").communicate(timeout=20)
    assert time.time() - t0 < 2
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out
    assert "T2T_CACHE" in out and "{" not in out.split("The cache")[1]


def fails(capsys, **more):
    """One line on stderr, status 2; returns the line."""
    with pytest.raises(SystemExit) as e:
        t2t.run_command(train, Config(**more))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("t2t.py:")]
    assert e.value.code == 2 and len(err) == 1
    return err[0]


def test_bad_input_ends_in_one_line(backbone, texts_file, tmp_path, capsys):
    good = dict(backbone=str(backbone), out=str(tmp_path / "out"), method="data", steps=1, batch_size=4,
                top_k=4, device="cpu")
    assert "does not exist" in fails(capsys, **good, corpus="nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "expected at least one text" in fails(capsys, **good, corpus=str(tmp_path / "empty.txt"))
    (tmp_path / "dull.txt").write_text("the of and\n")
    assert "no text has a single target" in fails(capsys, **good, corpus=str(tmp_path / "dull.txt"))
    good["corpus"] = str(texts_file)
    assert "at most the size of the vocabulary, 500" in fails(capsys, **{**good, "top_k": 501})
    assert "hub id needs a network" in fails(capsys, **{**good, "backbone": "nobody/nothing"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "holds thesis.tex" in fails(capsys, **{**good, "out": str(tmp_path / "full")})
    assert "is a file" in fails(capsys, **{**good, "out": str(texts_file)})
    for here in (".", ".."):                                        # renaming it would pull away the ground
        assert "pass a name such as ckpt" in fails(capsys, **{**good, "out": here})
    for name in "out", "init", "corpus", "backbone":                 # as of a variable that is not set
        with pytest.raises(Error, match=f"--{name}: expected a value, got an empty one"):
            train(Config(**{**good, name: ""}))
    assert "expected at most 224, since" in fails(capsys, **good, max_length=257)
    assert "expected a checkpoint made from" in fails(capsys, **good, init=str(other_vocabulary(tmp_path)))
    assert not (tmp_path / "out" / "t2t.json").exists()
    if os.getuid():                                                  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in fails(capsys, **{**good, "out": str(tmp_path / "locked" / "out")})


def other_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    family("llama", V=77).save_pretrained(tmp_path / "other")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", pad_token="a")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.skipif(not hasattr(os, "mkfifo") or not Path("/dev/full").exists(),
                    reason="needs /dev/full, a disk that is full")
def test_a_disk_that_fills_while_the_tokenizer_is_saved(backbone, texts_file, tmp_path, monkeypatch):
    """tokenizers raises Exception itself."""
    def full(self, path, *_):
        raise Exception("No space left on device (os error 28)")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(Error, match="expected to write in .*os error 28"):
        train(config(backbone, texts_file, tmp_path / "a", steps=1))
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def run_with_small_files(settings, said):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    with open(said, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        t2t.run_command(train, settings)


def test_a_file_may_not_grow(backbone, texts_file, tmp_path):
    """The state, and then the checkpoint, larger than a file may be: one line, and nothing half-written."""
    for method in "data", "none":
        few = dict(corpus=str(texts_file), steps=1, batch_size=4, lora_rank=0, top_k=4)
        settings = Config(backbone=str(backbone), out=str(tmp_path / method), device="cpu", method=method,
                          **few if method == "data" else {})
        process = PROCESSES.Process(target=run_with_small_files, args=(settings, tmp_path / "said"))
        process.start()
        process.join()
        said = (tmp_path / "said").read_text()
        errors = [line for line in said.splitlines() if line.startswith("t2t.py: error: ")]
        assert process.exitcode == 2 and len(errors) == 1 and "Traceback" not in said, said
        assert f"--out: expected to write in {tmp_path / method}, where" in errors[0], errors
        left = [f.name for f in tmp_path.rglob("*") if "new" in f.name]
        assert not left


def test_a_console_that_is_not_utf8(backbone, tmp_path):
    """A corpus with a Cyrillic name, and --out: a checkpoint, whose card has the name, and no error from
    printing it. Also where a cluster says RANK=1: without torchrun, this is no second process."""
    corpus = tmp_path / "собаки.txt"
    corpus.write_text("\n".join(sentences(40)) + "\nСобака и кошка.\n", "utf-8")
    out = tmp_path / "папка" / "выход"
    command = [sys.executable, "t2t.py", "--backbone", backbone, "--corpus", corpus, "--out", out,
               "--steps", "1", "--top-k", "4", "--batch-size", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True,
                          env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "RANK": "1", "WORLD_SIZE": "",
                                            "LOCAL_WORLD_SIZE": "0"})
    assert done.returncode == 0, done.stderr
    assert "собаки.txt" in (out / "README.md").read_text("utf-8")
    assert Embedder.load(out).encode(["x"]).shape == (1, 32)
    assert [f.name for f in out.parent.iterdir()] == [out.name]         # nothing half-written beside it


def test_out_of_memory_names_the_flag(backbone, texts_file, tmp_path, capsys, monkeypatch):
    def no_memory(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(t2t, "vocab_kl", no_memory)
    assert "lower --micro-batch (now 8)" in fails(capsys, backbone=str(backbone), corpus=str(texts_file),
                                                  out=str(tmp_path / "o"), batch_size=4, top_k=4)


def test_nan_stops_at_once(backbone, texts_file, tmp_path):
    with pytest.raises(Error, match=r"step \d: loss .*lower --lr \(now 1e\+30\)"):
        train(config(backbone, texts_file, tmp_path / "a", lr=1e30))


def test_show_targets_trains_nothing(backbone, texts_file, tmp_path, capsys):
    assert train(config(backbone, texts_file, tmp_path / "a", show_targets=3)) is None
    shown = capsys.readouterr().out
    assert shown.count("The ") >= 3 and any(animal in shown for animal in ("dog ", "cat ", "horse "))
    assert not (tmp_path / "a").exists()


def test_more_targets_than_the_kernel_holds_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert t2t.settle(Config(device="cuda", top_k=1025)).impl == "torch"
    with pytest.raises(Error, match="at most 1024 with --impl ext on a GPU, got 1025"):
        t2t.settle(Config(device="cuda", top_k=1025, impl="ext"))
