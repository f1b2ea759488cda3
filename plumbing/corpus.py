"""Where texts come from: corpus.texts(SOURCE) streams English (or any) text, one string at a time.

    docstrings               the documentation of the pinned packages installed beside this file: no download
    FILE.txt                 one text a line
    FILE.jsonl  FILE.jsonl.gz  FILE.parquet      a `text` column
    FOLDER                   every such file below it, in the order of their names; none that begin with a dot
    hub:DATASET[:COLUMN[:CONFIGURATION[:SPLIT]]]    a data set of the Hugging Face hub, streamed ("train")

A stream, never a list: a corpus may be larger than memory. `Counts` says what became of every text read.
tokenize_corpus writes the ids of all texts to disk, once.
"""
import gzip
import hashlib
import importlib.util
import itertools
import json
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from plumbing.cache import (cache_path, cached, file_hash, file_stamps, files_below, hash_of,
                            write_whole)
from plumbing.cli import Error, why

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# OURS: packages whose documentation is mostly prose, pinned in requirements.txt: the corpus is the same
# everywhere. mteb is left out on purpose: its documentation describes the tasks that judge the result.
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas", "peft",
            "PIL", "scipy", "sentence_transformers", "sklearn", "sympy", "torch", "transformers")


@dataclass
class Counts:
    read: int = 0
    empty: int = 0
    duplicate: int = 0

    def __str__(self):
        kept = self.read - self.empty - self.duplicate
        return f"{self.read:,} texts read, {self.empty:,} empty, {self.duplicate:,} duplicates, {kept:,} kept"


def texts(source, counts=None):
    """Yield the texts of SOURCE once each: whitespace becomes single spaces, case variants are one text."""
    counts = Counts() if counts is None else counts
    seen = set()                                     # a digest a text, not the text
    for text in read(source):
        counts.read += 1
        text = " ".join(mended(text).split())
        digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()
        if not text:
            counts.empty += 1
        elif digest in seen:
            counts.duplicate += 1
        else:
            seen.add(digest)
            yield text


def mended(text):
    """Half of a UTF-16 pair becomes ?: JSON and a program may hold one, a tokenizer fails on it."""
    return str.encode(text, "utf-8", "replace").decode()


def fingerprint(source):
    """Tells corpora apart without reading them: names, sizes, times of files; versions of packages; the
    commit on the hub, or the last one that it gave."""
    source = str(source)
    if source == "docstrings":
        from importlib.metadata import packages_distributions, version
        name = packages_distributions()
        return [source] + [f"{p} {version(name[p][0])}" for p in PACKAGES if p in name]
    if source.startswith("hub:"):
        from huggingface_hub import HfApi
        name = source.split(":")[1]
        if Path(name).exists():                    # datasets reads a folder, too
            return [source, file_stamps(name, ("",))]
        known = cache_path("hub", hash_of(name))
        try:
            known.parent.mkdir(parents=True, exist_ok=True)
            write_whole(known, HfApi().dataset_info(name, timeout=10).sha)
        except Exception:                          # no network: the commit that the hub gave last
            pass                                   # no such name: `hub` says so, if it must read
        return [source, known.read_text() if known.is_file() else None]
    path = Path(source)
    return file_stamps(path, SUFFIXES)


def read(source):
    """Dispatch on SOURCE; raises Error on anything that is not text."""
    source = str(source)
    if source == "docstrings":
        return docstrings()
    if source.startswith("hub:"):
        return hub(*source[4:].split(":", 3))
    path = Path(source)
    if path.is_dir():
        files = files_below(path, SUFFIXES)
        if not files:
            raise Error(f"--corpus: expected a folder with {', '.join(SUFFIXES)} files, found none in {path}")
        if odd := [f for f in files if not f.is_file()]:
            raise Error(f"--corpus: expected files, but {odd[0]} is a pipe, or a link to nothing")
        return (text for f in files for text in read_file(f))
    if not path.exists():
        raise Error(f"--corpus: expected docstrings, hub:NAME, a folder or a file, but {path} does not exist")
    if not path.is_file():
        raise Error(f"--corpus: expected a file that can be read twice, but {path} is a pipe or a device")
    if not path.name.lower().endswith(SUFFIXES):
        raise Error(f"--corpus: expected a file ending in {', '.join(SUFFIXES)}, got {path.name}")
    return read_file(path)


def read_file(path):
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from parquet(path)
        return
    with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as lines:
        n = 0
        try:
            for n, line in enumerate(lines, 1):
                if b"\0" in line:
                    raise Error(f"--corpus: expected text, but {path} line {n} has zero bytes: "
                                "binary, or UTF-16?")
                line = line.decode("utf-8-sig" if n == 1 else "utf-8")
                for text in line.rstrip("\r\n").split("\r"):             # old Macs end a line so
                    if name.endswith(".txt"):
                        yield text
                    elif text.strip():
                        text = json.loads(text, parse_int=float)["text"]   # an int may have too many digits
                        yield "" if text is None else text + ""           # + "": a number is a TypeError
        except UnicodeDecodeError as e:
            raise Error(f"--corpus: expected UTF-8, but {path} line {n} is not ({e.reason}): "
                        "convert it") from None
        except (json.JSONDecodeError, RecursionError) as e:             # brackets nested too deep
            raise Error(f"--corpus: expected JSON lines, but {path} line {n} is not one "
                        f"({getattr(e, 'msg', e)})") from None
        except (KeyError, TypeError):
            raise Error(f'--corpus: expected {{"text": "..."}}, '
                        f'but {path} line {n} has no such string') from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise Error(f"--corpus: expected gzip, but {path} is damaged after line {n} ({e})") from None


def parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if names.count("text") != 1:
            raise Error(f"--corpus: expected a column called text in {path}, found {', '.join(names[:10])}")
        kind = file.schema_arrow.field("text").type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind    # categories of pandas
        if str(kind) not in ("string", "large_string", "string_view", "null"):   # null: not a single text
            raise Error(f"--corpus: expected strings in the column text of {path}, found {kind}")
        for batch in file.iter_batches(columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:    # at the beginning, or amid the file
        raise Error(f"--corpus: expected parquet, but {path} is not ({str(e).splitlines()[0]})") from None


def hub(name, column="", configuration="", split="train"):
    import datasets
    column = column or "text"
    if not name:
        raise Error("--corpus: expected hub:NAME, got no name")

    def rows():
        try:
            yield from datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        except Exception as e:                     # offline, unknown, gated: datasets has many types for it
            raise Error(f"--corpus: expected a data set on the hub, but {name} can not be read here "
                        f"({why(e)}): check the name and the network, pass a file, or "
                        f"hub:{name}:COLUMN:CONFIGURATION:SPLIT") from None
    for row in rows():
        if not isinstance(row.get(column), str) and row.get(column, 0) is not None:
            raise Error(f"--corpus: expected text in a column called {column} of {name}, "
                        f"found {', '.join(row)}: pass hub:{name}:COLUMN")
        yield row[column] or ""


# ------------------------------------------------------------------------------------------------- docstrings
LITERAL = re.compile(r'(?<![\w\'"])[rRuU]?("""|\'\'\')(.*?)\1', re.S)
MARKUP = [(re.compile(p, re.S), r) for p, r in (
    (r":[\w:]+:`[~!]?(?:[^`<]*?\.)?([^`<.]+?)(?:\s*<[^`]*>)?`", r"\1"),      # :class:`~a.b.C` -> C
    (r"`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1"), (r"\[([^\]]*)\]\([^)]*\)", r"\1"),       # links -> their text
    (r"\s?\[[\w# ]*\]_?", ""), (r"`{1,2}([^`]*)`{1,2}_?", r"\1"),
    (r"\*{1,2}([^*\s][^*]*)\*{1,2}", r"\1"))]
CODE = re.compile(r">>>|\.\.\. |^\s*\.\. |::$|https?:|[{}\\=|<>@#$_~^]|\w\(|\w\.\w|--|\+\+", re.M)
OTHER = re.compile(r"[^A-Za-z ]")
WORDS = re.compile(
    r"\b(?:the|an?|of|to|is|are|in|for|and|or|that|this|be|with|by|it|as|on|if|when|not|which)\b", re.I)
# "- ", "1. ", "x (int): "
ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)]|[\w*, ]{1,40}(?:\([^()]{1,80}\))?\s?:(?!:))\s+")


def prose(doc):
    """The English paragraphs of one documentation string: no code, formulas, tables or signatures."""
    for block in re.split(r"\n\s*\n", doc):
        lines, paragraph = block.split("\n"), []
        for line in lines + [""]:
            header = re.match(r"\s*[\w*, ]+ : ", line)                  # numpydoc's "x : array of floats"
            item = ITEM.match(line)
            if (not line.strip() or header or item) and paragraph:
                yield from clean(" ".join(paragraph))
                paragraph = []
            if line.strip() and not header:
                paragraph.append(line[item.end():].strip() if item else line.strip())


def clean(text):
    if len(text) < 40 or not text[0].isupper():
        return
    for pattern, by in MARKUP:
        text = pattern.sub(by, text)
    text = " ".join(text.split())
    words = text.count(" ") + 1
    if (40 <= len(text) <= 1500 and text[-1] in ".!?" and text.isascii() and not CODE.search(text)
            and len(OTHER.findall(text)) <= 0.08 * len(text) and len(WORDS.findall(text)) >= 0.15 * words):
        yield text


