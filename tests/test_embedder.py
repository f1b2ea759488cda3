"""Ten families of backbones: the head is their own, attention is as asked, padding never moves a vector."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, family, sentences
from torch.testing import assert_close

import t2t
from plumbing.backbones import check_attention, check_head
from plumbing.cli import Error
from plumbing.corpus import tokenizer_hash
from t2t import Embedder, head, hidden_states, load_backbone, pad, pool

IDS = torch.tensor([[1, 17, 30, 44, 9, 12], [1, 23, 8, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("name", FAMILIES)
def test_head_is_the_models_own(name):
    model = family(name)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=MASK).logits
        assert_close(head(model)(hidden_states(model, IDS, MASK)), want)


def test_families_cover_the_head():
    assert head(family("phi")).bias is not None and head(family("gemma2")).softcap == 3
    assert head(family("cohere")).logit_scale == 0.25 == head(family("granite")).logit_scale


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_attention_is_proved_or_refused(name, attention, tmp_path, tok):
    folder = tmp_path / name
    family(name, V=520).save_pretrained(folder)
    tok.save_pretrained(folder)
    try:
        model, _ = load_backbone(str(folder), attention)
    except Error as e:                          # an architecture may not honour the switch: then it says so
        assert attention == "bidirectional" and "does not honour is_causal = False" in str(e)
        assert name in ("gpt_neox", "phi", "cohere", "granite"), f"{name} is documented to work"
        return
    with torch.no_grad():                         # an independent look: gradient of state 0 by input 5
        x = model.get_input_embeddings()(IDS[:1]).requires_grad_()
        with torch.enable_grad():
            y = model.base_model(inputs_embeds=x, attention_mask=MASK[:1], use_cache=False).last_hidden_state
            g = torch.autograd.grad(y[0, 0, 0], x)[0][0, 5].abs().max().item()
    assert (g > 0) == (attention == "bidirectional")


def test_a_model_that_ignores_the_switch_is_refused():
    model = family("llama")                                   # causal, whatever is asked of it
    check_attention(model, "causal")
    with pytest.raises(Error, match="pass --attention causal"):
        check_attention(model, "bidirectional")


def test_a_head_of_its_own_kind_is_refused():
    """Logits times a constant that is not the one our Head knows of (as HyperCLOVAX multiplies by it)."""
    for name in FAMILIES:
        check_head(model := family(name), head(model))
    model = family("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, z: 2 * z)
    with pytest.raises(Error, match="expected logits that are a linear map"):
        check_head(model, head(model))


def test_a_call_does_not_change_the_tokenizer(backbone):
    """Truncation, which a tokenizer keeps from its last call, is no part of it: the corpus is found again."""
    _, tok = load_backbone(str(backbone), "causal")
    before = tokenizer_hash(tok)
    tok(["a text"], truncation=True, max_length=3)
    assert tokenizer_hash(tok) == before


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("how", ["mean", "last"])
def test_padding_never_moves_a_vector(name, how, tmp_path, tok):
    family(name, V=520).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path), "bidirectional")
    with torch.no_grad():
        alone = pool(hidden_states(model, IDS[1:, :3], MASK[1:, :3]), MASK[1:, :3], how)
        right = pool(hidden_states(model, IDS, MASK), MASK, how)[1:]
        left = pool(hidden_states(model, IDS.roll(3, 1), MASK.roll(3, 1)), MASK.roll(3, 1), how)[1:]
    assert_close(right, alone, rtol=1e-5, atol=1e-6)
    assert_close(left, alone, rtol=1e-5, atol=1e-6)


def test_pool_by_hand():
    x = torch.tensor([[[1.0], [2.0], [6.0]], [[3.0], [5.0], [99.0]]])
    right, left = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert_close(pool(x, right, "mean"), torch.tensor([[3.0], [4.0]]))
    assert_close(pool(x, right, "last"), torch.tensor([[6.0], [5.0]]))
    assert_close(pool(x, left, "mean"), torch.tensor([[3.0], [52.0]]))
    assert_close(pool(x, left, "last"), torch.tensor([[6.0], [99.0]]))


def test_batch_size_and_order_never_move_a_vector(backbone):
    e = Embedder.load(backbone)
    texts = sentences(30) + ["", "dog", " ".join(sentences(60))]
    a = e.encode(texts)
    assert a.shape == (33, 32) and a.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-6)         # "" has its <s>
    for size in (1, 7, 64):
        np.testing.assert_allclose(e.encode(texts[::-1], size)[::-1], a, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="expected a list"):
        e.encode("one text")
    assert e.encode([]).shape == (0, 32)


def test_a_megabyte_is_truncated(backbone):
    e = Embedder.load(backbone)
    long = "dog cat horse " * 75_000
    np.testing.assert_allclose(e.encode([long]), e.encode([long[:3000]]), rtol=1e-5, atol=1e-6)


def test_tokens_are_probabilities_of_words(backbone):
    e = Embedder.load(backbone)
    [row] = e.top_tokens(["A dog sees the cat."], k=500)
    weights = [w for _, w in row]
    assert weights == sorted(weights, reverse=True) and abs(sum(weights) - 1) < 1e-4
    h = e.pooled(e.token_ids(["A dog sees the cat."]))
    p = torch.softmax(head(e.model)(h), 1)[0].detach()
    text = lambda i: e.tok.convert_tokens_to_string(e.tok.convert_ids_to_tokens([i]))
    ids = [i for i in range(500) if text(i).strip().lower() == "dog"]
    assert_close(dict(row)["dog"], p[ids].sum().item(), rtol=1e-4, atol=1e-7)


def test_pad_by_hand():
    ids, mask = pad([[5, 6, 7], np.array([8], np.uint32)], 2)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# ---------------------------------------------------------------------------------------------- bad backbones
def test_bad_backbones(backbone, tmp_path, tok):
    def broken(name, change):
        folder = shutil.copytree(backbone, tmp_path / name)
        change(folder)
        with pytest.raises(Error) as e:
            load_backbone(str(folder), "bidirectional")
        assert "\n" not in str(e.value) and "expected" in str(e.value)
        return str(e.value)

    assert "can not be read" in broken("no weights", lambda f: (f / "model.safetensors").unlink())
    truncate = lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000])
    assert "can not be read" in broken("truncated", truncate)

    def drop(f):
        from safetensors.torch import load_file, save_file
        w = {k: v for k, v in load_file(f / "model.safetensors").items() if "layers.1.mlp" not in k}
        save_file(w, f / "model.safetensors", {"format": "pt"})
    assert "lacks model.layers.1.mlp" in broken("half the weights", drop)

    def more_tokens(f):
        t = json.loads((f / "tokenizer.json").read_text())
        t["added_tokens"].append({"id": 500, "content": "<new>", "single_word": False, "lstrip": False,
                                  "rstrip": False, "normalized": False, "special": True})
        (f / "tokenizer.json").write_text(json.dumps(t))
    assert "its ids need 501 rows and the embedding has 500" in broken("tokenizer", more_tokens)
    with pytest.raises(Error, match="no such folder; a hub id needs a network"):
        load_backbone("nobody/nothing", "causal")


def test_adapters_are_refused(backbone, tmp_path):
    """transformers would add the adapter to the model in the same folder and freeze all weights."""
    import peft
    model, _ = load_backbone(str(backbone), "causal")
    whole = shutil.copytree(backbone, tmp_path / "whole")
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    for folder in (whole, tmp_path / "alone"):
        adapter.save_pretrained(folder)
        with pytest.raises(Error, match="--init: expected a whole model, .* holds an adapter: merge it"):
            load_backbone(str(folder), "causal", option="--init")


def save(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def test_what_an_architecture_cannot_do_is_one_line(tmp_path, tok, capsys):
    """llama4_text gives no states without its head, mpt fails without a causal mask, mamba takes no adapters
    on all its maps, and of lfm2 only the attention looks both ways."""
    import transformers as tf
    small = dict(vocab_size=520, hidden_size=32, num_hidden_layers=2)
    heads = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    llama4 = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**small, **heads, intermediate_size_mlp=64, head_dim=8,
                                                      num_local_experts=2))
    with pytest.raises(Error, match="states can be had without its head, got llama4_text"):
        load_backbone(save(llama4, tok, tmp_path / "llama4"), "causal")
    mpt = save(tf.MptForCausalLM(tf.MptConfig(vocab_size=520, d_model=32, n_heads=4, n_layers=2)), tok,
               tmp_path / "mpt")
    load_backbone(mpt, "causal")
    with pytest.raises(Error, match="pass --attention causal"):
        load_backbone(mpt, "bidirectional")
    mamba = tf.MambaForCausalLM(tf.MambaConfig(**small, state_size=4))
    with pytest.raises(Error, match="got mamba .*: pass --lora-rank 0"):
        t2t.make_trainable(mamba, 2, 0)
    lfm2 = tf.Lfm2ForCausalLM(tf.Lfm2Config(**small, **heads, layer_types=["conv", "full_attention"]))
    for _ in range(2):
        load_backbone(save(lfm2, tok, tmp_path / "lfm2"), "bidirectional")
    assert capsys.readouterr().out.count("lfm2: 1 of 2 layers look both ways; the others (conv)") == 1


def test_a_model_of_few_positions(tmp_path, tok):
    """What does not fit is cut."""
    import transformers as tf
    torch.manual_seed(0)
    tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=520, n_embd=32, n_layer=2, n_head=4, n_positions=64)
                       ).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    e = Embedder.load(tmp_path)
    assert e.max_length == 64 and np.isfinite(e.encode([" ".join(sentences(9))])).all()


def test_encoders_are_refused(tmp_path, tok):
    import transformers as tf
    bert = tf.BertForMaskedLM(tf.BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=32))
    bert.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    config = dict(backbone=str(tmp_path), method="none", out=str(tmp_path / "out"))
    for attention in ("causal", "bidirectional"):
        with pytest.raises(Error, match="--backbone: expected"):
            t2t.train(t2t.Config(**config, attention=attention))
