"""The baselines in the loop, the measured scale: by hand, as invariants, and resumed bit for bit."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import family
from test_train import Stop, config, log, weights
from torch.testing import assert_close

import t2t
from plumbing import baselines
from plumbing.cli import Error
from t2t import Head, train


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
        longer = itertools.count(1)                                # lengths do not matter
        [L] = t2t.simcse(parts, lambda a, b: (None, next(longer) * h[a:b]), model, 0.3, 0.5)
        assert_close(L, torch.tensor(math.log1p(math.exp(-2))), rtol=1e-6, atol=0)
        assert not model.training and model.attention_dropout == 0.3
    other = iter([h, h.flip(0)])                                  # second reading swapped: cosines 0 and 1
    [L] = t2t.simcse([(0, 2)], lambda *_: (None, next(other)), Fixed(), 0.3, 0.5)
    assert_close(L, torch.tensor(math.log1p(math.exp(2))), rtol=1e-6, atol=0)


def test_simcse_against_sentence_transformers():
    from sentence_transformers.util import cos_sim
    a, b = torch.randn(2, 7, 5).double()
    reads = iter([a, b])
    [L] = t2t.simcse([(0,)], lambda *_: (None, next(reads)), Fixed(), 0.1, 0.05)
    want = F.cross_entropy(cos_sim(a, b).float() * 20, torch.arange(7))
    assert_close(L.float(), want, rtol=1e-4, atol=1e-5)


def test_simcse_reads_again_with_the_same_dropout(backbone):
    """Backward reads each micro-batch again: the gradient is that of a graph which is held, two draws of
    dropout and all."""
    ids, mask = t2t.pad([[1, 40, 50, 60], [1, 70, 80], [1, 41, 51, 61], [1, 71]], 0)
    parts = [(ids[:2], mask[:2]), (ids[2:], mask[2:])]

    def gradient(held):
        model, _ = t2t.load_backbone(str(backbone), "bidirectional")
        graphs = []

        def forward(ids, mask):
            x = t2t.hidden_states(model, ids, mask)
            graphs.append(x.grad_fn)
            return x, t2t.pool(x, mask, "mean")
        torch.manual_seed(0)
        if held:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(baselines, "recomputed", lambda f, *part, **_: f(*part))
                for L in t2t.simcse(parts, forward, model):
                    L.backward()
        else:
            for L in t2t.simcse(parts, forward, model):
                L.backward()
        return len(graphs), L.item(), [p.grad for p in model.parameters() if p.grad is not None]
    (reads, L, kept), (again, other, read) = gradient(True), gradient(False)
    assert (reads, again) == (4, 8) and L == other
    assert len(kept) == len(read) > 5
    for a, b in zip(kept, read):
        assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_attention_dropout_is_on_only_inside(backbone):
    model, tok = t2t.load_backbone(str(backbone), "bidirectional")
    ids, mask = t2t.pad([[1, 40, 50, 60], [1, 70, 80]], 0)
    seen = []

    def forward(ids, mask):
        seen.append(t2t.hidden_states(model, ids, mask))
        return seen[-1], t2t.pool(seen[-1], mask, "mean")
    list(t2t.simcse([(ids, mask)], forward, model, 0.5, 0.05))
    assert not torch.allclose(seen[0], seen[1])
    assert_close(t2t.hidden_states(model, ids, mask), t2t.hidden_states(model, ids, mask), rtol=0, atol=0)
    with pytest.raises(Error, match="attention dropout"):
        list(t2t.simcse([(ids, mask)], forward, _without_dropout(), 0.1, 0.05))
    with pytest.raises(Error, match="two texts or more"):
        list(t2t.simcse([(ids[:1], mask[:1])], forward, model, 0.5, 0.05))


@pytest.mark.parametrize("kind, settings", [
    ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    ("OPT", dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, dropout=0.0,
                 num_attention_heads=4)),
    ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
    ("BioGpt", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                    hidden_dropout_prob=0.0)),
    ("Mpt", dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2))])
def test_attention_dropout_has_many_names(kind, settings):
    import transformers as tf
    torch.manual_seed(0)
    config = getattr(tf, kind + "Config")(vocab_size=99, **settings)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    ids, mask = t2t.pad([[1, 40, 50, 60], [1, 70, 80]], 0)
    read = lambda: t2t.pool(t2t.hidden_states(model, ids, mask), mask, "mean")
    with torch.no_grad():
        before = read()
        [L] = t2t.simcse([(ids, mask)], lambda *_: (None, read()), model, 0.5, 0.05)
        assert_close(read(), before, rtol=0, atol=0)                  # off again
    assert L.isfinite()


def _without_dropout():
    model = torch.nn.Linear(1, 1)
    model.config = type("config", (), {"model_type": "linear"})()
    return model


# ----------------------------------------------------------------------------------------------------- mntp
class Underscore:
    """A tokenizer of which mntp asks two things."""
    all_special_ids = [1, 2]

    def __call__(self, text, add_special_tokens):
        assert text == "_" and not add_special_tokens
        return {"input_ids": [11]}


def test_mntp_reads_the_state_before_the_gap():
    """States that give away the token *after* each place: no loss. That know each place itself: much."""
    V, mask_id = 12, 11
    ids = torch.tensor([[1, 5, 6, 7, 8, 2, 9], [1, 3, 4, 5, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    H, given = Head(torch.eye(V) * 50, None), []

    def knows(shift):
        def forward(x, m):
            given.append(x)
            return F.one_hot(ids.roll(-shift, 1), V).float(), None
        return forward
    torch.manual_seed(0)
    [L] = t2t.mntp([(ids, mask)], knows(1), H, Underscore(), 0.5)
    hidden = given[0] != ids
    assert 0 < hidden.sum() < mask.sum() and not (hidden & (mask == 0)).any()
    assert (given[0][hidden] == mask_id).all() and not (torch.isin(ids, torch.tensor([1, 2])) & hidden).any()
    assert_close(L, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    [L] = t2t.mntp([(ids, mask)], knows(0), H, Underscore(), 0.5)
    assert L > 30                                                     # 50 minus what repeats by chance


def test_mntp_without_an_underscore():
    """A tokenizer whose vocabulary lacks `_` and drops what it does not know: the blank is its padding."""
    class Tok(Underscore):
        pad_token_id = 10

        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}
    ids, given = torch.tensor([[1, 5, 6, 7, 8, 2, 9]]), []
    forward = lambda x, m: (given.append(x) or torch.zeros(1, 7, 12), None)
    list(t2t.mntp([(ids, torch.ones_like(ids))], forward, Head(torch.eye(12), None), Tok(), 0.9))
    assert set(given[0][given[0] != ids].tolist()) == {10}


# ------------------------------------------------------------------------------------------------- the loss
def test_target_loss_is_its_equation():
    """In one micro-batch or three, in float64: the mean KL of the texts that have targets."""
    torch.manual_seed(0)
    V, C, s = 12, 4, 1.7
    H, x = Head(torch.randn(V, C).double(), torch.randn(V).double()), torch.randn(3, 5, C).double()
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    indices, probs = torch.tensor([[1, 4], [2, -1], [-1, -1]]), torch.tensor([[0.25, 0.75], [1, 0], [0, 0]])
    q = torch.zeros(3, V).double()
    q[0, 1], q[0, 4], q[1, 2] = 0.25, 0.75, 1
    h = torch.stack([x[b, :int(mask[b].sum())].mean(0) for b in range(3)])
    kl = F.kl_div(H(s * h).log_softmax(1), q, reduction="sum") / 2     # the third text has no target
    for cut in ([3], [1, 1, 1], [2, 1]):
        batch = list(zip(x.split(cut), mask.split(cut)))               # states in the place of ids

        def forward(part, m):
            return part, (part * m[..., None]).sum(1) / m.sum(1, keepdim=True)
        parts = list(t2t.target_loss(batch, forward, H, s, indices=indices, probs=probs.double(),
                                     impl="torch"))
        assert len(parts) == len(cut)
        assert_close(sum(parts), kl)


# ---------------------------------------------------------------------------------------- the measured scale
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])      # as it is, a soft cap, a scale
def test_no_default_is_fitted_to_one_models_norms(name, tmp_path, tok, texts_file):
    """With the measured s, the first step's loss is at most ln V, whatever a family's norms are, also when
    the rows of its head are 50 times as long."""
    family(name, V=520).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    model, _ = t2t.load_backbone(str(tmp_path / "m"), "causal")
    for longer in (1, 50):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(longer)
        model.save_pretrained(tmp_path / "m")
        out = tmp_path / f"out{longer}"
        train(config(tmp_path / "m", texts_file, out, steps=1, attention="causal"))
        assert log(out)[0]["loss"] <= math.log(520) + 0.01


def test_scale_by_hand():
    """Logits s (1, -1), the target all on the first: the larger s the better. On the second: the smallest s.
    Two thirds and one third: 2 s = ln 2, s = 0.35."""
    H, h = Head(torch.eye(2), None), torch.tensor([[1.0, -1.0]])
    best = lambda p: t2t.measure_scale(h, H, torch.tensor([[0, 1]]), torch.tensor([p]))
    assert best([0.0, 1.0]) == min(t2t.SCALES)
    assert best([1.0, 0.0]) > 5
    assert best([2 / 3, 1 / 3]) == min(t2t.SCALES, key=lambda s: abs(math.log(s / (math.log(2) / 2))))


# ------------------------------------------------------------------------------- the loop, for all methods
@pytest.mark.parametrize("method", ["simcse", "mntp"])
def test_baselines_resume_bit_for_bit(method, backbone, texts_file, tmp_path):
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
    first = train(config(backbone, texts_file, tmp_path / "mntp", method="mntp", steps=100, lr=1e-2))
    facts = json.loads(Path(first, "t2t.json").read_text())
    assert facts["loss"] < facts["constant_loss"] - 0.2                    # the entropy of single tokens
    second = train(config(backbone, texts_file, tmp_path / "both", method="simcse", init=first, steps=100,
                          lr=1e-3))
    facts = json.loads(Path(second, "t2t.json").read_text())
    assert facts["constant_loss"] == pytest.approx(math.log(16))
    assert facts["loss"] < facts["constant_loss"] - 0.5
    assert "--init" in facts["command"] and "frozen embedding" in facts["ours"]


def test_targets_only_of_texts_that_are_seen(backbone, texts_file, tmp_path, monkeypatch):
    """Targets are made for the first buckets of the first epoch alone: 128 of 400 texts, two buckets of 16
    batches of 4."""
    made, build = [], t2t.build_targets
    monkeypatch.setattr(t2t, "build_targets", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    train(config(backbone, texts_file, tmp_path / "a", method="model", steps=18, batch_size=4))
    assert len(made[0].texts) == len(made[0].indices) == 2 * 16 * 4 and (made[0].indices >= 0).any(1).all()
    lengths = t2t.tokenize_corpus(str(texts_file), t2t.load_backbone(str(backbone), "causal")[1], 64).lengths
    assert all(np.isin(t2t.bucketed_batch(step, 42, lengths, 4), made[0].texts).all() for step in range(18))
    some = made[0].texts[[3, 0, 77]]
    assert torch.equal(made[0].of(some)[0], torch.from_numpy(made[0].indices[[3, 0, 77]]))
