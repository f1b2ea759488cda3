"""A run that is killed at any moment, and two runs with one cache: a folder is absent or whole."""
import contextlib
import json
import os
import random
import shutil
import time

import pytest
from conftest import PROCESSES
from torch.testing import assert_close

from t2t import Config, train
from test_train import weights


def run(settings, cache):
    os.environ["T2T_CACHE"] = str(cache)
    import torch
    torch.set_num_threads(1)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        train(Config(**settings))


def start(settings, cache):
    process = PROCESSES.Process(target=run, args=(settings, cache))
    process.start()
    return process


def settings_of(backbone, texts_file, out, **more):
    return dict(backbone=str(backbone), corpus=str(texts_file), out=str(out), device="cpu", dtype="float32",
                batch_size=8, top_k=8, steps=16, save_every=3) | more


def check_folder(out):
    """Nothing, an unfinished run, or a whole checkpoint."""
    names = {f.name for f in out.iterdir()} if out.exists() else set()
    if names - {"state"}:
        assert {"t2t.json", "model.safetensors", "mean.safetensors", "modules.json", "README.md", "sparse",
                "1_Pooling", "tokenizer.json"} <= names
        assert json.loads((out / "t2t.json").read_text())["loss"]
    return names


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(backbone, texts_file, tmp_path, kills):
    """Reading, targets, training, saving, merging: a moment in each part of the run's time."""
    first = PROCESSES.Process(target=int)                       # the forkserver imports all
    first.start()
    first.join()
    began, whole = time.time(), tmp_path / "whole"
    start(settings_of(backbone, texts_file, whole), tmp_path / "whole-cache").join()
    seconds, rng, met = time.time() - began, random.Random(0), set()
    for kill in range(kills):
        out, cache = tmp_path / f"out{kill}", tmp_path / f"cache{kill}"
        process = start(settings_of(backbone, texts_file, out), cache)
        time.sleep(seconds * (kill + rng.random()) / kills)
        process.kill()
        process.join()
        names = check_folder(out)
        begun = (out / "state" / "last.pt").exists()
        met.add("whole" if "t2t.json" in names else "state" if begun else "none")
        if "t2t.json" not in names:
            again = start(settings_of(backbone, texts_file, out, resume=True), cache)
            again.join()
            assert again.exitcode == 0
        check_folder(out)
        assert_close(weights(out), weights(whole), rtol=0, atol=0)
        assert not [f for f in tmp_path.iterdir() if f.name.startswith(f".out{kill}.")]      # no leftovers
        shutil.rmtree(out)
    assert len(met) > 1                                         # the moments were not all alike


def test_two_runs_share_a_cache(backbone, texts_file, tmp_path):
    """Both make what the other makes too; the slower one takes what is there."""
    two = [start(settings_of(backbone, texts_file, tmp_path / f"out{n}"), tmp_path / "cache") for n in (1, 2)]
    for process in two:
        process.join()
        assert process.exitcode == 0
    assert_close(weights(tmp_path / "out1"), weights(tmp_path / "out2"), rtol=0, atol=0)
    assert not [f for f in (tmp_path / "cache").iterdir() if f.name.endswith(".new")]
