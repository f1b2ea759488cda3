"""experiments/compare.py: its statistics by hand, its scores against mteb, one cell from nothing."""
import gzip
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_eval import make_sts

import compare  # noqa: E402
import eval as ev  # noqa: E402
import t2t  # noqa: E402
from plumbing.cli import Error  # noqa: E402

@pytest.fixture
def data(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for seed, task in enumerate(("STS12", "STSBenchmark")):
        make_sts(tmp_path / "data", task, seed)
    return str(tmp_path / "data")

def test_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, t of two degrees of freedom 4.3027: half width 4.3027 / sqrt 3."""
    assert compare.interval([1, 2, 3]) == (2.0, 2.48)
    assert compare.interval([5.0]) == (5.0, None)

@pytest.fixture
def gold():
    rng = np.random.default_rng(0)
    return {t: rng.random(200) for t in compare.STS}

def test_difference(gold):
    """A reading that is the gold itself against noise: Spearman 1 against 0; against itself: 0, no width."""
    rng, pair = np.random.default_rng(1), dict(zip(gold, np.arange(600).reshape(3, 200)))
    perfect = [{t: np.stack([g, g]) for t, g in gold.items()}]
    noise = [{t: np.stack([rng.random(200), g]) for t, g in gold.items()} for _ in range(3)]
    mean, low, high = compare.difference(perfect, noise, pair, draws=100)
    assert low < mean < high and 80 < low and high < 120
    want = 100 * (1 - np.mean([spearmanr(*x).statistic for run in noise for x in run.values()]))
    assert mean == pytest.approx(want, abs=0.01)
    assert compare.difference(noise[:1], noise[:1], pair, draws=20) == [0, 0, 0]

def test_interval_is_as_wide_as_theory(gold):
    """Noise against gold: the deviation of Spearman's r of 600 independent pairs is 1/sqrt(600); of 200 pairs
    that stand in all three tasks, 1/sqrt(200). Seeds r, 1, 1 with r near 0, by hand: deviation 0.577, half
    width t(2) 0.577 / sqrt(3) = 1.434, to which the pairs add little."""
    rng = np.random.default_rng(1)
    noise = [{t: np.stack([rng.random(200), g]) for t, g in gold.items()}]
    constant = [{t: np.stack([g, g]) for t, g in gold.items()}]                            # 1 in every draw
    width = lambda one, pair: np.subtract(*compare.difference(one, constant, pair)[:0:-1]) / 2 / 1.96 / 100
    apart = dict(zip(gold, np.arange(600).reshape(3, 200)))
    assert width(noise, apart) == pytest.approx(600 ** -0.5, rel=0.15)
    same = [{t: next(iter(noise[0].values())) for t in gold}]
    assert width(same, dict.fromkeys(gold, np.arange(200))) == pytest.approx(200 ** -0.5, rel=0.15)
    assert width([noise[0], constant[0], constant[0]], apart) * 1.96 == pytest.approx(1.434, rel=0.1)

def test_a_pair_is_one_whichever_way_round():
    rows = [{"sentence1": "A  cat", "sentence2": "b"}, {"sentence1": "B", "sentence2": "a cat"},
            {"sentence1": "b", "sentence2": "b"}]
    task = lambda name, rows: SimpleNamespace(metadata=SimpleNamespace(name=name), dataset={"test": rows})
    got = compare.pairs([task("x", rows), task("y", rows[1:])])
    assert got["x"].tolist() == [0, 0, 1] and got["y"].tolist() == [0, 1]

@pytest.mark.parametrize("zeros", [False, True])
def test_sts_as_mteb_scores_it(data, backbone, zeros):
    [task] = [ev.localize(t, data) for t in ev.pick(["STSBenchmark"])]
    embedder = t2t.Embedder.load(str(backbone))
    # tf-idf of a text with stop words alone is 0: every third text here
    read = compare.once(lambda texts: embedder.encode(texts) * np.array(
        [[not zeros or len(t) % 3 > 0] for t in texts]))
    scores, items = compare.score(read, [task])
    from untrained import Function
    import mteb
    found = mteb.evaluate(Function("x", read), [task], cache=None, co2_tracker=False, show_progress_bar=False)
    assert scores["STSBenchmark"] == pytest.approx(100 * found.task_results[0].get_score(), abs=0.006)
    assert items["STSBenchmark"][0].shape == items["STSBenchmark"][1].shape == (20,)

def test_once_reads_each_text_once():
    seen = []

    def read(texts):
        seen.extend(texts)
        return np.array([[len(t)] for t in texts])
    reading = compare.once(read)
    assert reading(["a", "bb", "a"]).ravel().tolist() == [1, 2, 1] and reading(["bb"]).item() == 2
    assert seen == ["a", "bb"]

def test_two_stages_from_nothing(data, backbone, texts_file, tmp_path, monkeypatch, capsys):
    """The run that is its own longest path: mntp, then simcse from it; again, nothing is trained twice."""
    monkeypatch.setattr(compare, "STS", ["STS12", "STSBenchmark"])
    corpus = shutil.copy(texts_file, tmp_path)
    args = ["compare.py", "--data-dir", data, "--corpus", corpus, "--backbone", str(backbone),
            "--seeds", "1", "2", "--runs", str(tmp_path / "runs"), "--texts", "256",
            "--tasks", "STS12", "STSBenchmark", "--only", "mntp, simcse", "both, mean"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    facts = json.loads((tmp_path / "runs" / "compare-texts-256.json").read_text())
    row = facts["rows"]["mntp, simcse"]
    assert row["seeds"] == [1, 2] and set(row["whitened"]) == {"STS12", "STSBenchmark", "mean STS"}
    made = lambda name: json.loads((tmp_path / "runs" / name / "t2t.json").read_text())
    assert made("mntp-simcse-stage-1-1")["texts_seen"] == made("mntp-simcse-2")["texts_seen"] == 128
    assert made("mntp-simcse-2")["config"]["init"] == str(tmp_path / "runs" / "mntp-simcse-stage-1-2")
    made = made("both-mean-1")
    assert made["texts_seen"] == 256
    assert (made["config"]["attention"], made["config"]["prompt"]) == ("bidirectional", "{}")
    assert [r["seed"] for r in row["runs"]] == [1, 2] and row["runs"][0]["corpus_hash"] == made["corpus_hash"]
    table = (tmp_path / "runs" / "compare-texts-256.md").read_text()
    assert "| mntp, simcse | 2 |" in table and "±" in table

    def never(*_, **__):
        raise AssertionError("trained again")
    monkeypatch.setattr(t2t, "train", never)
    compare.main()
    assert (tmp_path / "runs" / "compare-texts-256.md").read_text() == table

    # published before: another seed of one run, another method; the runs at hand are added to them
    published = tmp_path / "results" / "compare-texts-256.json"
    published.parent.mkdir()
    other = lambda seed: {"seed": seed, "scores": {"raw": {"STS12": 1.0, "mean STS": 30.0 + 10 * seed}}}
    published.write_text(json.dumps({"ground": facts["ground"], "claims": [], "rows": {
        name: {"settings": compare.RUNS.get(name), "seeds": seeds, "runs": [*map(other, seeds)], "raw": {}}
        for name, seeds in (("mntp, simcse", [3]), ("both", [3, 4]), ("gone", [5]))}}))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", [*args, "--publish"])
    compare.main()
    made = json.loads(published.read_text())
    rows, claims = made["rows"], {(c["claim"], c["vectors"]): c for c in made["claims"]}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "mntp, simcse": [1, 2, 3], "both, mean": [1, 2], "both": [3, 4]}
    # the pairs of "both" are gone: seeds 3, 4 have 60 and 70, mean 65, variance of the mean 50 / 2
    claim = claims["both > both, mean", "raw"]
    x = [r["scores"]["raw"]["mean STS"] for r in rows["both, mean"]["runs"]]
    v = np.array([25, np.var(x, ddof=1) / 2])
    half = compare.t_distribution.ppf(0.975, v.sum() ** 2 / (v ** 2).sum()) * v.sum() ** 0.5
    expected = 65 - np.mean(x) + np.array([0, -half, half])
    assert claim["over"] == "seeds alone" and claim["mean STS"] == pytest.approx(expected, abs=0.02)
    scores = [r["scores"]["raw"]["STS12"] for r in rows["mntp, simcse"]["runs"]]
    assert rows["mntp, simcse"]["raw"]["STS12"][0] == pytest.approx(np.mean(scores), abs=0.01)
    assert scores[2] == 1.0

    # a claim of which no pairs are at hand stays, until one of its runs has another score
    kept = claims["both > both, mean", "raw"] | {"mean STS": [7, 6, 8]}
    assert compare.claim_of("both", "both, mean", "raw", table=rows, arrays={}, pair={}, old=[kept]) == kept
    rows["both"]["runs"][0]["scores"]["raw"]["mean STS"] = 61.0
    new = compare.claim_of("both", "both, mean", "raw", table=rows, arrays={}, pair={}, old=[kept])
    assert new["mean STS"][0] == pytest.approx(65.5 - np.mean(x), abs=0.02)

    # scores on fewer tasks do not take the place of more; nor those on other texts
    rows["both, mean"]["runs"][0]["scores"]["raw"]["SciFact"] = 40.0
    published.write_text(json.dumps(made))
    with pytest.raises(Error, match="both, mean, seed 1, all tasks .* got no SciFact"):
        compare.main()
    published.write_text(json.dumps(made | {"ground": made["ground"] | {"corpus_hash": "x"}}))
    with pytest.raises(Error, match="expected runs of .*'corpus_hash': 'x'"):
        compare.main()
    with open(corpus, "a") as file:                    # a corpus of the same name
        file.write("One text more.\n")
    with pytest.raises(Error, match="--runs: expected .*'corpus_hash'"):
        compare.main()

def test_validation_by_hand(tmp_path):
    """Vectors in the plane. Ranks of the pairs' cosines are those of their scores but for one swap of
    neighbours: Spearman 1 - 6 * 2 / (4 * 15) = 0.8. Labels on two axes are told apart. Query 0 finds its
    document second, query 1 finds its two first and third:
    nDCG (1 / log2 3 + (1 + 1 / log2 4) / (1 + 1 / log2 3)) / 2 = 0.7753."""
    import gzip

    def write(path, rows):
        path = tmp_path / "mteb" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
    turn = lambda degrees: np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    vector = {"zero": turn(0)} | {f"pair {d}": turn(d) for d in (10, 20, 30, 40)}
    write("stsbenchmark-sts/validation.jsonl.gz", [
        {"sentence1": "zero", "sentence2": f"pair {d}", "score": s}
        for d, s in ((10, 3), (20, 4), (30, 2), (40, 1))])
    bank = [{"text": f"bank {k} {n}", "label": k} for k in (0, 1) for n in range(12)]
    vector |= {r["text"]: turn(90 * r["label"] + int(r["text"].split()[2])) for r in bank}
    write("banking77/train.jsonl.gz", bank)
    degrees = {"d0": 5, "d1": 10, "d2": 80, "d3": 70, "d4": 60}
    vector |= {f"{d} {d}": turn(x) for d, x in degrees.items()} | {"q0": turn(0), "q1": turn(90)}
    write("scifact/corpus.jsonl.gz", [{"_id": d, "title": d, "text": d} for d in degrees])
    write("scifact/queries.jsonl.gz", [{"_id": q, "text": q} for q in ("q0", "q1")])
    write("scifact/qrels/train.jsonl.gz", [{"query-id": q, "corpus-id": d, "score": 1} for q, d in
                                           (("q0", "d1"), ("q1", "d2"), ("q1", "d4"))])
    got = compare.validation(tmp_path)(lambda texts: np.array([vector[t] for t in texts]))
    assert got == {"STSBenchmark validation": 80.0, "Banking77 train": 100.0, "SciFact train": 77.53}

def test_trials_are_made_once(data, backbone, texts_file, tmp_path, monkeypatch, capsys):
    """Two trials, one of them in two stages, over two seeds; again, nothing is trained; the table's mean."""
    monkeypatch.setattr(compare, "validation", lambda _: lambda read: dict.fromkeys(
        compare.SPLITS, float(len(read(["a text"])))))
    args = ["compare.py", "--data-dir", data, "--corpus", str(texts_file), "--backbone", str(backbone),
            "--tune", "--seeds", "1", "2", "--runs", str(tmp_path), "--texts", "256",
            "--only", "data", "mntp, simcse"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    made = json.loads((tmp_path / "trials-texts-256.json").read_text())
    assert [(r["name"], r["seed"], r["texts_seen"]) for r in made] == [
        ("data", 1, 256), ("mntp, simcse", 1, 128), ("data", 2, 256), ("mntp, simcse", 2, 128)]
    assert not list(tmp_path.glob("trial-*"))
    monkeypatch.setattr(t2t, "train", None)
    compare.main()
    assert "| data | 2 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0  1.0 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*args, "--max-length", "32"])    # another trial
    with pytest.raises(TypeError, match="not callable"):
        compare.main()

def test_curves(backbone, texts_file, tmp_path, monkeypatch):
    """Two runs, each measured eight times from 0 texts to all; a second call trains nothing."""
    folder = tmp_path / "mteb" / "stsbenchmark-sts"
    folder.mkdir(parents=True)
    lines = texts_file.read_text().splitlines()
    with gzip.open(folder / "validation.jsonl.gz", "wt") as f:
        for n in range(30):
            f.write(json.dumps({"sentence1": lines[n], "sentence2": lines[-n], "score": n / 6}) + "\n")
    args = ["compare.py", "--data-dir", str(tmp_path), "--corpus", str(texts_file), "--backbone",
            str(backbone), "--curves", "--seeds", "1", "--runs", str(tmp_path), "--texts", "256"]
    monkeypatch.setattr(sys, "argv", args)
    for name in compare.CURVES:                        # 32 steps: a point after each share of them
        monkeypatch.setitem(compare.RUNS, name, [compare.RUNS[name][0] | dict(batch_size=8)])
    compare.main()
    made = json.loads((tmp_path / "curves.json").read_text())
    for name in compare.CURVES:
        texts, sts, key = zip(*made[name]["texts, STS, key words"])
        assert texts == (0, 8, 16, 32, 64, 128, 192, 256) and np.isfinite([sts, key]).all()
    first = [made[name]["texts, STS, key words"][0] for name in compare.CURVES]
    assert first[0] == first[1] and first[0] != made["both"]["texts, STS, key words"][-1]  # one backbone
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr(t2t, "train", None)
    compare.main()
    for name in compare.CURVES:                        # other settings: not those curves
        monkeypatch.setitem(compare.RUNS, name, [compare.RUNS[name][0] | dict(batch_size=16)])
    with pytest.raises(Error, match="--curves: .* is trained: remove it"):
        compare.main()

def test_whitening_matrix():
    rng = np.random.default_rng(0)
    h = (rng.normal(size=(500, 8)) * [9, 5, 3, 2, 1, 1, 0.5, 0.2] + 3).astype(np.float32)
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    before = np.linalg.eigvalsh(u.T @ u / 500)
    for power in (0.0, 0.5, 1.0):
        W = compare.whitening_matrix(torch.from_numpy(h), power, ridge=0.0).numpy()
        np.testing.assert_allclose(W, W.T, atol=1e-5)
        after = np.linalg.eigvalsh((u @ W).T @ (u @ W) / 500)
        want = before ** (1 - power)
        np.testing.assert_allclose(after / after.mean(), want / want.mean(), rtol=1e-3)
    few = compare.whitening_matrix(torch.from_numpy(h[:3]))           # directions never seen: the ridge
    assert few.isfinite().all()
