"""What counts as a word, and the targets made from them: worked by hand, and their invariants."""
import copy
import math
import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, SentencePieceBPETokenizer
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import t2t
from plumbing.cli import Error
from plumbing.corpus import Tokens, around, question, set_prompt, tokenize_corpus
from t2t import (
    Config, build_targets, data_targets, document_frequency, find_words, method_targets, read_vocabulary)


class FakeTokenizer:
    """A vocabulary given as raw tokens, byte-level (\u0120) or sentencepiece (\u2581) by its space mark."""
    all_special_ids = [0]

    def __init__(self, tokens, mark):
        self.tokens, self.mark = [t.replace("_", mark) for t in tokens], mark

    def __len__(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}

    def get_added_vocab(self):
        return {"<s>": 0}

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]

    def convert_tokens_to_string(self, tokens):
        s = "".join(tokens).replace(self.mark, " ")
        return s.lstrip() if self.mark == "\u2581" else s


#          0      1       2       3      4      5       6    7     8     9      10    11
TOKENS = ["<s>", "_dog", "_Dog", "dog", "DOG", "_the", ".", "_a", "_7", "ing", "_x", "_don",
          "Cat", "_Cat", "_dys", "lexia", "_\u732b", "\u732b", "<unk>", "_3rd", "_able", "able", "_comfort"]
#          12     13      14      15       16         17        18       19      20       21      22


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_canon_by_hand(mark):
    words = read_vocabulary(FakeTokenizer(TOKENS, mark), 24)   # one row of the embedding more than tokens
    want = {1: 1, 2: 1, 3: 1, 4: 1,                            # dog, with and without space, in three cases
            12: 13, 13: 13,                                    # no lower case exists: the spaced form
            14: 14, 16: 16, 17: 16, 20: 20, 21: 20, 22: 22}          # a script without case needs no space
    assert {v: c for v, c in enumerate(words.canonical_id.tolist()) if c >= 0} == want
    assert words.spelling[2] == "Dog" and words.spelling[23] == ""


def test_scripts_without_case():
    """Arabic writes spaces: its later pieces are no words. Thai writes none: each piece may be a word."""
    al, kitab, cat = "\u0627\u0644", "\u0643\u062a\u0627\u0628", "\u0e41\u0e21\u0e27"
    tokens = ["<s>", "_" + al, kitab, "_" + kitab, cat]
    words = read_vocabulary(FakeTokenizer(tokens, "\u0120"), 5)
    assert words.canonical_id.tolist() == [-1, 1, 3, 3, 4]
    assert words.is_continuation.nonzero()[0].tolist() == [2]
    assert find_words(words, np.array([1, 2, 4, 4, 3]), [5])[1].tolist() == [1, 4, 4, 3]


def trained(kind, text):
    tok = kind()
    tok.train_from_iterator([text] * 50, vocab_size=1000, min_frequency=1, special_tokens=["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok._tokenizer, bos_token="<s>")


@pytest.mark.parametrize("sentence", [
    "\u092f\u0939 \u0926\u093f\u0932\u094d\u0932\u0940 \u0915\u0940 "
    "\u092a\u0941\u0930\u093e\u0928\u0940 \u0915\u093f\u0924\u093e\u092c \u0939\u0948",    # Hindi
    "caf\u00e9 cafe\u0301 na\u0308her n\u00e4her", "Dogs chase cats"])
def test_a_word_has_letters_and_marks(sentence):
    """Each word of the sentence is one token, and one word, composed or not (which is the same word)."""
    tok = trained(SentencePieceBPETokenizer, sentence)
    words, wanted = read_vocabulary(tok, len(tok)), sentence.split()
    ids = np.array(tok(sentence, add_special_tokens=False)["input_ids"])
    assert len(ids) == len(wanted)
    found = find_words(words, ids, [len(ids)])[1]
    assert len(found) == len(wanted)
    assert len(set(found)) == len({unicodedata.normalize("NFC", w) for w in wanted})


def test_a_word_that_a_user_adds_is_a_word():
    tok = trained(ByteLevelBPETokenizer, " doctors gave the patients a new drug")
    tok.add_tokens(["remdesivir"])
    words = read_vocabulary(tok, len(tok))
    ids = np.array(tok(" doctors gave patients remdesivir", add_special_tokens=False)["input_ids"])
    found = find_words(words, ids, [len(ids)])[1]
    assert [words.spelling[v] for v in found] == ["doctors", "gave", "patients", "remdesivir"]


def test_a_tokenizer_without_spaces_is_named():
    """Pieces of WordPiece: a beginning has no mark, so nothing is a word but a letter of Chinese."""
    tok = FakeTokenizer(["<s>", "\u732b", *(f"dog{n}" for n in range(48))], "\u0120")
    with pytest.raises(Error, match="--backbone: expected a tokenizer that marks .* FakeTokenizer .* 2.0%"):
        method_targets(Config(method="data", top_k=2), [], read_vocabulary(tok, 50), model=None, tok=tok)


def test_numbers_of_tokens_may_have_gaps():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    own = Tokenizer(models.WordLevel({"?": 0, "\u2581dog": 7, "\u2581cat": 90}, "?"))
    own.decoder = decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?")
    words = read_vocabulary(tok, 100)
    assert np.flatnonzero(words.canonical_id >= 0).tolist() == [7, 90] and words.spelling[90] == "cat"


def test_split_words_count_once():
    words = read_vocabulary(FakeTokenizer(TOKENS, "\u0120"), 23)
    #          the dys|lexia . dog(at once after a stop)    comfort|able   able    next text: dog
    flat = np.array([5, 14, 15, 6, 3, 22, 21, 20, 3, 9])
    text, word = find_words(words, flat, [8, 2])
    assert text.tolist() == [0, 0, 0, 0, 1]
    assert word.tolist() == [14, 1, 22, 20, 1]                 # "able" counts as a word, not as an ending


def test_data_targets_by_hand():
    words = read_vocabulary(FakeTokenizer(TOKENS, "\u0120"), 23)
    rows = [np.array([0, 1, 2, 5, 13]), np.array([5, 6]), np.array([20])]
    idf = np.zeros(23)
    idf[[1, 13, 20]] = math.log(2), math.log(8), 1.0
    i, p = data_targets(rows, words, idf, 4, temperature=1.0)
    assert i.tolist() == [[13, 1, -1, -1], [-1] * 4, [20, -1, -1, -1]]
    # two dogs of idf ln 2 against one cat of idf ln 8 = 3 ln 2: weights 2 and 3
    np.testing.assert_allclose(p, [[0.6, 0.4, 0, 0], [0] * 4, [1, 0, 0, 0]], rtol=1e-6)
    i, p = data_targets(rows, words, idf, 4, temperature=0.5)                    # (3/2)^2 = 9/4
    np.testing.assert_allclose(p[0], [9 / 13, 4 / 13, 0, 0], rtol=1e-6)
    i, p = data_targets(rows, words, idf, 1, temperature=1.0)      # K = 1 keeps the heavier, with all mass
    assert i.tolist() == [[13], [-1], [20]] and p[0, 0] == 1


def corpus_of(rows, tmp_path):
    start = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return Tokens(np.concatenate(rows).astype(np.uint32), start, "hash", tmp_path)


def test_document_frequency_by_hand(tmp_path):
    """Two dogs in one text count once; a cat in two texts twice; an ending is no word."""
    words = read_vocabulary(FakeTokenizer(TOKENS, "\u0120"), 23)
    df = document_frequency(corpus_of([np.array([1, 2, 13]), np.array([13, 22, 21])], tmp_path), words)
    assert {v: n for v, n in enumerate(df.tolist()) if n} == {1: 1, 13: 2, 22: 1}


def test_constant_is_the_loss_of_the_best_constant_prediction(tmp_path, monkeypatch):
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))
    words = read_vocabulary(FakeTokenizer(TOKENS, "\u0120"), 23)
    rows = [np.array([1, 13]), np.array([1]), np.array([20]), np.array([5])]
    q = build_targets(Config(method="data", top_k=3), corpus_of(rows, tmp_path), words, model=None, tok=None)
    i, p = torch.from_numpy(np.array(q.indices)).long(), torch.from_numpy(np.array(q.probs)).double()
    dense = torch.zeros(4, 24, dtype=torch.float64).scatter_add_(1, i.where(i >= 0, 23), p)[:3, :23]
    z = torch.zeros(23, dtype=torch.float64, requires_grad=True)  # minimise over constant logits: the oracle
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = t2t.vocab_kl(z.expand(4, -1), i, p)
        value.backward()
        return value
    optimizer.step(loss)
    assert_close(q.constant_loss, loss().item(), rtol=1e-4, atol=1e-4)
    m, xlogy = dense.mean(0), torch.special.xlogy
    assert_close(q.constant_loss, (xlogy(dense, dense).sum(1).mean() - xlogy(m, m).sum()).item())


def test_targets_from_a_real_tokenizer(tok, texts_file, backbone):
    config = Config(backbone=str(backbone), corpus=str(texts_file), method="data", top_k=16)
    words = read_vocabulary(tok, len(tok))
    tokens = tokenize_corpus(config.corpus, tok, 128)
    q = build_targets(config, tokens, words, model=None, tok=tok)
    assert len(q.indices) == 400
    sums = q.probs.sum(1)
    np.testing.assert_allclose(sums, np.ones(400), rtol=1e-5)        # every sentence has an animal
    text = tok.decode(tokens[7].tolist())
    inside = set(text.lower().replace(",", " ").replace(".", " ").split())
    assert {words.spelling[v] for v in q.indices[7] if v >= 0} <= inside
    again = build_targets(config, tokens, words, model=None, tok=tok)          # from disk
    np.testing.assert_array_equal(q.indices, again.indices)


def test_truncation_is_what_the_model_sees(tok, texts_file):
    words = read_vocabulary(tok, len(tok))
    tokens = tokenize_corpus(str(texts_file), tok, 4)
    assert np.diff(tokens.start).max() == 4
    config = Config(corpus=str(texts_file), method="data", max_length=4, top_k=8)
    q = build_targets(config, tokens, words, model=None, tok=tok)
    for n in (0, 5, 9):
        seen = set(words.canonical_id[tokens[n]])
        assert {v for v in q.indices[n] if v >= 0} <= seen


@pytest.mark.parametrize("method", ["model", "both"])
def test_model_targets_are_special_to_the_text(tok, texts_file, backbone, method, tmp_path, monkeypatch):
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))
    config = Config(backbone=str(backbone), corpus=str(texts_file), top_k=8, method=method)
    model, _ = t2t.load_backbone(str(backbone), "causal")
    words = read_vocabulary(tok, len(tok))
    tokens = tokenize_corpus(config.corpus, tok, 128)
    q = build_targets(config, tokens, words, model=model, tok=tok)
    np.testing.assert_allclose(q.probs.sum(1), 1, rtol=1e-5)
    own = q.indices[q.indices >= 0]
    assert (words.canonical_id[own] == own).all()                           # canonical words only
    if method == "model":                                            # against the definition, for one text
        before, after = Config.prompt.split("{}")
        ids = lambda n: torch.tensor([tok(before)["input_ids"] + tokens[n].tolist()
                                      + tok(after, add_special_tokens=False)["input_ids"]])
        log_p = lambda n: torch.log_softmax(model(input_ids=ids(n)).logits[0, -1], -1)
        with torch.no_grad():
            r = log_p(3) - torch.stack([log_p(n) for n in range(400)]).mean(0)
        best = sorted({words.canonical_id[v]: r[v].item() for v in r.argsort().tolist()
                       if words.canonical_id[v] >= 0}.items(), key=lambda x: -x[1])[:8]
        i, p = q.indices[3], q.probs[3]
        assert i.tolist() == [v for v, _ in best]
        want = torch.tensor([x for _, x in best]).softmax(0)
        np.testing.assert_allclose(p, want, rtol=1e-4)


def test_an_end_of_text_stays_out_of_the_question(tok, backbone):
    """A tokenizer that also ends a text with a special token: it would stand between question and text."""
    from tokenizers import processors
    ending = copy.deepcopy(tok)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert ending("dog")["input_ids"] == [*tok("dog")["input_ids"], 2]
    assert around(ending) == ([1], [2]) and around(tok) == ([1], [])
    before, after = question(ending, Config.prompt)
    assert (before, after) == question(tok, Config.prompt) and before[0] == 1 and after[-1] != 2
    set_prompt(ending, Config.prompt)                                    # read as any other library reads it
    text, cut = ending(["The dog eats.", "dog " * 99], max_length=80, truncation=True)["input_ids"]
    assert text == before + tok("The dog eats.", add_special_tokens=False)["input_ids"] + after
    assert len(cut) == 80 and cut[-len(after):] == after                 # the text is cut, not the question
    assert around(ending) == question(ending, Config.prompt) == (before, after)
    set_prompt(ending, "{}")                                             # of a checkpoint: out again
    assert around(ending) == ([1], [])


@pytest.mark.parametrize("K", [1, 2, 3])
def test_few_targets_from_both_sides(tok, texts_file, backbone, K):
    """An odd K gives one more token to the words of the text; with K = 1 all is theirs."""
    model, _ = t2t.load_backbone(str(backbone), "causal")
    words, tokens = read_vocabulary(tok, len(tok)), tokenize_corpus(str(texts_file), tok, 64)
    config = Config(backbone=str(backbone), corpus=str(texts_file), method="both", top_k=K, steps=1,
                    batch_size=4)
    q = build_targets(config, tokens, words, model=model, tok=tok)
    np.testing.assert_allclose(q.probs.sum(1), 1, rtol=1e-5)
    assert ((q.indices >= 0).sum(1) <= K).all() and (q.indices[:, 0] >= 0).all()
