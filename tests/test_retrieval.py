"""eval.py --sparse: the store against brute force, fusion by hand, one small retrieval task through mteb."""
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import retrieval


def test_store_against_brute_force():
    rng = np.random.default_rng(0)
    docs, queries = rng.normal(size=(2, 30, 6)).astype(np.float32)
    store = retrieval.Store()
    store.add_documents(docs, None)
    values, top = store.search(torch.from_numpy(queries), 4, None)
    cosine = torch.cosine_similarity(torch.from_numpy(queries)[:, None], torch.from_numpy(docs)[None], dim=2)
    want = cosine.topk(4)
    np.testing.assert_array_equal(top, want.indices)
    np.testing.assert_allclose(values, want.values, rtol=1e-5)
    assert store.nonzeros == 6 and store.bytes == 30 * 6 * 4


def test_sparse_store_counts_what_it_holds():
    dense = torch.tensor([[0.0, 2, 0, 1], [0, 0, 0, 0], [3, 0, 0, 1]])
    store = retrieval.Store()
    store.add_documents(dense.to_sparse(), None)
    values, top = store.search(torch.tensor([[1.0, 1, 0, 2]]).to_sparse(), 3, None)
    assert top == [[2, 0, 1]] and values == [[5.0, 4.0, 0.0]]              # dot products: 3 + 2, 2 + 2, nothing
    assert store.nonzeros == pytest.approx(4 / 3)
    held = csr_matrix(dense.numpy())
    assert store.bytes == held.data.nbytes + held.indices.nbytes + held.indptr.nbytes


def test_fusion_by_hand():
    """a: x, y. b: y, then z at zero, which is no match. y: 1/62 + 1/61; x: 1/61."""
    part = lambda scores: type("part", (), {"rankings": {"q": scores}})()
    fused = retrieval.Fusion("a-b", [part({"x": 9.0, "y": 8.0}), part({"z": 0.0, "y": 0.1})])
    assert fused.search({"id": ["q"]}, 10) == {"q": pytest.approx({"x": 1 / 61, "y": 1 / 62 + 1 / 61})}


def test_a_checkpoint_without_sparse_is_refused(tmp_path):
    from corpus import Error
    with pytest.raises(Error, match="expected CKPT/sparse"):
        retrieval.compare(str(tmp_path), [], 8, "cpu")
