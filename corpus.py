"""Where texts come from: corpus.texts(SOURCE) streams English (or any) text, one string at a time.

    docstrings               the documentation of the pinned packages installed beside this file: no download
    FILE.txt                 one text a line
    FILE.jsonl  FILE.jsonl.gz  FILE.parquet      a `text` column
    FOLDER                   every such file below it, in the order of their names
    hub:DATASET[:COLUMN]     a data set of the Hugging Face hub, streamed (split "train")

A stream, never a list: a corpus may be larger than memory. `Counts` says what became of every text read.
"""
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# OURS: packages whose documentation is mostly prose, pinned in requirements.txt: the corpus is the same
# everywhere. mteb is left out on purpose: its documentation describes the tasks that judge the result.
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas", "peft",
            "PIL", "scipy", "sentence_transformers", "sklearn", "sympy", "torch", "transformers")

# OURS: words that carry grammar, not content. Everything subtler is left to idf, which knows the corpus.
STOP = frozenset("""
a about above after again against all almost also although always am among an and another any anyone
anything are around as at be because been before being below between both but by can cannot could did do
does doing done down during each either else enough etc even ever every everyone everything few for from
further get gets got had has have having he hence her here hers herself him himself his how however i if
in instead into is it its itself just least less like many may maybe me might mine more most much must my
myself neither never no nobody none nor not nothing now of off often on once one only onto or other
others otherwise our ours ourselves out over own per perhaps please quite rather really same shall she
should since so some someone something sometimes soon still such than that the their theirs them
themselves then there therefore these they this those though through thus to too toward towards under
until up upon us use used uses using very via was we well were what whatever when whenever where whereas
wherever whether which while who whoever whole whom whose why will with within without would yet you your
yours yourself yourselves ve ll re don didn doesn isn wasn aren won couldn wouldn shouldn hasn haven hadn
""".split())


class Error(ValueError):
    """Bad input: one line for a person, saying what was expected, what came and what to do."""


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
        text = " ".join(text.encode("utf-8", "replace").decode().split())      # half a character: JSON may
        digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()
        if not text:
            counts.empty += 1
        elif digest in seen:
            counts.duplicate += 1
        else:
            seen.add(digest)
            yield text


def fingerprint(source):
    """Tells corpora apart without reading them: names, sizes, times of files; versions of packages."""
    source = str(source)
    if source == "docstrings":
        from importlib.metadata import packages_distributions, version
        name = packages_distributions()
        return [source] + [f"{p} {version(name[p][0])}" for p in PACKAGES if p in name]
    if source.startswith("hub:"):
        return source
    path = Path(source)
    return stamps(path, SUFFIXES)


def stamps(path, suffixes=(".safetensors", ".bin")):
    """Path, size and time of a file, or of the files of such a kind below a folder; of a hub id, its name."""
    files = sorted(f for f in Path(path).rglob("*") if f.name.endswith(suffixes)) or [Path(path)]
    known = [(f, f.stat()) for f in files if f.is_file()]
    return [str(path)] + [(str(f.absolute()), s.st_size, s.st_mtime_ns) for f, s in known]


