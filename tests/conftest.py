"""What the tests share: a small corpus, a tokenizer trained on it, small random models of many families.

Everything runs offline, on a CPU, in minutes:  python -m pytest -q
With --slow also what takes minutes or gigabytes; what needs a GPU runs where there is one.
"""
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import build_ext  # noqa: E402
import t2t  # noqa: E402
from plumbing.cache import cache_path, cache_root  # noqa: E402
from plumbing.cli import Error  # noqa: E402

try:                                                          # once, into the user's own cache
    build_ext.load(build=True)
    NO_EXT, MADE = "", [cache_path("csrc", build_ext.folder_name()).resolve()]
except Error as e:
    NO_EXT, MADE = f"the extension is not built: {e}", []
MADE += [f.resolve() for f in cache_root().glob("gguf-" + "[0-9a-f]" * 20)]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    skip = {"ext": NO_EXT, "slow": "" if config.getoption("--slow") else "slow: pass --slow",
            "gpu": "" if torch.cuda.is_available() else "no GPU"}
    for item in items:
        for marker, reason in skip.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["torch", pytest.param("ext", marks=pytest.mark.ext)])
def impl(request):
    return request.param


@pytest.fixture
def ext():
    """The compiled module, back on its best instruction set and thread count afterwards."""
    module = build_ext.load(build=False)
    before, threads = module.isa(), torch.get_num_threads()
    yield module
    module.use_isa(before)
    torch.set_num_threads(threads)


# forked from one that has imported all: a second each
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["t2t", "test_train"])

ANIMALS = "dog cat horse bird fish wolf sheep goat mouse lion".split()
ACTIONS = "eats sees follows hears finds carries watches meets".split()
PLACES = "river garden forest mountain kitchen harbour village desert".split()


def sentences(n, seed=0):
    """n distinct sentences of 6 to 20 words."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < n:
        a, b = rng.choice(ANIMALS, 2, replace=False)
        text = f"The {a} {rng.choice(ACTIONS)} the {b} in the {rng.choice(PLACES)}"
        if rng.random() < 0.5:
            text += (f", and then the {rng.choice(ANIMALS)} {rng.choice(ACTIONS)} it "
                     f"near the {rng.choice(PLACES)}")
        out.append(f"{text} number {len(out)}.")
    return out


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(sentences(400), trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                     special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def backbone(tok, tmp_path_factory):
    """A folder with a Llama of width 32 whose embedding is tied to its head, pretrained for two seconds."""
    folder = tmp_path_factory.mktemp("backbone")
    model = family("llama", len(tok), tie_word_embeddings=True)
    ids = tok(sentences(400), padding=True, return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == tok.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(step))[:32]
        model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(sentences(400)) + "\n")
    return path


@pytest.fixture(scope="session")
def learned(backbone, texts_file, tmp_path_factory):
    """A checkpoint that has learned: the mean of its states, since so small a model answers no question."""
    from test_train import config
    out = tmp_path_factory.mktemp("learned") / "ckpt"
    return Path(t2t.train(config(backbone, texts_file, out, steps=1000, lr=2e-2, prompt="{}",
                                 pooling="mean", attention="bidirectional")))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests' own, but for what takes long to make: the extension, SmolLM2 read from its package."""
    cache = tmp_path_factory.mktemp("cache")
    for entry in MADE:
        (cache / entry.name).symlink_to(entry)                # also for the processes that tests start
    os.environ["T2T_CACHE"] = str(cache)


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "phi", "cohere", "granite"]


def family(name, V=300, **settings):
    """A random two-layer model of width 32 of one family, head scales and soft caps included."""
    import transformers as tf
    kind, own = {
        "llama": ("Llama", {}), "qwen2": ("Qwen2", {}), "mistral": ("Mistral", {}),
        "qwen3": ("Qwen3", {"head_dim": 8}), "gemma3": ("Gemma3Text", {"head_dim": 8}),
        "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        "gpt_neox": ("GPTNeoX", {}), "phi": ("Phi", {}), "cohere": ("Cohere", {"logit_scale": 0.25}),
        "granite": ("Granite", {"logits_scaling": 4.0})}[name]
    for key in ("num_key_value_heads",) if name not in ("gpt_neox", "phi") else ():
        own[key] = 2
    config = getattr(tf, kind + "Config")(**{**dict(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256), **own, **settings})
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float()
    out = model.get_output_embeddings()
    if getattr(out, "bias", None) is not None:
        torch.nn.init.normal_(out.bias)                       # a bias of zeros would test nothing
    return model.eval()
