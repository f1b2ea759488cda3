"""Files that are made once and kept: in T2T_CACHE, or in .cache/text2token of the home folder.

Nothing is ever half-written: a file or folder is made beside its place and renamed when it is whole."""
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from safetensors import SafetensorError

KEEP_DAYS = 30                               # entries that no run has used for so long are removed


def hash_of(*parts):
    """A short hash of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def file_hash(path):
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(name, allow=None, ignore=()):
    """The folder of a hub id: its weights as safetensors, or pickled where there are no others."""
    from huggingface_hub import snapshot_download
    others = ["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.gguf", *ignore]
    folder = Path(snapshot_download(name, allow_patterns=allow, ignore_patterns=["*.bin", *others]))
    bare = [f.parent.relative_to(folder) for f in folder.rglob("config.json")
            if not any(f.parent.glob("*.safetensors"))]        # of modules without weights, perhaps
    if bare:
        snapshot_download(name, revision=folder.name, ignore_patterns=others,
                          allow_patterns=[(f / "pytorch_model*.bin").as_posix() for f in bare])
    return folder


def files_below(folder, suffixes):
    """Files of such names, sorted, in a folder and all below it, linked ones too. Names that begin with a dot
    belong to the system: ._notes.txt, .git, .ipynb_checkpoints"""
    def fails(error):
        # if it were skipped, a part of the texts would be missing; only lost+found never holds texts
        if isinstance(error, PermissionError) and Path(error.filename).name != "lost+found":
            raise error
    seen, found = set(), []
    for here, below, names in os.walk(folder, onerror=fails, followlinks=True):
        new = os.path.realpath(here) not in seen                # a link to a folder above would never end
        seen.add(os.path.realpath(here))
        below[:] = sorted(name for name in below if new and name[0] != ".")
        found += [Path(here, name) for name in names if new and name[0] != "."
                  and name.lower().endswith(suffixes)]
    return sorted(found)


def file_stamps(path, suffixes=(".safetensors", ".bin")):
    """Path, size and time of a file, or of such files below a folder; of a hub id, its name. Tells folders
    apart without reading them."""
    files = files_below(path, suffixes) or [Path(path)]
    known = [(f, f.stat()) for f in files if f.is_file()]
    return [str(path)] + [(str(f.absolute()), s.st_size, s.st_mtime_ns) for f, s in known]


def cache_root():
    try:
        return Path(os.environ.get("T2T_CACHE") or Path.home() / ".cache" / "text2token")
    except RuntimeError:                     # a container may have no home folder
        from plumbing.cli import Error       # not above: it imports this file
        raise Error("cache: expected a home folder to keep files in, found none: set T2T_CACHE to a "
                    "folder") from None


def cache_path(kind, name):
    return cache_root() / f"{kind}-{name}"


def cached(kind, name, write, read=lambda folder: folder):
    """read(folder) of the folder that write(folder) fills, made once. What `read` can not read (after a power
    failure, a file may be empty) is made again."""
    folder = made(kind, name, write)
    try:
        return read(folder)
    except (EOFError, ValueError):
        shutil.rmtree(folder)
        return read(made(kind, name, write))


def made(kind, name, write):
    """Make the folder, unless it is there, and return it. Its time is set to that of its last use."""
    folder = cache_path(kind, name)
    if not folder.exists():
        prune()
        beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.new")  # containers share process numbers
        beside.mkdir(parents=True)
        try:
            write(beside)
            beside.rename(folder)
        except OSError:
            if not folder.exists():          # else another run was faster
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    with contextlib.suppress(OSError):       # a cache that may only be read
        os.utime(folder)
    return folder


def prune():
    """Remove entries that no run has used for KEEP_DAYS."""
    old = time.time() - KEEP_DAYS * 86400
    for folder in cache_root().iterdir() if cache_root().is_dir() else ():
        if not re.fullmatch(r"(gguf|tokens|targets|csrc)-[0-9a-f]{20}(\.\w+\.new)?", folder.name):
            continue                         # not ours
        with contextlib.suppress(OSError):   # another run removes it too
            if folder.lstat().st_mtime < old and folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def os_errors():
    """OSError where a disk is full: torch, safetensors and tokenizers have types of their own for it."""
    try:
        yield
    except Exception as e:
        own = isinstance(e, (RuntimeError, SafetensorError)) or type(e) is Exception
        if not own or "memory" in str(e):
            raise
        raise OSError(" ".join(str(e).split())[:100]) from None


def write_whole(path, text):
    """Write a text file beside its place, then rename it: the old one or the new, never a half."""
    beside = path.with_name(path.name + ".partial")
    # names of files come as half characters where the locale is not UTF-8; they are the same bytes again
    beside.write_text(text, "utf-8", "surrogateescape")
    os.replace(beside, path)


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1) + "\n")