def read(source):
    """Dispatch on SOURCE; raises Error on anything that is not text."""
    source = str(source)
    if source == "docstrings":
        return docstrings()
    if source.startswith("hub:"):
        return hub(*source[4:].split(":", 1))
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
        if not files:
            raise Error(f"--corpus: expected a folder with {', '.join(SUFFIXES)} files, found none in {path}")
        return (text for f in files for text in read_file(f))
    if not path.exists():
        raise Error(f"--corpus: expected docstrings, hub:NAME, a folder or a file, but {path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise Error(f"--corpus: expected a file ending in {', '.join(SUFFIXES)}, got {path.name}")
    return read_file(path)


def read_file(path):
    if path.name.endswith(".parquet"):
        yield from parquet(path)
        return
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as lines:
        n = 0
        try:
            for n, line in enumerate(lines, 1):
                if b"\0" in line:
                    raise Error(f"--corpus: expected text, but {path} line {n} has zero bytes: "
                                "binary, or UTF-16?")
                line = line.decode("utf-8-sig" if n == 1 else "utf-8")
                if path.name.endswith(".txt"):
                    yield line
                elif line.strip():
                    yield json.loads(line)["text"] + ""       # + "": a number or null is a TypeError
        except UnicodeDecodeError as e:
            raise Error(f"--corpus: expected UTF-8, but {path} line {n} is not ({e.reason}): "
                        "convert it") from None
        except json.JSONDecodeError as e:
            raise Error(f"--corpus: expected JSON lines, but {path} line {n} is not one ({e.msg})") from None
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
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise Error(f"--corpus: expected parquet, but {path} is not ({str(e).splitlines()[0]})") from None
    names = file.schema_arrow.names
    if "text" not in names:
        raise Error(f"--corpus: expected a column called text in {path}, found {', '.join(names)}")
    kind = file.schema_arrow.field("text").type
    if not pyarrow.types.is_string(kind) and not pyarrow.types.is_large_string(kind):
        raise Error(f"--corpus: expected strings in the column text of {path}, found {kind}")
    for batch in file.iter_batches(columns=["text"]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def hub(name, column="text"):
    import datasets
    def rows():
        try:
            yield from datasets.load_dataset(name, split="train", streaming=True)
        except Exception as e:                       # offline, unknown, gated: datasets has many types for it
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise Error(f"--corpus: expected a data set on the hub, but {name} can not be read here "
                        f"({why}): check the name and the network, or pass a file") from None
    for row in rows():
        if not isinstance(row.get(column), str):
            raise Error(f"--corpus: expected text in a column called {column} of {name}, "
                        f"found {', '.join(row)}: pass hub:{name}:COLUMN")
        yield row[column]


# ------------------------------------------------------------------------------------------------- docstrings
LITERAL = re.compile(r'(?<![\w\'"])[rRuU]?("""|\'\'\')(.*?)\1', re.S)
MARKUP = [(re.compile(p, re.S), r) for p, r in (
    (r":[\w:]+:`[~!]?(?:[^`<]*?\.)?([^`<.]+?)(?:\s*<[^`]*>)?`", r"\1"),      # :class:`~a.b.C` -> C
    (r"`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1"), (r"\[([^\]]*)\]\([^)]*\)", r"\1"),         # links -> their text
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
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            if "tests" not in file.parts and "testing" not in file.parts:
                for literal in LITERAL.finditer(file.read_text("utf-8", "ignore")):
                    yield from prose(literal[2])


# ------------------------------------------------------------------------------------ texts -> tokens on disk
class Tokens(NamedTuple):
    """A tokenized corpus of N texts, memory-mapped."""
    ids: object         # (total,) uint32
    start: object       # (N + 1,) int64
    df: object          # (V,) int64: in how many texts each word stands
    hash: str           # of the texts
    folder: Path

    def text(self, n):
        return self.ids[self.start[n]:self.start[n + 1]]


def tokenize(tok, texts, max_length):
    """list of str -> list of id lists, truncated. Only here text becomes ids, in training and in use."""
    if not texts:
        return []
    return tok(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]


def read_tokens(source, tok, max_length, V, find_words, vocabulary):
    """Stream SOURCE through the tokenizer, once; later runs find the result on disk.

    find_words: function(ids (total,), lengths (n,)) -> (text number, word id) of every word, to count df."""
    import numpy as np
    from tqdm import tqdm

    def write(folder):
        digest, counts, lengths, df = hashlib.blake2b(digest_size=16), Counts(), [], np.zeros(V, np.int64)
        with open(folder / "ids", "wb") as out, tqdm(desc="tokenize", unit=" texts") as bar:
            for block in blocks(texts(source, counts), 4096):
                ids = tokenize(tok, block, max_length)
                n = np.array([len(i) for i in ids])
                flat = np.fromiter((i for x in ids for i in x), np.uint32, n.sum())
                flat.tofile(out)
                text, word = find_words(flat, n)
                df += np.bincount(np.unique(text * V + word) % V, minlength=V)
                lengths.append(n)
                digest.update("\n".join(block).encode())
                bar.update(len(block))
        print(f"corpus {source}: {counts}")
        if not lengths:
            raise Error(f"--corpus: expected at least one text, but {source} has none")
        np.save(folder / "start.npy", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))
        np.save(folder / "df.npy", df)
        (folder / "hash").write_text(digest.hexdigest())

    folder = cached("tokens", key(code(__file__), fingerprint(source), vocabulary, max_length), write)
    return Tokens(np.memmap(folder / "ids", np.uint32, "r"), np.load(folder / "start.npy"),
                  np.load(folder / "df.npy"), (folder / "hash").read_text(), folder)


def keep_targets(name, tokens, seen, K, make, n_block):
    """Targets of the texts `seen` (others: none) -> indices (N,K), probs (N,K), memory-mapped, and constant =
    mean_b KL(q_b || m), m the mean of q: the honest zero. Made once, by the function that make() gives."""
    import numpy as np
    from tqdm import tqdm

    def write(folder):
        N, V, q = len(tokens.start) - 1, len(tokens.df), make()
        indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int32, (N, K))
        probs = np.lib.format.open_memmap(folder / "probs.npy", "w+", np.float32, (N, K))
        indices[:], probs[:] = -1, 0
        mean, plogp, valid = np.zeros(V), 0.0, 0
        with tqdm(total=len(seen), desc="targets", unit=" texts") as bar:
            for block in blocks(seen.tolist(), n_block):
                i, p = q([tokens.text(n) for n in block])
                width = ((0, 0), (0, K - i.shape[1]))
                indices[block], probs[block] = np.pad(i, width, constant_values=-1), np.pad(p, width)
                mean += np.bincount(i[i >= 0], p[i >= 0], V)
                plogp += (p * np.log(np.maximum(p, 1e-30))).sum(dtype=np.float64)
                valid += (i >= 0).any(1).sum()
                bar.update(len(block))
        if not valid:
            raise Error("--corpus: expected words to learn from, but no text has a single target token: "
                        "is it text, in a language that the tokenizer knows?")
        mean /= valid
        # mean_b KL(q_b || m) = mean_b sum q_b log q_b - sum m log m
        np.save(folder / "constant.npy", plogp / valid - (mean * np.log(np.maximum(mean, 1e-30))).sum())

    folder = cached("targets", name, write)
    return *(np.load(folder / f"{x}.npy", mmap_mode="r") for x in ("indices", "probs")), float(
        np.load(folder / "constant.npy"))


def unspaced(letter):
    """Is it of a script that puts no spaces between words, so that each token may be one?"""
    return unicodedata.name(letter, "").startswith(
        ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"))


@functools.lru_cache(2)
def order_of_texts(seed, epoch, N):
    import numpy as np
    return np.random.default_rng((seed, epoch)).permutation(N)


RUN = 16                                                           # batches that share texts of like length


def batch_of(step, seed, lengths, B, pooled=RUN):
    """-> (B,) the texts of a step: a function of (seed, step) alone, so a resumed run keeps the order.

    An epoch is a permutation; within each run of 16 batches texts of like length go together, to pad less."""
    import numpy as np
    per = len(lengths) // B                                            # batches an epoch; the odd texts wait
    epoch, i = divmod(step, per)
    first = i // pooled * pooled
    n = min(pooled, per - first)                                       # batches in this run
    texts = order_of_texts(seed, epoch, len(lengths))[first * B:(first + n) * B]
    texts = texts[np.argsort(lengths[texts], kind="stable")].reshape(n, B)
    return texts[np.random.default_rng((seed, epoch, first)).permutation(n)[i - first]]


def blocks(items, n):
    """Lists of n items, the last one shorter."""
    block = []
    for item in items:
        block.append(item)
        if len(block) == n:
            yield block
            block = []
    if block:
        yield block


def write_whole(path, text):
    """Write a text file beside its place, then rename it: the old one or the new, never a half."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)


def key(*parts):
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def code(file):
    """A hash of a source file: who edits how targets are made does not get those of before."""
    return key(Path(file).read_text("utf-8"))


def place(kind, name):
    return Path(os.environ.get("T2T_CACHE", Path.home() / ".cache" / "text2token")) / f"{kind}-{name}"


def cached(kind, name, write):
    """The folder that write(folder) fills, made once, beside its place, then renamed: never half-written."""
    folder = place(kind, name or os.getpid())
    if name is None:                                 # an experiment's own, not to be found again
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            write(beside)
            if not folder.exists():                  # another run may have been faster
                beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder
