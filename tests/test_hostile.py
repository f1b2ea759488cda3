"""Hostile input: whatever bytes, texts, ids, logits and files come in, a right result or one line comes out.
"""
import contextlib
import gzip
import io
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import family, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_targets import TOKENS, FakeTokenizer
from test_train import config
from torch.testing import assert_close

import eval as evaluation
import t2t
from plumbing import corpus
from plumbing.cli import Error
from t2t import Config, Embedder, data_targets, load_backbone, model_targets, train, vocab_kl

# the same examples every time; a fixture that examples share is a folder that they overwrite
few = settings(max_examples=50, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
UTF8 = st.text()
ANY = st.text(st.characters(exclude_categories=()))                   # halves of UTF-16 pairs too


def refused(call):
    """The one line in which a call ends."""
    with pytest.raises(Error) as e:
        call()
    assert "\n" not in str(e.value) and "expected" in str(e.value), str(e.value)
    return str(e.value)


# ------------------------------------------------------------------------------------------------- the corpus
def cleaned(texts):
    """What `texts` says of itself, written in another way."""
    kept = {}
    for text in texts:
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        if text:
            kept.setdefault(text.casefold(), text)
    return list(kept.values())


@few
@given(st.lists(UTF8, max_size=5))
def test_txt_is_read_as_it_was_written(tmp_path, lines):
    file, data = tmp_path / "a.txt", "\n".join(lines)
    file.write_bytes(data.encode())
    if "\0" in data:
        assert "has zero bytes" in refused(lambda: list(corpus.texts(file)))
    else:
        assert list(corpus.texts(file)) == cleaned(re.split("[\r\n]", data.removeprefix("\ufeff")))


@few
@given(st.lists(ANY, max_size=5), st.booleans())
def test_jsonl_is_read_as_it_was_written(tmp_path, lines, escaped):
    file, lines = tmp_path / "a.jsonl", [json.dumps({"text": t}, ensure_ascii=escaped) for t in lines]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    if re.search("[\ud800-\udfff]", "".join(lines)):
        assert "expected UTF-8" in refused(lambda: list(corpus.texts(file)))
    else:
        assert list(corpus.texts(file)) == cleaned(json.loads(line)["text"] for line in lines)


@few
@given(st.lists(st.none() | UTF8, max_size=5))
def test_parquet_is_read_as_it_was_written(tmp_path, column):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(column, pyarrow.string())}), file)
    assert list(corpus.texts(file)) == cleaned(text or "" for text in column)


def whole_file(kind):
    """The bytes of a good corpus."""
    if kind == ".parquet":
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": sentences(9)}), out)
        return out.getvalue()
    lines = sentences(9) if kind == ".txt" else [json.dumps({"text": text}) for text in sentences(9)]
    data = "\n".join(lines).encode()
    return gzip.compress(data, mtime=0) if kind.endswith(".gz") else data


@pytest.mark.parametrize("kind", corpus.SUFFIXES)
@settings(few, max_examples=100)
@given(st.data())
def test_damaged_files_are_texts_or_one_line(tmp_path, kind, data):
    """Some bytes of a good file replaced by others, or all of it."""
    file, good = tmp_path / f"a{kind}", whole_file(kind)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    file.write_bytes(good[:a] + data.draw(st.binary(max_size=9)) + good[min(b, a + 9) if a % 2 else b:])
    try:
        assert all(isinstance(text, str) and text for text in corpus.texts(file))
    except Error as e:
        assert "\n" not in str(e)


