"""Two processes by torchrun, on a CPU, against one: the same steps, a state that either can go on from."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT
from t2t import Config, train
from test_train import log, weights


def run(count, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
            "t2t.py", *map(str, args)]
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def settings(backbone, texts_file, out, **more):
    """A batch of 15 is uneven for two processes."""
    return dict(backbone=str(backbone), corpus=str(texts_file), out=str(out), device="cpu", dtype="float32",
                batch_size=15, micro_batch=4, top_k=8, steps=20, lr=0.003, save_every=5) | more


def flags(**settings):
    return [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", v)]


def losses(out):
    return torch.tensor([line["loss"] for line in log(out)])


SLOW = pytest.mark.slow


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=SLOW)])
def test_two_processes_train_as_one(backbone, texts_file, tmp_path, monkeypatch, rank):
    monkeypatch.setenv("T2T_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts.txt"                              # some have no target, as many have no word
    texts.write_text("".join(f"{line}\n!!! ...\n" for line in texts_file.read_text().splitlines()[:90]))
    two = run(2, *flags(**settings(backbone, texts, tmp_path / "two", lora_rank=rank, method="data")))
    out, err = two.communicate(timeout=300)
    one = train(Config(**settings(backbone, texts, tmp_path / "one", lora_rank=rank, method="data")))
    assert two.returncode == 0 and "Traceback" not in err, err
    assert out.count("is ready") == 1                           # the first process speaks and writes
    assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-4, atol=1e-4)
    assert_close(weights(tmp_path / "two"), weights(one), rtol=1e-3, atol=1e-3)
    # the key of the cache does not depend on the process, in each of which strings hash otherwise
    assert len(list((tmp_path / "cache").glob("targets-*"))) == 1


@SLOW
@pytest.mark.parametrize("method", ["simcse", "mntp"])
def test_baselines_see_the_whole_batch(backbone, texts_file, tmp_path, method):
    """Their random numbers are a process's own, so the losses are alike and not equal. A simcse that told
    texts from those of its own process alone would have ln 2 less."""
    two = run(2, *flags(**settings(backbone, texts_file, tmp_path / "two", method=method, lr=1e-6, top_k=64)))
    one = train(Config(**settings(backbone, texts_file, tmp_path / "one", method=method, lr=1e-6, top_k=64)))
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    assert_close(losses(tmp_path / "two").mean(), losses(one).mean(), rtol=0, atol=0.25)


def test_one_goes_on_where_two_were_killed(backbone, texts_file, tmp_path):
    long = settings(backbone, texts_file, tmp_path / "out", steps=2000, save_every=5, method="data")
    two = run(2, *flags(**long))
    state = tmp_path / "out" / "state"
    for _ in range(600):
        if (state / "last.pt").exists():
            break
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(two.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)                  # one of the two: torchrun ends the other
    _, err = two.communicate(timeout=120)
    assert two.returncode != 0 and (state / "last.pt").exists()

    class Stop(Exception):
        pass

    def crash(step, _):
        raise Stop(step)
    done = torch.load(state / "last.pt", weights_only=True)["run"]["step"]
    with pytest.raises(Stop) as stop:                           # one process: the step after the state's
        train(Config(**long, resume=True), on_step=crash)
    assert done > 0 and stop.value.args == (done + 1,)
    assert [json.loads(line)["step"] for line in (state / "log.jsonl").open()] == [*range(1, done + 2)]


@SLOW
def test_a_mistake_ends_all(backbone, tmp_path):
    """The first process finds it; the others wait for it and are ended."""
    two = run(2, *flags(**settings(backbone, tmp_path / "none.txt", tmp_path / "out")))
    _, err = two.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("t2t.py: ")]
    assert two.returncode != 0 and any("none.txt" in line for line in lines), err
