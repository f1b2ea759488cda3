"""Build csrc/, the compiled vocab_kl:    python build_ext.py

With CUDA where torch has it and nvcc is found (a GPU need not be there: TORCH_CUDA_ARCH_LIST names the
architectures, else those of the GPUs here, else what nvcc knows of 8.0, 9.0 and 10.0), for CPU otherwise. The
result is kept under a hash of the sources, the flags, torch and Python: a second call only loads it.
"""
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension
from torch.utils.cpp_extension import CUDA_HOME

from plumbing.cache import cache_path, cached, hash_of
from plumbing.cli import Error

CSRC = Path(__file__).parent / "csrc"
# -ffp-contract: a * b + c becomes one instruction, which exp in rows.h counts on. Never -march=native: the
# kernel is compiled for several instruction sets, and chosen when it runs. -fopenmp makes at::parallel_for
# parallel; the linker does not get it, so that the threads are those of torch's OpenMP, not of a second one.
CFLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized"]
NVCC = ["-O3", "-std=c++20"]


def tools():
    """Error if what a build needs is not there."""
    here = str(Path(sys.executable).parent)          # ninja of this environment, though it is not activated
    path = os.environ.get("PATH", os.defpath)
    if here not in path.split(os.pathsep):
        os.environ["PATH"] = here + os.pathsep + path
    compiler = (os.environ.get("CXX", "").split() or ["c++"])[0]     # of "ccache g++", what is called
    needed = (compiler, "a C++ compiler, g++ 11 or later"), ("ninja", "the build tool, pip install ninja")
    for tool, what in needed:
        if not shutil.which(tool):
            raise Error(f"csrc/: expected {what}; {tool} is not on PATH: install it, or pass --impl torch")


def with_cuda():
    return bool(torch.version.cuda and CUDA_HOME and (Path(CUDA_HOME) / "bin" / "nvcc").exists())


def architectures():
    """What nvcc knows of 8.0, 9.0 and (from CUDA 12.8 on) 10.0, and PTX of the newest for GPUs after it."""
    nvcc = [str(Path(CUDA_HOME) / "bin" / "nvcc"), "--list-gpu-arch"]
    known = subprocess.run(nvcc, capture_output=True, text=True).stdout.split()
    return ";".join(a for a in ("8.0", "9.0", "10.0") if f"compute_{a.replace('.', '')}" in known) + "+PTX"


@functools.lru_cache(1)
def folder_name():
    """A hash of all that the result depends on. Reads csrc/ once a process."""
    cuda = with_cuda()
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] if cuda else []
    kinds = (".cpp", ".h") + (".cu", ".cuh") * cuda
    files = [f for f in sorted(CSRC.iterdir()) if f.suffix in kinds]
    return hash_of([f.read_text("utf-8") for f in files], CFLAGS, NVCC, torch.__version__, platform.machine(),
                   sys.version, cuda, sorted(gpus),
                   *map(os.environ.get, ("CXX", "CFLAGS", "TORCH_CUDA_ARCH_LIST")))


def not_loaded(folder, e):
    """A cache that may not execute; a damaged file"""
    return Error(f"csrc/: expected a library that loads, in {folder}: {e}; set T2T_CACHE to another folder")


def load(build):
    """The extension; its operations are then torch.ops.t2t. None if it is not built and `build` is False."""
    if "t2t_ext" in sys.modules:
        return sys.modules["t2t_ext"]
    cuda = with_cuda()
    if not cache_path("csrc", folder_name()).exists():
        if not build:
            return None
        tools()

    def write(folder):
        if cuda and not torch.cuda.is_available():             # with no GPU to ask, torch has no default
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        print(f"building csrc/{' with CUDA' * cuda}, once, about a minute ...", file=sys.stderr, flush=True)
        files = [str(CSRC / f) for f in ["bind.cpp", "cpu.cpp"] + ["cuda.cu"] * cuda]
        flags = CFLAGS + ["-DT2T_CUDA"] * cuda + os.environ.get("CFLAGS", "").split()
        cxx = os.environ.get("CXX", "")
        if len(cxx.split()) > 1:                               # torch quotes it, as the name of one program
            script = folder.resolve() / "cxx"
            script.write_text(f'#!/bin/sh\nexec {cxx} "$@"\n')
            script.chmod(0o755)
            os.environ["CXX"] = str(script)
        try:
            sys.modules["t2t_ext"] = cpp_extension.load(
                "t2t_ext", files, flags, NVCC, build_directory=str(folder), with_cuda=cuda)
        except (RuntimeError, subprocess.CalledProcessError) as e:
            raise Error(f"csrc/: the compiler failed (--impl torch does without it); it said:\n{e}") from None
        except (ImportError, OSError) as e:
            raise not_loaded(folder, e) from None
        finally:
            if cxx:
                os.environ["CXX"] = cxx

    folder = cached("csrc", folder_name(), write)
    if "t2t_ext" not in sys.modules:
        spec = importlib.util.spec_from_file_location("t2t_ext", folder / "t2t_ext.so")
        try:
            ext = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(ext)
        except (ImportError, OSError) as e:
            raise not_loaded(folder, e) from None
        sys.modules["t2t_ext"] = ext
    return sys.modules["t2t_ext"]


@torch.compiler.assume_constant_result
def compiled(impl, device="cpu"):
    """Whether the extension serves this call. "ext" builds it if need be, "auto" takes it if it is there."""
    ext = None if impl == "torch" else load(build=impl == "ext")
    here = ext is not None and (device in ("cpu", "meta") or device == "cuda" and ext.cuda)
    if impl == "ext" and not here:
        raise ValueError(f"impl: expected auto or torch on {device}, which this build of the extension does "
                         "not serve, got ext")
    return here


def choose(impl, device):
    """--impl -> "ext" or "torch". auto: ext where it has been built, else torch, which says so."""
    if impl == "torch":
        return impl
    reason = "; python build_ext.py builds a faster one"
    try:
        if compiled(impl, device):
            return "ext"
    except ValueError as e:
        if impl == "ext":
            raise Error(f"--impl ext: {e}") from None
        reason = f": the extension does not load ({e})"
    print(f"the loss runs in torch{reason}", flush=True)
    return "torch"


if __name__ == "__main__":
    try:
        ext = load(build=True)
    except Error as e:
        sys.exit(f"build_ext.py: error: {e}")
    print(f"the extension is ready: {ext.isa()} on CPU, {'with' if ext.cuda else 'without'} CUDA; "
          f"in {cache_path('csrc', folder_name())}")
