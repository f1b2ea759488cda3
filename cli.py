"""The command line of t2t.py, made from its Config; the values that a run could use; how a mistake ends."""
import argparse
import dataclasses
import math
import sys

from corpus import Error

flag = lambda name: "--" + name.replace("_", "-")


def parse(Config, doc, argv):
    """Command line -> Config, a dataclass of settings. Runs before any heavy import: --help and a wrong flag
    answer at once."""
    parser = argparse.ArgumentParser(prog="t2t.py", description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = end                                                 # argparse would add its usage
    for f in dataclasses.fields(Config):
        about = f"{f.metadata['doc']} (default: {f.default!r})"
        value = {"type": f.type, "default": f.default, "choices": f.metadata["choices"]}
        value = {"action": "store_true"} if f.type is bool else value
        parser.add_argument(flag(f.name), help=about, **value)
    return checked(Config(**vars(parser.parse_args(argv))))


def checked(config):
    """config, or Error on a value that no run could use."""
    least = dict(top_k=1, max_length=1, batch_size=1, steps=1, save_every=1, temperature=1e-6, micro_batch=0,
                 lr=0, token_loss=0, scale=1e-6, whitening=0, lora_rank=-1, seed=0, show_targets=0)
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise Error(f"{flag(f.name)}: expected one of {', '.join(choices)}, got {value}")
        if f.name in least and not least[f.name] <= value < math.inf:
            finite = "" if math.isfinite(value) else "a finite number, "
            raise Error(f"{flag(f.name)}: expected {finite}{least[f.name]} or more, got {value}")
    if config.seed > 10**12:                                           # torch takes 64 bits; steps count too
        raise Error(f"--seed: expected at most 10^12, got {config.seed}")
    if config.method == "none" and config.init:
        raise Error(f"--init: expected a method that trains, got --method none: {config.init} is finished")
    if config.method == "both" and config.top_k < 2:
        raise Error(f"--top-k: expected 2 or more for both kinds of target, got {config.top_k}")
    if config.method == "simcse" and config.batch_size < 2:
        raise Error(f"--batch-size: expected 2 or more, texts to tell apart, got {config.batch_size}")
    if config.whitening > 1:
        raise Error(f"--whitening: expected 0 to 1, got {config.whitening}")
    if not 0 <= config.dropout < 1 and config.dropout != -1:
        raise Error(f"--dropout: expected a share from 0 to below 1, got {config.dropout}")
    if config.method in ("none", "simcse", "mntp") and config.show_targets:
        raise Error(f"--show-targets: expected a method that has targets, got {config.method}")
    return config


def end(message, status=2):
    """How a user's mistake ends: one line, no traceback."""
    print(f"t2t.py: {'error: ' if status == 2 else ''}{message}", file=sys.stderr)
    sys.exit(status)
