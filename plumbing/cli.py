"""The command line of t2t.py, made from its Config; checks of the values; how a user's mistake ends."""
import argparse
import dataclasses
import math
import os
import re
import shlex
import shutil
import signal
import sys
import typing

from plumbing.cache import KEEP_DAYS, cache_root


def of_torchrun(name, default):
    """What torchrun tells its processes. A cluster may set the same names for purposes of its own."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


RANK, WORLD = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
LOCAL_WORLD = of_torchrun("LOCAL_WORLD_SIZE", 1)


class Error(ValueError):
    """Bad input: one line for a person, saying what was expected, what came and what to do."""


def why(error):
    """What a library's error says, in one line"""
    return " ".join(str(error).split())[:200] or type(error).__name__


def flag(name):
    return "--" + name.replace("_", "-")


def print_anything():
    """A console that is not UTF-8 shows ? for what it does not know: a run must not end by what it prints.
    Of several processes, the first prints."""
    sys.stdout = open(os.devnull, "w") if RANK or not sys.stdout else sys.stdout      # it may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def parse(Config, doc):
    """The command line -> Config, a dataclass of settings."""
    print_anything()
    signal.signal(signal.SIGINT, signal.SIG_DFL)                       # Ctrl-C amid imports: no traceback
    kept = (f"The cache is the folder T2T_CACHE, or ~/.cache/text2token. Entries not used for {KEEP_DAYS} "
            "days are removed.")
    parser = argparse.ArgumentParser(prog="t2t.py", description=(doc or "").split("\n")[0], epilog=kept,
                                     allow_abbrev=False)
    parser.error = end                                                 # argparse would add its usage
    for f in dataclasses.fields(Config):
        default = "" if f.default is None or f.type is bool else f" (default: {f.default!r})"
        kind = (typing.get_args(f.type) or (f.type,))[0]               # of `float | None`, float
        value = {"type": kind, "default": f.default, "choices": f.metadata["choices"]}
        value = {"action": "store_true"} if f.type is bool else value
        parser.add_argument(flag(f.name), help=f.metadata["doc"] + default, **value)
    try:
        config = checked(Config(**vars(parser.parse_args())))
        size = os.environ.get("WORLD_SIZE", "")
        if WORLD == 1 and size not in ("", "1"):                       # all would write to one folder
            raise Error(f"WORLD_SIZE: expected torchrun to start several processes, got {size} without it: "
                        "torchrun --nproc-per-node=N t2t.py ..., or unset WORLD_SIZE")
        return config
    except Error as e:
        end(e)


def checked(config):
    """config, or Error on a value that no run could use, or on a setting that the method ignores."""
    for f in dataclasses.fields(config):
        value, name, least = getattr(config, f.name), flag(f.name), f.metadata["least"]
        choices, methods = f.metadata["choices"], f.metadata["methods"]
        if value is None or value == f.default:
            continue
        if value == "":
            raise Error(f"{name}: expected a value, got an empty one: is a variable not set?")
        if choices and value not in choices:
            raise Error(f"{name}: expected one of {', '.join(choices)}, got {value}")
        if least is not None and not least <= value < math.inf:
            finite = "" if math.isfinite(value) else "a finite number, "
            raise Error(f"{name}: expected {finite}{least:g} or more, got {value}")
        if isinstance(value, int) and value > 10**12:                  # a seed times 10^6 stays in 64 bits
            raise Error(f"{name}: expected at most 10^12, got {value}")
        if config.method not in methods:
            raise Error(f"{name}: expected a method that uses it ({', '.join(methods)}), "
                        f"got --method {config.method}: leave {name} out")
    if config.method == "both" and config.top_k < 2:
        raise Error(f"--top-k: expected 2 or more for both kinds of target, got {config.top_k}")
    if config.method == "mntp" and config.max_length < 2:
        raise Error(f"--max-length: expected 2 or more for mntp, got {config.max_length}")
    if config.temperature > 1e6:                                      # more overflows float32
        raise Error(f"--temperature: expected at most 1e6, got {config.temperature:g}")
    try:
        config.prompt.encode()
    except UnicodeEncodeError:                                        # as a locale that is not UTF-8 gives it
        raise Error(f"--prompt: expected text in UTF-8, got {config.prompt!r}: set PYTHONUTF8=1") from None
    if config.prompt.count("{}") != 1:
        raise Error(f"--prompt: expected {{}} once, where the text stands, got {config.prompt!r}: pass "
                    "--prompt {} for no question")
    if config.method == "simcse" and config.batch_size < 2:
        raise Error(f"--batch-size: expected 2 or more, texts to tell apart, got {config.batch_size}")
    if config.resume and config.overwrite:
        raise Error("--resume: expected either --resume (go on) or --overwrite (start again), got both")
    return config


def command_line(config):
    """The command that makes this config."""
    given = [flag(f.name) + f"={value}" * (value is not True) for f in dataclasses.fields(config)
             if (value := getattr(config, f.name)) != f.default and f.name not in ("resume", "overwrite")]
    return shlex.join(["python", "t2t.py", *given])


def run_command(train, config):
    """train(config), with every mistake of a user as one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(config)
    except Error as e:
        end(e)
    except KeyboardInterrupt as e:
        end("" if RANK else str(e) or f"interrupted; if {config.out}/state/last.pt exists, --resume goes on "
            "from there", 130)
    except BrokenPipeError:                                            # as by | head: the reader has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as e:
        where = e.filename or " and ".join(f"{folder} ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free)"
                                           for folder in (config.out, cache_root()) if os.path.exists(folder))
        end(f"expected to read and write files, but {where}: {e.strerror or e}")
    except Exception as e:
        if not out_of_memory(e):
            raise
        end(f"out of memory: {less_memory(config)}")


def out_of_memory(e):
    """Is it an error of too little memory? On a CPU, torch has no type for it."""
    return isinstance(e, MemoryError) or bool(re.search("(out of|enough|allocate) memory", str(e)))


def less_memory(config):
    """Which flag a run with too little memory should change"""
    less = (f"lower --micro-batch (now {config.micro_batch})" if config.micro_batch > 1 else
            f"lower --max-length (now {config.max_length})")
    return less + ", or pass --grad-checkpointing" * (not config.grad_checkpointing)


def end(message, status=2):
    """How a user's mistake ends: one line, no traceback."""
    who = f"process {RANK}: " if RANK else ""                          # of torchrun
    if message:
        print(f"t2t.py: {who}{'error: ' if status == 2 else ''}{message}", file=sys.stderr)
    sys.exit(status)
