"""eval.py --sparse: fusion by hand, one small retrieval task through mteb."""
import gzip
import json
import shutil

import pytest
from conftest import ANIMALS, PLACES, sentences
from safetensors.torch import load_file, save
from test_train import config

import eval as ev
import t2t
from plumbing.cli import Error


def test_fusion_by_hand():
    """dense: x, y, though below zero. BM25: y, then z at zero, no match. y: 1/62 + 1/61; x: 1/61."""
    part = lambda scores: type("part", (), {"rankings": {"q": scores}})()
    ranked = {"dense": part({"x": 9.0, "y": -8.0}), "BM25": part({"z": 0.0, "y": 0.1})}
    fused = ev.Fusion(("dense", "BM25"), ranked).search({"id": ["q"]}, top_k=10)
    assert fused == {"q": pytest.approx({"x": 1 / 61, "y": 1 / 62 + 1 / 61})}


def test_a_checkpoint_without_sparse_is_refused(backbone, tmp_path):
    with pytest.raises(Error, match="expected CKPT/sparse"):
        ev.evaluate_sparse([str(backbone)], [], out=str(tmp_path), device="cpu")


# ---------------------------------------------------------------------- through mteb, on a made-up SciFact
def gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def scifact(tmp_path_factory):
    """30 documents of the tests' language; the query of a document is its animals and its place."""
    folder = tmp_path_factory.mktemp("data") / "mteb" / "scifact"
    texts = sentences(30, seed=5)
    words = [" ".join(w for w in t.rstrip(".").split() if w in ANIMALS + PLACES) for t in texts]
    gz(folder / "corpus.jsonl.gz", ({"_id": f"d{n}", "title": "", "text": t} for n, t in enumerate(texts)))
    gz(folder / "queries.jsonl.gz", ({"_id": f"q{n}", "text": t} for n, t in enumerate(words)))
    for split in ("train", "test"):
        gz(folder / "qrels" / f"{split}.jsonl.gz",
           ({"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in range(30)))
    part = lambda name, split, path: (f'- config_name: "{name}"\n  data_files:\n  - split: {split}\n'
                                      f'    path: "{path}"\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n" + part("default", "train", "qrels/train.jsonl.gz")
        + '  - split: test\n    path: "qrels/test.jsonl.gz"\n'
        + part("corpus", "corpus", "corpus.jsonl.gz")
        + part("queries", "queries", "queries.jsonl.gz") + "---\n")
    return folder.parent.parent


def test_the_whole_table(scifact, backbone, texts_file, tmp_path, capsys, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    settings = dict(steps=5, lr=1e-2, top_k=32)
    ckpt = t2t.train(config(backbone, texts_file, tmp_path / "ckpt", **settings))
    capsys.readouterr()
    assert ev.main([ckpt, "--sparse", "--tasks", "SciFact", "--data-dir", str(scifact),
                    "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    page = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "sparse-ckpt.json").read_text())["rows"]
    assert (tmp_path / "out" / "sparse-ckpt.md").read_text() == page
    assert list(rows) == ["dense", "sparse", "BM25", "dense + sparse", "dense + BM25", "sparse + BM25",
                          "dense + sparse + BM25"]
    assert all(0 <= row["SciFact"] <= 100 for row in rows.values())
    assert rows["BM25"]["SciFact"] > 80                                # the query is words of its document
    # a task without data is named, the others are scored; two checkpoints of one name do not share a file
    again = tmp_path / "copy" / "ckpt"
    shutil.copytree(ckpt, again)
    assert ev.main([ckpt, str(again), "--sparse", "--tasks", "SciFact", "STS12", "--data-dir", str(scifact),
                    "--out", str(tmp_path / "two"), "--device", "cpu", "--dtype", "bfloat16"]) == 3
    assert "- not scored: STS12: " in capsys.readouterr().out
    # of a damaged one, nothing is scored
    damaged = shutil.copytree(ckpt, tmp_path / "damaged")
    weights = damaged / "sparse" / "2_Dense" / "model.safetensors"
    nan = {name: x * float("nan") for name, x in load_file(weights).items()}
    for content, says in (weights.read_bytes()[:500], "reads texts"), (save(nan), "NaN or infinity"):
        weights.unlink()
        weights.write_bytes(content)
        with pytest.raises(Error, match=says):
            ev.compare_sparse(str(damaged), [], batch_size=8, device="cpu")
    names = sorted(f.name for f in (tmp_path / "two").glob("*.json"))
    assert len(names) == 2 and all(name.endswith("ckpt.json") for name in names)
    rough = json.loads((tmp_path / "two" / names[0]).read_text())
    assert rough["dtype"] == "bfloat16"
    for name, row in rough["rows"].items():                            # 30 queries: a rank or two may change
        assert row["SciFact"] == pytest.approx(rows[name]["SciFact"], abs=5)
    # dense as mteb alone scores the same checkpoint: nothing is lost on the way
    [task] = ev.evaluate([ckpt], ["SciFact"], str(scifact), tmp_path / "plain", device="cpu")["tasks"]
    assert task["scores"]["ckpt"] == pytest.approx(rows["dense"]["SciFact"], abs=0.01)
