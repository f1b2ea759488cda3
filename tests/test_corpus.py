"""Corpora: every format reads the same texts, and bad ones end in one line that names file and line."""
import gzip
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from plumbing import cache, corpus
from plumbing.cli import Error
from plumbing.corpus import texts, tokenize_corpus

GOOD = ["The first text.", "Ein zweiter Text, über Käse.", "A third."]


def write(path, kind):
    if kind == ".txt":
        path.write_text("\n".join(GOOD) + "\n", "utf-8")
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": GOOD}), path)
    else:
        data = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in GOOD).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


def test_folder_reads_all_files_and_drops_duplicates(tmp_path):
    for kind in corpus.SUFFIXES:
        write(tmp_path / f"a{kind}", kind)
    (tmp_path / "README.md").write_text("not a corpus")
    counts = corpus.Counts()
    assert sorted(texts(tmp_path, counts)) == sorted(GOOD)
    assert (counts.read, counts.empty, counts.duplicate) == (12, 0, 9)


def test_empty_lines_spaces_and_case(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne  two\t three\n\n   \none two three\nFour", "utf-8")
    counts = corpus.Counts()
    assert list(texts(tmp_path / "a.txt", counts)) == ["One two three", "Four"]
    assert (counts.read, counts.empty, counts.duplicate) == (5, 2, 1)
    assert "5 texts read, 2 empty, 1 duplicates, 2 kept" in str(counts)


def test_a_stream_is_not_read_ahead(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" + b"\xff\xfe bad\n")
    stream = texts(tmp_path / "a.txt")
    assert next(stream) == "good"                                     # the second line is not looked at yet
    with pytest.raises(Error, match="line 2"):
        next(stream)


@pytest.mark.parametrize("name, data, says", [
    ("a.txt", b"fine\ncaf\xe9\n", "expected UTF-8, but .*a.txt line 2"),
    ("a.txt", b"\x00\x01\x02", "a.txt line 1 has zero bytes"),
    ("a.jsonl", b'{"text": "x"}\nnope\n', "a.jsonl line 2 is not one"),
    ("a.jsonl", b'{"texts": "x"}\n', "a.jsonl line 1 has no such string"),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl line 1 has no such string"),
    ("a.jsonl", b'[1]\n', "a.jsonl line 1 has no such string"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not one .maximum recursion"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl line 1 has no such string"),
    ("a.jsonl.gz", b"not gzip", "expected gzip"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-40],
     "expected gzip, but .* is damaged after line"),
    ("a.parquet", b"not parquet", "expected parquet"),
    ("a.csv", b"text\nx\n", "expected a file ending in")])
def test_bad_files_are_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Error, match=says) as e:
        list(texts(tmp_path / name))
    assert "\n" not in str(e.value)


def test_bad_sources(tmp_path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"body": GOOD}), tmp_path / "a.parquet")
    with pytest.raises(Error, match="expected a column called text in .*, found body"):
        list(texts(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(Error, match="expected strings in the column text of .*, found int64"):
        list(texts(tmp_path / "b.parquet"))
    (tmp_path / "none").mkdir()
    with pytest.raises(Error, match="found none in"):
        list(texts(tmp_path / "none"))
    with pytest.raises(Error, match="does not exist"):
        list(texts(tmp_path / "missing.txt"))


def test_lines_of_old_macs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\rTwo.\r\rThree.\r")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "One."}\r{"text": "Two."}\r')
    assert list(texts(tmp_path / "a.txt")) == ["One.", "Two.", "Three."]
    assert list(texts(tmp_path / "b.jsonl")) == ["One.", "Two."]


def test_null_is_an_empty_text(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = [{"text": "One."}, {"text": None}, {"text": "Two."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    hub = tmp_path / "hub"                                            # a folder in the layout of the hub
    hub.mkdir()
    (hub / "other.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    (hub / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: other.jsonl\n" for name in "ab")
        + "---\n")
    for source in (tmp_path / "a.jsonl", tmp_path / "b.parquet", f"hub:{hub}:text:b:test",
                   f"hub:{hub}::b:test"):
        counts = corpus.Counts()
        assert list(texts(source, counts)) == ["One.", "Two."] and counts.empty == 1
    for source in (f"hub:{hub}", f"hub:{hub}:text:b"):                # which of two; no split called train
        with pytest.raises(Error, match="hub:NAME:COLUMN:CONFIGURATION:SPLIT".replace("NAME", str(hub))):
            list(texts(source))


def test_a_hub_folder_that_changes_is_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}')
    before = corpus.fingerprint(f"hub:{tmp_path}")
    (tmp_path / "a.jsonl").write_text('{"text": "Two, now."}')
    assert corpus.fingerprint(f"hub:{tmp_path}") != before
    assert "hub:no/such-name" in corpus.fingerprint("hub:no/such-name")          # offline, or no such name


def test_a_hub_data_set_is_known_by_its_commit_offline_too(tmp_path, monkeypatch):
    """Read where there is a network, trained on where there is none: the same entry of the cache."""
    import huggingface_hub
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))
    found, answers = [], ["a" * 40, None, "b" * 40, None]

    def dataset_info(self, name, timeout):
        sha = answers.pop(0)
        if sha is None:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=sha)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    while answers:
        found.append(corpus.fingerprint("hub:me/data:text"))
    assert found[0] == found[1] != found[2] == found[3]


