"""The baselines in the loop, input dropout, whitening: by hand, as invariants, and resumed bit for bit."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import Stop, config, log, weights
from torch.testing import assert_close

import t2t
from backbone import Head
from corpus import Error
from t2t import Embedder, train


# --------------------------------------------------------------------------------------------------- simcse
class Fixed(torch.nn.Module):
    """A model whose one module claims attention dropout."""
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.0


def test_simcse_by_hand():
    """Two texts at a right angle, read alike twice: cosines 1 and 0, L = log(1 + exp(-1 / tau))."""
    h = torch.tensor([[3.0, 0.0], [0.0, 0.5]], requires_grad=True)
    for parts in ([(0, 2)], [(0, 1), (1, 2)]):                       # in one part or two: the same loss
        model = Fixed().eval()
        [(shown, L)] = t2t.simcse(lambda a, b: (None, h[a:b]), parts, model, 0.3, 0.5)
        assert_close(L, torch.tensor(math.log1p(math.exp(-2))), rtol=1e-6, atol=0)
        assert shown == L.detach() and not model.training and model.attention_dropout == 0.3
    other = iter([h, h.flip(0)])                                  # second reading swapped: cosines 0 and 1
    [(_, L)] = t2t.simcse(lambda *_: (None, next(other)), [(0, 2)], Fixed(), 0.3, 0.5)
    assert_close(L, torch.tensor(math.log1p(math.exp(2))), rtol=1e-6, atol=0)


def test_simcse_against_sentence_transformers():
    from sentence_transformers.util import cos_sim
    a, b = torch.randn(2, 7, 5).double()
    reads = iter([a, b])
    [(_, L)] = t2t.simcse(lambda *_: (None, next(reads)), [(0,)], Fixed(), 0.1, 0.05)
    want = F.cross_entropy(cos_sim(a, b).float() * 20, torch.arange(7))
    assert_close(L.float(), want, rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_on_only_inside(backbone):
    model, tok = t2t.load_backbone(str(backbone), "bidirectional")
    ids, mask = t2t.pad([[1, 40, 50, 60], [1, 70, 80]], 0)
    seen = []

    def read(ids, mask):
        seen.append(t2t.states(model, ids, mask))
        return seen[-1], t2t.pool(seen[-1], mask, "mean")
    list(t2t.simcse(read, [(ids, mask)], model, 0.5, 0.05))
    assert not torch.allclose(seen[0], seen[1])
    assert_close(t2t.states(model, ids, mask), t2t.states(model, ids, mask), rtol=0, atol=0)
    with pytest.raises(Error, match="attention dropout"):
        list(t2t.simcse(read, [], _without_dropout(), 0.1, 0.05))


def _without_dropout():
    model = torch.nn.Linear(1, 1)
    model.config = type("config", (), {"model_type": "linear"})()
    return model


# ----------------------------------------------------------------------------------------------------- mntp
def test_mntp_reads_the_state_before_the_gap():
    """States that give away the token *after* each place: no loss. That know each place itself: much."""
    V, blank = 12, 11
    ids = torch.tensor([[1, 5, 6, 7, 8, 2, 9], [1, 3, 4, 5, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    H, given = Head(torch.eye(V) * 50, None), []
    nll, special = lambda x, v: t2t.token_nll(x, v, H, "torch"), torch.tensor([1, 2])

    def knows(shift):
        def read(x, m):
            given.append(x)
            return F.one_hot(ids.roll(-shift, 1), V).float(), None
        return read
    torch.manual_seed(0)
    [(shown, L)] = t2t.mntp(knows(1), [(ids, mask)], nll, 0.5, blank, special)
    hidden = given[0] != ids
    assert 0 < hidden.sum() < mask.sum() and not (hidden & (mask == 0)).any()
    assert (given[0][hidden] == blank).all() and not torch.isin(ids[hidden], special).any()
    assert_close(L, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    [(_, L)] = t2t.mntp(knows(0), [(ids, mask)], nll, 0.5, blank, special)
    assert L > 30                                                     # 50 minus what repeats by chance
    torch.manual_seed(0)                                              # parts of a batch add up to the whole
    assert sum(x for _, x in t2t.mntp(knows(0), [(ids, mask)], nll, 0.5, blank, special)) == L


# -------------------------------------------------------------------------------------------- input dropout
def test_leave_out():
    ids = np.arange(10_000)
    special, none = np.array([0, 17]), np.array([], int)
    np.testing.assert_array_equal(t2t.leave_out(ids, 0.0, special), ids)
    kept = t2t.leave_out(ids, 0.2, none)
    assert len(kept) == 8_000 and (np.diff(kept) > 0).all()              # in order
    assert abs((kept < 5_000).mean() - 0.5) < 0.02 and not np.array_equal(kept, t2t.leave_out(ids, 0.2, none))
    for _ in range(20):
        assert {0, 17} <= set(t2t.leave_out(ids[:20], 0.9, special))     # what begins and ends a text stays
    assert len(t2t.leave_out(ids[:1], 0.4, none)) == 1 and len(t2t.leave_out(ids[:0], 0.2, none)) == 0


# ------------------------------------------------------------------------------------------------ whitening
def test_whiten():
    rng = np.random.default_rng(0)
    h = (rng.normal(size=(500, 8)) * [9, 5, 3, 2, 1, 1, 0.5, 0.2] + 3).astype(np.float32)
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    before = np.linalg.eigvalsh(u.T @ u / 500)
    for power in (0.0, 0.5, 1.0):
        W = t2t.whiten(h, power, ridge=0.0)
        assert W.dtype == np.float32
        np.testing.assert_allclose(W, W.T, atol=1e-5)
        after = np.linalg.eigvalsh((u @ W).T @ (u @ W) / 500)
        want = before ** (1 - power)
        np.testing.assert_allclose(after / after.mean(), want / want.mean(), rtol=1e-3)
    np.testing.assert_allclose(t2t.whiten(h, 0.0), np.eye(8), atol=1e-6)
    few = t2t.whiten(h[:3], 1.0)                                      # directions never seen: the ridge
    assert np.isfinite(few).all()
    few = np.linalg.eigvalsh(t2t.whiten(np.random.default_rng(0).normal(size=(100, 512)), 1.0))
    assert few.max() < 2 * few.min()                                  # five times more directions than texts


def test_whitening_is_in_the_folder(backbone, texts_file, tmp_path):
    plain = Embedder.load(train(config(backbone, texts_file, tmp_path / "a", whitening=0.0, pooling="mean")))
    white = Embedder.load(train(config(backbone, texts_file, tmp_path / "b", pooling="mean")))
    assert plain.W is None and not (tmp_path / "a" / "2_Dense").exists()
    texts = ["The dog eats.", "A horse hears the wolf in the garden."]
    np.testing.assert_allclose(white.encode(texts), plain.encode(texts) @ white.W, rtol=1e-4, atol=1e-5)
    tokens = [[t for t, _ in row] for row in plain.tokens(texts)]
    assert tokens == [[t for t, _ in row] for row in white.tokens(texts)]   # the head reads h, not h W


def test_folder_of_two_layers_without_whitening(backbone, texts_file, tmp_path):
    """The mean over layers of sentence-transformers is (1 + first) / 2 times shorter: Dense mends it."""
    from sentence_transformers import SentenceTransformer
    out = train(config(backbone, texts_file, tmp_path / "a", whitening=0.0))
    e, texts = Embedder.load(out), ["The dog eats.", "A horse hears the wolf in the garden."]
    np.testing.assert_allclose(e.W, np.eye(32), atol=1e-6)
    np.testing.assert_allclose(SentenceTransformer(out, device="cpu").encode(texts), e.encode(texts),
                               rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the loop, for all methods
@pytest.mark.parametrize("method", ["simcse", "mntp", "data"])
def test_every_method_resumes_bit_for_bit(method, backbone, texts_file, tmp_path):
    whole = config(backbone, texts_file, tmp_path / "whole", method=method)
    train(whole)
    part = config(backbone, texts_file, tmp_path / "part", method=method)

    def stop(step, _):
        torch.rand(3)                                                 # who watches may draw random numbers
        if step == 5:
            raise Stop
    with pytest.raises(Stop):
        train(part, on_step=stop)
    train(config(backbone, texts_file, tmp_path / "part", method=method, resume=True))
    for name, w in weights(tmp_path / "whole").items():
        assert_close(weights(tmp_path / "part")[name], w, rtol=0, atol=0)
    assert [r["loss"] for r in log(tmp_path / "whole")] == [r["loss"] for r in log(tmp_path / "part")]


def test_baselines_learn_and_stack(backbone, texts_file, tmp_path):
    """LLM2Vec's recipe: mntp, then simcse from its weights. Each loss falls below that of knowing nothing."""
    first = train(config(backbone, texts_file, tmp_path / "mntp", method="mntp", steps=400, lr=1e-2))
    facts = json.loads(Path(first, "t2t.json").read_text())
    assert facts["loss"] < facts["constant"] - 0.2                    # the entropy of single tokens
    second = train(config(backbone, texts_file, tmp_path / "both", method="simcse", init=first, steps=100,
                          lr=1e-3))
    facts = json.loads(Path(second, "t2t.json").read_text())
    assert facts["constant"] == pytest.approx(math.log(16)) and facts["loss"] < facts["constant"] - 0.5
    assert "--init" in facts["command"] and facts["ours"][0] == "frozen head"


def test_model_targets_only_of_texts_that_are_seen(backbone, texts_file, tmp_path, monkeypatch):
    """Slow targets are made for the first runs of the first epoch alone; the steps that train on them stay
    the same."""
    made, keep = [], t2t.keep_targets

    def watched(name, tokens, seen, *rest):
        made.append(len(seen))
        return keep(name, tokens, seen, *rest)

    def for_all(name, tokens, seen, *rest):
        return keep(None, tokens, np.arange(len(tokens.start) - 1), *rest)
    losses = []
    for how in (watched, for_all):
        monkeypatch.setattr(t2t, "keep_targets", how)
        out = tmp_path / how.__name__
        train(config(backbone, texts_file, out, method="model", steps=18, batch_size=4))
        losses.append([r["loss"] for r in log(out)])
    assert made == [2 * 16 * 4] and losses[0] == losses[1]        # 128 of 400 texts: two runs of 16 batches