def test_parquet_that_is_not_utf8_or_has_two_columns_of_the_name(tmp_path):
    offsets, data = np.array([0, 2], np.int32).tobytes(), b"\xff\xfe"
    bad = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data))
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    assert "expected parquet" in refused(lambda: list(corpus.texts(tmp_path / "a.parquet")))
    twice = pyarrow.table([["x"], ["y"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    assert "found text, text" in refused(lambda: list(corpus.texts(tmp_path / "a.parquet")))


def tokenizer_of(model, **settings):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **settings)


def test_a_line_of_ten_megabytes_and_many_copies(tmp_path, backbone):
    from tokenizers.models import WordLevel
    line = "dog cat horse " * 700_000 + "end"
    (tmp_path / "a.txt").write_text(f"{line}\nA dog.\n" + "The same wolf.\n" * 100_000)
    counts = corpus.Counts()
    assert list(corpus.texts(tmp_path / "a.txt", counts)) == [line, "A dog.", "The same wolf."]
    assert (counts.read, counts.duplicate) == (100_002, 99_999)
    (tmp_path / "b.txt").write_text(line[:10**6])
    tokens = corpus.tokenize_corpus(tmp_path / "b.txt", tokenizer_of(WordLevel({"?": 0}, "?")), 8)
    assert tokens.lengths.tolist() == [1]
    (tmp_path / "c.txt").write_text("The same wolf.\n" * 9)            # a corpus of one text, then
    out = train(config(backbone, tmp_path / "c.txt", tmp_path / "out", steps=1))
    assert json.loads((Path(out) / "t2t.json").read_text())["texts"] == 1


def test_texts_without_a_token_are_empty(tmp_path):
    """A tokenizer may drop what it does not know."""
    from tokenizers.models import BPE
    tok = tokenizer_of(BPE({"a": 0}, []))
    (tmp_path / "a.txt").write_text("b\naa\nbb\n")
    assert corpus.tokenize_corpus(tmp_path / "a.txt", tok, 8).lengths.tolist() == [2]
    (tmp_path / "b.txt").write_text("b\nbb\n")
    says = refused(lambda: corpus.tokenize_corpus(tmp_path / "b.txt", tok, 8))
    assert "at least one text that has a token" in says


# ------------------------------------------------------------------------------------------------ the targets
WORDS = t2t.read_vocabulary(FakeTokenizer(TOKENS, "\u0120"), 24)


def proper(indices, probs, K):
    assert indices.shape == probs.shape == (len(probs), K) and (probs >= 0).all()
    for i, p in zip(indices, probs):
        own = i[i >= 0]
        assert (i[i < 0] == -1).all() and (p[i < 0] == 0).all()
        assert (WORDS.canonical_id[own] == own).all() and len(set(own.tolist())) == len(own)
        assert p.sum() == pytest.approx(1 if len(own) else 0, abs=1e-5)


COOL = st.sampled_from([1e-6, 0.3, 1.0, 100.0])


@few
@given(st.lists(st.lists(st.integers(0, 22), max_size=12), min_size=1, max_size=4),
       arrays(np.float64, 24, elements=st.floats(0, 20)), st.integers(1, 6), COOL)
def test_data_targets_are_distributions(ids, idf, K, temperature):
    i, p = data_targets([np.array(row, np.uint32) for row in ids], WORDS, idf, K, temperature=temperature)
    proper(i, p, K)
    words = [set(WORDS.canonical_id[row]) - {-1} for row in ids]
    assert all(set(own[own >= 0]) <= all_of_text for own, all_of_text in zip(i, words))


@few
@given(arrays(np.float32, (3, 24), elements=st.floats(-1e4, 0, width=32)), st.integers(1, 24), COOL)
def test_model_targets_are_distributions(log_p, K, temperature):
    log_p = torch.from_numpy(log_p)
    i, p = model_targets(log_p, log_p.mean(0), WORDS, K, temperature=temperature)
    proper(i, p, K)
    assert (i >= 0).any(1).all()


# --------------------------------------------------------------------------------------------------- the loss
def exact(x, i, p):
    """KL of each row and its gradient in float64, by the definition: 0 log 0 = 0, a logit of -inf or not."""
    q = torch.zeros(len(x), x.shape[1] + 1).double().scatter_add_(1, i.where(i >= 0, x.shape[1]), p.double())
    q, log_softmax = q[:, :-1], x.double().log_softmax(1)
    terms = torch.xlogy(q, q) - q * log_softmax.masked_fill(q == 0, 0)
    return terms.sum(1), q.sum(1, keepdim=True) * log_softmax.exp() - q


BIG = float(np.float32(1e30))
LOGIT = st.floats(-BIG, BIG, width=32, allow_subnormal=False) | st.sampled_from([0, 1, BIG, -BIG, -math.inf])


@st.composite
def losses(draw):
    N, V, K = (draw(st.integers(1, most)) for most in (4, 9, 5))
    x = torch.from_numpy(draw(arrays(np.float32, (N, V), elements=LOGIT)))
    x[:, 0] = x[:, 0].nan_to_num(neginf=0)                             # a row of nothing has no softmax
    i = torch.from_numpy(draw(arrays(np.int64, (N, K), elements=st.integers(-1, V - 1))))
    p = torch.from_numpy(draw(arrays(np.float64, (N, K), elements=st.sampled_from([0, 1e-30, 0.25, 0.5, 1]))))
    if draw(st.booleans()):
        total = p.masked_fill(i < 0, 0).sum(1, keepdim=True)
        p = torch.where(total > 1e-20, p / total, 0)                   # rows of 1, or of nothing
    return x.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))), i, p


