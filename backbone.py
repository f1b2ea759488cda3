"""A backbone: read from disk, proved to have the attention asked for, its head, and what of it learns."""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from corpus import Error


def resolve(name):
    """tiny, the embedded default, is found from any folder."""
    return str(Path(__file__).parent / "tiny") if name == "tiny" and not Path(name).exists() else name


def load_backbone(name, attention, dtype=torch.float32, option="--backbone"):
    """folder or hub id -> (causal language model, tokenizer), proved to have the attention asked for."""
    model, tok = read_model(resolve(name), attention == "causal", dtype, option)
    prove_attention(model.eval(), attention, option)
    prove_head(model, option)
    return model, tok


def read_model(name, causal, dtype, option):
    """folder or hub id -> (causal language model, tokenizer). Error, naming the option, on anything else."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = f"folder {name}" if Path(name).exists() else f"{name} (no such folder; a hub id needs a network)"
    try:
        settings = AutoConfig.from_pretrained(name)
        for part in (settings, settings.get_text_config()):            # of a model that also sees: its own
            part.is_causal = causal                                    # the documented switch; proved below
        model, info = AutoModelForCausalLM.from_pretrained(name, config=settings, dtype=dtype,
                                                           output_loading_info=True)
        tok = AutoTokenizer.from_pretrained(name, padding_side="right")
    except torch.OutOfMemoryError:
        raise
    except Exception as e:                                             # each library has types of its own
        why = " ".join(str(e).split())[:200]
        raise Error(f"{option}: expected a causal language model; {where} can not be read: {why}") from None
    rows, missing = len(model.get_input_embeddings().weight), sorted(info["missing_keys"])
    if missing:
        raise Error(f"{option}: expected a whole causal language model, but {where} lacks {missing[0]} and "
                    f"{len(missing) - 1} other weights: an encoder, or a damaged download?")
    if len(tok) > rows:
        raise Error(f"{option}: expected a tokenizer that fits the model, but in {where} it has {len(tok)} "
                    f"entries and the embedding {rows}")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token or tok.convert_ids_to_tokens(0)      # never attended to: any id will do
    return model, tok


@torch.no_grad()
def prove_attention(model, attention, option="--backbone"):
    """Change the last token: does the first state move? Asked of one text alone, and of one with padding.

    Some architectures take the switch `is_causal = False` and stay causal: poor embeddings, silently."""
    a, b = torch.tensor([[[5, 6, 7, 8]], [[5, 6, 7, 9]]], device=model.device)                     # (1,4)
    for extra in (0, 2):
        mask = F.pad(torch.ones_like(a), (0, extra))
        first = [states(model, F.pad(x, (0, extra)), mask)[0, 0].float() for x in (a, b)]
        sees = not torch.allclose(*first, rtol=1e-4, atol=1e-6)
        if sees and attention == "causal":
            raise Error(f"{option}: expected a decoder, but in {model.config.model_type} the first token "
                        "sees the last one: an encoder, which has no next-token head to train with")
        if not sees and attention == "bidirectional":
            raise Error(f"--attention bidirectional: expected a model that can; {model.config.model_type} "
                        "does not honour is_causal = False: pass --attention causal")


@torch.no_grad()
def prove_head(model, option="--backbone"):
    """Are our logits those of the model? Architectures scale, shift and cap them in ways of their own."""
    ids = torch.tensor([[5, 6, 7, 8]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not own.isfinite().all():
        raise Error(f"{option}: expected finite logits, got NaN or infinity: damaged weights?")
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * own.abs().max()
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance:
        raise Error(f"{option}: expected logits that are a linear map of the last states, scaled and capped "
                    f"as in Llama, Cohere, Granite or Gemma; those of {model.config.model_type} are not")


def states(model, ids, mask):
    """ids (B,T), mask (B,T) -> (B,T,C): what the model hands to its head; after first_last, half that and
    half the embedding."""
    first = weight_of_first(model)
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False,
                           output_hidden_states=first > 0)
    x = out.last_hidden_state
    return (x + first * out.hidden_states[0]) / 2 if first else x


def weight_of_first(model):
    """What first_last has set; 0: states are the last layer alone."""
    return getattr(model.config, "first", 0.0)


@torch.no_grad()
def first_last(model, wanted=True):
    """From now on states(model, ...) are (last + first * embedding) / 2, both halves of one mean length; or,
    if not wanted, the last alone. Kept in config.json, so that a checkpoint knows."""
    if wanted == (weight_of_first(model) > 0):                         # a checkpoint with its own
        return
    model.config.first, model.config.output_hidden_states = 0.0, wanted       # sentence-transformers reads it
    if not wanted:
        return
    V = len(model.get_input_embeddings().weight)
    ids = torch.arange(0, V, max(1, V // 64), device=model.device)[None, :64]
    out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    length = lambda x: x.float().norm(dim=-1).mean().item()
    model.config.first = length(out.last_hidden_state) / length(out.hidden_states[0])


class Head(NamedTuple):
    """z = softcap * tanh(scale * (h W' + b) / softcap), as the model itself applies it."""
    weight: torch.Tensor                    # (V,C)
    bias: torch.Tensor | None               # (V,)
    scale: float = 1.0                      # Cohere, Granite
    softcap: float | None = None            # Gemma 2

    def __call__(self, h):                  # (...,C) -> (...,V)
        return cap(F.linear(h, self.weight, self.bias), self.scale, self.softcap)


def cap(z, scale, softcap):
    z = z * scale if scale != 1 else z
    return softcap * torch.tanh(z / softcap) if softcap else z


def head(model):
    """The Head of a causal language model: of its last states, what model(...).logits holds (prove_head)."""
    c, out = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(c, "logit_scale", None) or 1 / (getattr(c, "logits_scaling", None) or 1)
    softcap = getattr(c, "final_logit_softcapping", None)
    return Head(out.weight, getattr(out, "bias", None), float(scale), softcap)


def make_trainable(model, rank):
    """What learns: all weights between embedding and head (rank 0), or LoRA on every linear map there.

    OURS: the vocabulary stays as pretrained. Words that the texts do not have keep their place among those
    that they have. A trained embedding cost 1.4 points of STS and 4.1 of Banking77 at 7,680 documentation
    texts, and gained 1.7 and cost 1.0 at 32,000 general ones (validation, one seed)."""
    if rank:
        import peft
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = peft.get_peft_model(model, lora)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)
    return model