def docstrings(packages=PACKAGES):
    """Documentation strings of installed packages, found by parsing their source for triple-quoted literals.

    A full parse (ast) of these packages takes minutes. The literals alone take seconds, and `clean` drops
    whatever of them is not English prose."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise Error(f"--corpus docstrings: expected the package {package} to be installed: "
                        "pip install -r requirements.txt, or pass your own texts")
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*.py")):
            if not {"tests", "testing"} & set(file.relative_to(root).parts):
                for literal in LITERAL.finditer(file.read_text("utf-8", "ignore")):
                    yield from prose(literal[2])


# ------------------------------------------------------------------------------------ texts -> tokens on disk
class Tokens(NamedTuple):
    """A tokenized corpus of N texts, memory-mapped: tokens[n] are the ids (T,) of text n."""
    ids: np.ndarray         # (total,) uint32
    start: np.ndarray       # (N + 1,) int64
    hash: str               # of the texts
    folder: Path

    def __len__(self):
        return len(self.start) - 1

    def __getitem__(self, n):
        return self.ids[self.start[n]:self.start[n + 1]]

    @property
    def lengths(self):      # (N,)
        return np.diff(self.start)


def tokenize(tok, texts, max_length):
    """list of str -> list of id lists, truncated, without the question or <s>, which `around` gives."""
    if not texts:
        return []
    texts = [mended(text) for text in texts]
    return tok(texts, truncation=True, max_length=max_length, return_attention_mask=False,
               add_special_tokens=False)["input_ids"]


def around(tok):
    """-> before, after: the ids that the tokenizer puts around every text: the question, or only <s>."""
    made = tok("a", return_special_tokens_mask=True)
    ids, extra = made["input_ids"], made["special_tokens_mask"]
    if 0 not in extra:                                     # not even "a" is in the vocabulary
        return ids, []
    first, last = extra.index(0), len(extra) - extra[::-1].index(0)    # of the text
    return ids[:first], ids[last:]


def question(tok, prompt):
    """-> before, after: the ids of a question around a text, behind the tokenizer's <s>, if it has one. Its
    </s> is left out: the model is to answer."""
    special, parts = set(tok.all_special_ids), prompt.split("{}")
    before, after = (tok(part, add_special_tokens=False)["input_ids"] for part in parts)
    return [i for i in around(tok)[0] if i in special] + before, after


def set_prompt(tok, prompt):
    """Make the question the tokenizer's template, so every library that reads the checkpoint asks it."""
    before, after = around(tok)
    if prompt == "{}" and {*before, *after} <= {*tok.all_special_ids}:           # nothing to remove
        return
    if not getattr(tok, "backend_tokenizer", None):
        raise Error(f"--prompt: expected a tokenizer that takes a template, got {type(tok).__name__}: pass "
                    "--prompt {}")
    named = dict(zip(("before", "after"), question(tok, prompt)))
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join((*["before"] * bool(named["before"]), "$A", *["after"] * bool(named["after"]))),
        special_tokens=[{"id": name, "ids": ids, "tokens": tok.convert_ids_to_tokens(ids)}
                        for name, ids in named.items() if ids])


def tokenizer_hash(tok):
    """A hash of all that decides the ids of a text. Truncation and padding are dropped: they are those of the
    tokenizer's last call."""
    backend = getattr(tok, "backend_tokenizer", None)
    how = (json.loads(backend.to_str()) | {"truncation": None, "padding": None} if backend else
           [type(tok).__name__, sorted(tok.get_vocab().items()), str(tok.special_tokens_map)])
    return hash_of(how, tok.all_special_ids, len(tok), getattr(tok, "split_special_tokens", False))


def tokenize_corpus(source, tok, max_length):
    """Stream SOURCE through the tokenizer -> Tokens. Done once; later runs find the result on disk."""
    def write(folder):
        digest, counts, lengths = hashlib.blake2b(digest_size=16), Counts(), []
        special = set(tok.all_special_ids)
        with open(folder / "ids", "wb") as out, tqdm(desc="tokenize", unit=" texts") as bar:
            for block in blocks(texts(source, counts), 4096):
                ids = [i for i in tokenize(tok, block, max_length) if not special.issuperset(i)]
                counts.empty += len(block) - len(ids)      # nothing that the tokenizer knows
                n = np.array([len(i) for i in ids], np.int64)
                np.fromiter((i for x in ids for i in x), np.uint32, n.sum()).tofile(out)
                lengths.append(n)
                digest.update("\n".join(block).encode())
                bar.update(len(block))
        print(f"corpus {source}: {counts}")
        start = np.cumsum(np.concatenate([[0], *lengths]))
        if not start[-1]:
            raise Error(f"--corpus: expected at least one text that has a token, but {source} has none")
        np.save(folder / "start.npy", start)
        (folder / "hash").write_text(digest.hexdigest())

    # this file: an edit makes tokens anew
    name = hash_of(file_hash(__file__), fingerprint(source), tokenizer_hash(tok), max_length)
    def load(folder):
        ids, start = np.memmap(folder / "ids", np.uint32, "r"), np.load(folder / "start.npy")
        digest = (folder / "hash").read_text()
        if start[-1] != len(ids) or not digest:
            raise ValueError("a file is cut short")
        return Tokens(ids, start, digest, folder)
    return cached("tokens", name, write, load)


def is_unspaced(letter):
    """Is it of a script that puts no spaces between words, so that each token may be a word?"""
    return unicodedata.name(letter, "").startswith(
        ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"))


def blocks(items, n):
    """Lists of n items, the last one shorter."""
    items = iter(items)
    while block := list(itertools.islice(items, n)):
        yield block