@settings(few, max_examples=100)
@given(losses())
def test_vocab_kl_is_its_definition(impl, case):
    x, i, p = case
    want, gradient = exact(*case)
    got = vocab_kl(x.requires_grad_(), i, p, "none", impl)
    assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    given_mass = p.masked_fill(i < 0, 0).sum(1)
    assert (got[(given_mass - 1).abs() < 1e-6] >= -1e-5).all()
    finite = want.isfinite()
    got[finite].sum().backward()
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
    assert_close(x.grad[finite].double(), gradient[finite], rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------- the embedder
@pytest.fixture(scope="module")
def embedder(backbone):
    return Embedder.load(backbone)


SPELLED = ["", "\0", "\ud83d", "<s>", "<s></s><pad>", "a<s>b", "<s>" * 300, "\u202eabc", "\u0645\u0631\u062d",
           "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\ufeff", "\u0301", " \n\t", "x" * 3000]


@few
@given(st.lists(st.sampled_from(SPELLED) | ANY, max_size=4))
def test_any_text_has_a_vector_of_its_own(embedder, texts):
    rows = embedder.encode(texts)
    assert rows.shape == (len(texts), 32) and np.isfinite(rows).all()
    length = np.linalg.norm(rows, axis=1)
    assert ((np.abs(length - 1) < 1e-5) | (length == 0)).all()
    for text, row in zip(texts, rows):
        np.testing.assert_allclose(embedder.encode([text])[0], row, atol=1e-5)


def test_what_is_no_text_is_a_type_error(embedder):
    for no_text in (None, 3, b"dog", ("dog", "cat")):                  # a tokenizer would join a pair
        with pytest.raises(TypeError):
            embedder.encode(["dog", no_text])


# ---------------------------------------------------------------------------------------------- damaged files
@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "ckpt"
    return Path(train(Config(backbone=str(backbone), method="none", out=str(out), device="cpu")))


@pytest.fixture
def broken(checkpoint, tmp_path):
    """broken(file, bytes or a value for JSON) -> a copy of the checkpoint in which this file is another."""
    def make(file, content):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(folder)
    return make


def test_t2t_json_that_is_not_ours(broken, checkpoint):
    facts = json.loads((checkpoint / "t2t.json").read_text())
    used = facts["config"]
    damaged = [b"{", b"\xff", b"[" * 100_000, [], 3, {}, facts | {"config": []}, facts | {"scale": "1"},
               facts | {"scale": math.nan}, facts | {"max_length": 0}, facts | {"max_length": 1.5},
               facts | {"config": used | {"attention": "sideways"}},
               facts | {"config": used | {"pooling": []}},
               {k: v for k, v in facts.items() if k != "max_length"}]
    for content in damaged:
        folder = broken("t2t.json", content)
        assert "t2t.json as training wrote it" in refused(lambda: Embedder.load(folder))
    assert Embedder.load(broken("t2t.json", facts)).encode(["dog"]).shape == (1, 32)


def test_mean_that_is_not_ours(broken):
    from safetensors.torch import save
    good = save({"mean": torch.zeros(32)})
    others = {"other": torch.zeros(32)}, {"mean": torch.zeros(7)}, {"mean": torch.full((32,), math.nan)}
    for content in (b"", good[:-1], b"x" * 99, *map(save, others)):
        folder = broken("mean.safetensors", content)
        assert "32 finite numbers called mean" in refused(lambda: Embedder.load(folder))
    assert Embedder.load(broken("mean.safetensors", good)).sparse(["dog"]).isfinite().all()


def test_weights_and_settings_that_are_damaged(broken, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    for file, content in (("model.safetensors", weights[:5000]), ("model.safetensors", b""),
                          ("config.json", []), ("config.json", b"{"), ("tokenizer.json", b"\xff"),
                          ("tokenizer.json", {}), ("tokenizer_config.json", [])):
        folder = broken(file, content)
        assert "Embedder.load: expected" in refused(lambda: Embedder.load(folder))
    assert "no folder here" in refused(lambda: Embedder.load("nowhere/at/all"))


def test_nan_where_no_check_reads_it(tmp_path, tok):
    """In the last row of an embedding that is not the head: the logits of other tokens are finite."""
    model = family("llama", V=500)
    model.model.embed_tokens.weight.data[499, 0] = math.nan
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    for option in "--backbone", "--init":
        says = refused(lambda: load_backbone(str(tmp_path), "causal", option=option))
        assert says.startswith(f"{option}: expected finite weights") and "model.embed_tokens.weight" in says


def test_no_code_of_a_folder_runs(checkpoint, tmp_path, capsys):
    """Python files that a config names, and weights that are a pickle: refused, and nobody is asked."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass T: pass\n"

    def names_code(folder, file, **names):
        (folder / "evil.py").write_text(code)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | names))

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")
    changes = [
        lambda f: names_code(f, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.T"}),
        lambda f: names_code(f, "tokenizer_config.json", tokenizer_class="T",
                             auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}),
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin").write_bytes(
            pickle.dumps({"x": Evil()}, 2))]
    for n, change in enumerate(changes):
        change(folder := shutil.copytree(checkpoint, tmp_path / str(n)))
        refused(lambda: Embedder.load(folder))
        refused(lambda: evaluation.load(str(folder)))
        (folder / "modules.json").unlink()                            # a bare language model to eval.py
        refused(lambda: evaluation.load(str(folder)))
    shown = capsys.readouterr()
    assert not ran.exists() and "[y/N]" not in shown.out + shown.err


def test_a_state_that_is_damaged(backbone, texts_file, tmp_path):
    def crash(step, _):
        if step == 2:
            raise KeyboardInterrupt
    run = dict(steps=3, save_every=1)
    with contextlib.suppress(KeyboardInterrupt):
        train(config(backbone, texts_file, tmp_path / "a", **run), on_step=crash)
    file = tmp_path / "a" / "state" / "last.pt"
    good, state = file.read_bytes(), torch.load(file)
    adam, some = state["optimizer"], next(iter(state["weights"]))
    narrow = {k: {name: x[:1] if x.ndim else x for name, x in v.items()} for k, v in adam["state"].items()}
    changes = [{"identity": []}, {"run": {}}, {"run": state["run"] | {"step": "2"}}, {"weights": {}},
               {"weights": state["weights"] | {some: state["weights"][some][:1]}}, {"optimizer": {}},
               {"optimizer": adam | {"state": {}}}, {"optimizer": adam | {"state": narrow}}]
    damaged = [good[:-500], b"", b"x" * 99]
    for other in [{"identity": {}}, *(state | change for change in changes)]:
        torch.save(other, stream := io.BytesIO())
        damaged.append(stream.getvalue())
    for content in damaged:
        file.write_bytes(content)
        says = refused(lambda: train(config(backbone, texts_file, tmp_path / "a", **run, resume=True)))
        assert "is damaged" in says and "--overwrite" in says
    assert train(config(backbone, texts_file, tmp_path / "a", **run, overwrite=True))


def test_a_text_that_spells_a_control_token_means_its_characters(checkpoint):
    """Here and in SentenceTransformer, which reads the same from the folder."""
    from sentence_transformers import SentenceTransformer
    e, texts = Embedder.load(checkpoint), ["a</s>b", "<pad> dog", "dog"]
    special = set(e.tok.all_special_ids)
    assert [sum(i in special for i in ids) for ids in e.tok(texts)["input_ids"]] == [1, 1, 1]   # <s>
    assert not special & {i for ids in e.token_ids(texts) for i in ids}
    st = SentenceTransformer(str(checkpoint), device="cpu")
    np.testing.assert_allclose(st.encode(texts), e.encode(texts), atol=1e-5)