def test_packages_may_be_installed_below_a_folder_called_testing(tmp_path, monkeypatch):
    package = tmp_path / "testing" / "thing"
    (package / "tests").mkdir(parents=True)
    paragraph = ("This function reads all of the files that a user names and returns what they hold, "
                 "as a list of lines in the order of the names.")
    for file in package / "one.py", package / "tests" / "two.py":
        file.write_text(f'"""{paragraph}\n\nOf {file.stem}: {paragraph.lower()}"""\n')
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: spec)
    found = " ".join(corpus.docstrings(["thing"]))
    assert paragraph in found and "Of two" not in found


def test_two_processes_of_one_number_share_a_cache(tmp_path, monkeypatch):
    """As in containers: each writes a folder of its own; the first that is whole takes the place."""
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))
    inside = threading.Barrier(2)

    def write(folder):
        inside.wait(10)                                               # both write at once
        (folder / "file").write_text(str(folder))
        inside.wait(10)
        assert (folder / "file").read_text() == str(folder)
    with ThreadPoolExecutor(2) as pool:
        made = {f.result() for f in [pool.submit(cache.cached, "tokens", "0" * 20, write) for _ in range(2)]}
    assert [f.name for f in tmp_path.iterdir()] == ["tokens-" + "0" * 20] and len(made) == 1


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_kind_of_string(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet
    column = pyarrow.array([*GOOD, None])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(texts(tmp_path / "a.parquet")) == GOOD


def test_folders_without_hidden_files_and_with_linked_ones(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    for file in (folder / "a.txt", folder / "._a.txt", folder / ".git" / "b.txt", other / "c.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    (folder / "link").symlink_to(other)
    (other / "loop").symlink_to(folder)                               # must not be followed for ever
    assert list(texts(folder)) == ["a.txt", "c.txt"]
    assert str(other / "c.txt") not in (before := str(corpus.fingerprint(folder)))
    (other / "c.txt").write_text("longer")
    assert str(corpus.fingerprint(folder)) != before                  # a change there is noticed


def test_no_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("T2T_CACHE")
    monkeypatch.setattr(corpus.Path, "home", homeless)
    with pytest.raises(Error, match="set T2T_CACHE to a folder"):
        corpus.cached("kind", "name", None)


def test_docstrings_are_prose_and_the_same_every_time():
    a = list(texts_of := corpus.docstrings(["peft"]))
    assert a == list(corpus.docstrings(["peft"])) and len(a) > 300 and texts_of is not None
    for text in a:
        assert ">>>" not in text and "http" not in text and text[0].isupper() and text[-1] in ".!?"


def test_docstring_cleaning_by_hand():
    doc = """Return the ``sum`` of :class:`~a.b.Tensor` elements along **one** of the dimensions of the input.

    Parameters
    ----------
    x : array_like
        The array whose elements are added, which may have any number of dimensions.

    >>> add(1, 2)
    3
    """
    assert list(corpus.prose(doc)) == [
        "Return the sum of Tensor elements along one of the dimensions of the input.",
        "The array whose elements are added, which may have any number of dimensions."]


def test_cached_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))

    def fails(folder):
        (folder / "part").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        corpus.cached("kind", "name", fails)
    assert list(tmp_path.iterdir()) == []
    made = corpus.cached("kind", "name", lambda folder: (folder / "all").write_text("whole"))
    assert [f.name for f in made.iterdir()] == ["all"]
    assert corpus.cached("kind", "name", fails) == made                # found, so not written again


def test_a_damaged_cache_is_made_again(tok, texts_file, tmp_path, monkeypatch):
    """Files that a power failure has emptied or cut."""
    monkeypatch.setenv("T2T_CACHE", str(tmp_path))
    good = tokenize_corpus(texts_file, tok, 64)
    ids = good.ids.tolist()
    cut = (good.folder / "ids").read_bytes()[:400]
    for name, content in ("hash", b""), ("start.npy", b""), ("ids", b""), ("ids", cut):
        (good.folder / name).write_bytes(content)
        assert tokenize_corpus(texts_file, tok, 64).ids.tolist() == ids


def test_texts_of_special_tokens_alone_are_empty(tmp_path, capsys):
    """Of words that the tokenizer does not know, <unk> is left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({"<unk>": 0, "dog": 1}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    known = PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")
    (tmp_path / "some.txt").write_text("a dog\na cat\n")
    assert tokenize_corpus(tmp_path / "some.txt", known, 8).ids.tolist() == [0, 1]
    assert "2 texts read, 1 empty" in capsys.readouterr().out
    (tmp_path / "none.txt").write_text("a cat\n")
    with pytest.raises(Error, match="at least one text that has a token"):
        tokenize_corpus(tmp_path / "none.txt", known, 8)


def test_what_a_folder_can_not_give_is_named(tmp_path):
    (tmp_path / "A.TXT").write_text("one\n")
    assert list(texts(tmp_path)) == ["one"]
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Error, match="b.txt is a pipe, or a link to nothing"):
        list(texts(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")                                  # a second run would find it empty
    with pytest.raises(Error, match="is a pipe or a device"):
        list(texts(tmp_path / "pipe.txt"))
    with pytest.raises(Error, match="expected hub:NAME"):
        list(texts("hub:"))
