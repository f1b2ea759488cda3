"""results/contest.py: its statistics by hand, its scores against mteb, one cell from nothing."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_eval import make_sts
from test_train import ROOT

sys.path.insert(0, str(ROOT / "results"))
import contest  # noqa: E402
import eval as ev  # noqa: E402
import t2t  # noqa: E402


@pytest.fixture
def data(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for seed, task in enumerate(("STS12", "STSBenchmark")):
        make_sts(tmp_path / "data", task, seed)
    return str(tmp_path / "data")


def test_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, t of two degrees of freedom 4.3027: half width 4.3027 / sqrt 3."""
    assert contest.interval([1, 2, 3]) == (2.0, 2.48)
    assert contest.interval([5.0]) == (5.0, None)


def test_bootstrap():
    """A reading that is the gold itself against noise: Spearman 1 against 0; against itself: 0, no width."""
    rng = np.random.default_rng(0)
    gold = {t: rng.random(200) for t in contest.STS}
    perfect = [{t: np.stack([g, g]) for t, g in gold.items()}]
    noise = [{t: np.stack([rng.random(200), g]) for t, g in gold.items()} for _ in range(3)]
    mean, low, high = contest.bootstrap(perfect, noise, draws=100)
    assert low < mean < high and 80 < low and high < 120
    assert contest.bootstrap(noise, noise, draws=20) == [0, 0, 0]


def test_sts_as_mteb_scores_it(data, backbone):
    [task] = [ev.localize(t, data) for t in ev.pick(["STSBenchmark"])]
    embedder = t2t.Embedder.load(str(backbone))
    read = contest.once(embedder.encode)
    scores, items = contest.score(read, [task])
    from readings import Reading
    import mteb
    found = mteb.evaluate(Reading("x", read), [task], cache=None, co2_tracker=False, show_progress_bar=False)
    assert scores["STSBenchmark"] == pytest.approx(100 * found.task_results[0].get_score(), abs=0.006)
    assert items["STSBenchmark"][0].shape == items["STSBenchmark"][1].shape == (20,)


def test_once_reads_each_text_once():
    seen = []

    def read(texts):
        seen.extend(texts)
        return np.array([[len(t)] for t in texts])
    reading = contest.once(read)
    assert reading(["a", "bb", "a"]).ravel().tolist() == [1, 2, 1] and reading(["bb"]).item() == 2
    assert seen == ["a", "bb"]


def test_two_stages_from_nothing(data, backbone, texts_file, tmp_path, monkeypatch, capsys):
    """The cell that is its own longest path: mntp, then simcse from it; again, nothing is trained twice."""
    monkeypatch.setattr(contest, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(contest, "STS", ["STS12", "STSBenchmark"])
    args = ["contest.py", "--data-dir", data, "--corpus", str(texts_file), "--backbone", str(backbone),
            "--seeds", "1", "2", "--runs", str(tmp_path / "runs"), "--texts", "256",
            "--tasks", "STS12", "STSBenchmark", "--cells", "mntp, simcse", "data, causal"]
    monkeypatch.setattr(sys, "argv", args)
    contest.main()
    facts = json.loads((tmp_path / "results" / "contest-texts.json").read_text())
    row = facts["rows"]["mntp, simcse"]
    assert row["seeds"] == [1, 2] and set(row["whitened"]) == {"STS12", "STSBenchmark", "mean STS"}
    made = lambda name: json.loads((tmp_path / "runs" / name / "t2t.json").read_text())
    assert made("mntp-simcse-stage-1-1")["texts_seen"] == made("mntp-simcse-2")["texts_seen"] == 128
    assert made("mntp-simcse-2")["config"]["init"] == str(tmp_path / "runs" / "mntp-simcse-stage-1-2")
    made = made("data-causal-1")
    assert made["texts_seen"] == 256
    assert made["config"]["attention"] == "causal"
    table = (tmp_path / "results" / "contest-texts.md").read_text()
    assert "| mntp, simcse | 2 |" in table and "±" in table

    def never(*_, **__):
        raise AssertionError("trained again")
    monkeypatch.setattr(t2t, "train", never)
    contest.main()
    assert (tmp_path / "results" / "contest-texts.md").read_text() == table
