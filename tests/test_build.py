"""Building csrc/: what a user reads where there is no compiler, or a broken one. Builds nothing itself."""
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import build_ext
from plumbing.cli import Error
from t2t import vocab_kl

ROOT = Path(build_ext.__file__).parent


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    monkeypatch.setenv("T2T_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "t2t_ext", raising=False)


def says(compiler, monkeypatch, capsys):
    """With what line `python build_ext.py` ends."""
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "build_ext.py"), run_name="__main__")
    assert not capsys.readouterr().out
    return end.value.code


def test_without_a_compiler(nothing_built, monkeypatch, capsys):
    line = says("no-such", monkeypatch, capsys)
    assert line.startswith("build_ext.py: error: csrc/: expected a C++ compiler") and "no-such" in line
    assert "\n" not in line


def test_a_compiler_behind_another_program(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    asked = []
    monkeypatch.setattr(build_ext.shutil, "which", lambda tool: asked.append(tool) or tool)
    build_ext.tools()
    assert asked == ["ccache", "ninja"]


@pytest.mark.ext
def test_the_other_program_gets_the_compiler(nothing_built, tmp_path, monkeypatch, capfd):
    """A stand-in for ccache, which writes down what it is asked to run, and fails to compile."""
    other = tmp_path / "ccache"
    other.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
                     'case "$*" in *" -c "*) exit 1;; esac\nexec "$@"\n')
    other.chmod(0o755)
    assert "csrc/: the compiler failed" in says(f"{other} g++", monkeypatch, capfd)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert any(line.startswith("g++ -MMD ") and " -c " in line for line in asked), asked


def test_without_ninja(monkeypatch):
    monkeypatch.setattr(build_ext.shutil, "which", lambda tool: None if tool == "ninja" else tool)
    with pytest.raises(Error, match="pip install ninja.*--impl torch"):
        build_ext.tools()


@pytest.mark.parametrize("known, built", [("75 80 90 100 120", "8.0;9.0;10.0+PTX"),
                                          ("80 86 90", "8.0;9.0+PTX")])
def test_builds_for_what_nvcc_knows(known, built, monkeypatch):
    says = "".join(f"compute_{n}\n" for n in known.split())
    monkeypatch.setattr(build_ext, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(build_ext.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, says))
    assert build_ext.architectures() == built


def test_with_a_compiler_that_fails(nothing_built, tmp_path, monkeypatch, capfd):
    line = says("false", monkeypatch, capfd)
    assert line.startswith("build_ext.py: error: csrc/: ") and "--impl torch" in line
    assert not list((tmp_path / "cache").glob("csrc*"))           # nothing half-built is left to be found


def test_the_library_without_the_extension(nothing_built, monkeypatch):
    """auto takes what is there and builds nothing; ext says what is missing."""
    monkeypatch.setenv("CXX", "no-such")
    x, i, p = torch.zeros(1, 4), torch.tensor([[1]]), torch.ones(1, 1)
    assert build_ext.load(build=False) is None
    assert_close(vocab_kl(x, i, p), torch.tensor(4.0).log())
    with pytest.raises(Error, match=r"expected a C\+\+ compiler"):
        vocab_kl(x, i, p, impl="ext")


def test_training_falls_back_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such")
    monkeypatch.setattr(build_ext, "load", lambda build: build_ext.tools() if build else None)
    assert build_ext.choose("auto", "cpu") == "torch"
    assert "the loss runs in torch; python build_ext.py builds a faster one" in capsys.readouterr().out
    with pytest.raises(Error, match=r"--impl ext: csrc/: expected a C\+\+ compiler"):
        build_ext.choose("ext", "cpu")


@pytest.mark.ext
def test_a_second_call_only_loads():
    done = subprocess.run([sys.executable, "build_ext.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("the extension is ready: ") and not done.stderr


def test_a_library_that_does_not_load_is_done_without(tmp_path, monkeypatch, capsys):
    """A damaged file, or a cache that may not execute: --impl auto trains with torch, ext says why."""
    (tmp_path / "t2t_ext.so").write_bytes(b"not a library")
    monkeypatch.delitem(sys.modules, "t2t_ext", raising=False)
    monkeypatch.setattr(build_ext, "cached", lambda *_: tmp_path)
    monkeypatch.setattr(build_ext, "cache_path", lambda *_: tmp_path)
    assert build_ext.choose("auto", "cpu") == "torch"
    assert "expected a library that loads" in capsys.readouterr().out
    with pytest.raises(Error, match="set T2T_CACHE to another folder"):
        build_ext.choose("ext", "cpu")
