"""The memory of a step, measured before a run; --grad-checkpointing."""
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, family
from test_train import config, weights
from torch.testing import assert_close

import t2t
from plumbing import memory
from plumbing.cli import Error


def step(model, n=2, T=40):
    def forward(ids, mask):
        x = t2t.hidden_states(model, ids, mask)
        return x, t2t.pool(x, mask, "mean")
    ids = torch.arange(n * T).view(n, T) % 290
    _, h = forward(ids, torch.ones_like(ids))
    t2t.head(model)(h).float().logsumexp(-1).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_peak_by_hand():
    with memory.Peak(torch.nn.Linear(1, 1)) as seen:
        a = torch.ones(1000)                              # 4,000 bytes
        b = a.view(10, 100).T                             # no memory of its own
        a = a + 1                                         # the first is still held by b
        del a, b
        c = torch.ones(1500) * 1                          # 6,000 twice, the first freed at once
    assert seen.most == 12_000 and seen.now == 6_000 and len(c) == 1500


def test_peak_is_that_of_torchs_profiler():
    from torch.profiler import ProfilerActivity, profile
    model = family("llama", num_hidden_layers=4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(model)
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    model.zero_grad()
    with memory.Peak(model) as seen:
        step(model)
    assert_close(float(seen.most), float(most), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_computed_again_give_the_same_gradient_in_less_memory(name):
    model = family(name, num_hidden_layers=8)
    with memory.Peak(model) as kept:
        gradient = [g.clone() for g in step(model)]
    model.zero_grad()
    memory.recompute_layers(model)
    with memory.Peak(model) as again:
        for g, same in zip(step(model), gradient, strict=True):
            assert torch.equal(g, same)
    held = sum(g.nbytes for g in gradient)
    assert again.most - held < 0.6 * (kept.most - held)


@pytest.mark.parametrize("method", ["data", "simcse", "mntp"])
def test_a_run_with_grad_checkpointing_is_the_same_run(backbone, texts_file, tmp_path, method, capsys):
    for name, again in (("kept", False), ("again", True)):
        t2t.train(config(backbone, texts_file, tmp_path / name, method=method, grad_checkpointing=again))
        assert "memory: a step takes about 0.0" in capsys.readouterr().out
    kept, again = weights(tmp_path / "kept"), weights(tmp_path / "again")
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


def test_what_a_step_takes(backbone, monkeypatch):
    """It grows with each text by the same, is what a larger step really has at its peak, and the line names
    the flag to lower."""
    model, _ = t2t.load_backbone(str(backbone), "bidirectional")

    def forward(ids, mask):
        x = t2t.hidden_states(model, ids, mask)
        return x, t2t.pool(x, mask, "mean")
    asked, optimizer = [], torch.optim.AdamW(model.parameters())
    ask = lambda config: memory.of_step(forward, t2t.head(model), model, optimizer=optimizer, T=40,
                                        at_once=config.micro_batch, config=config)
    monkeypatch.setattr(memory, "compared", lambda need, there, config: asked.append(need))
    for n in (2, 4, 8):
        ask(t2t.Config(micro_batch=n, max_length=40, device="cpu"))
    assert asked[2] - asked[1] == 2 * (asked[1] - asked[0]) > 0
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)                      # gradients, two moments: 12 bytes a weight
    with memory.Peak(model) as seen:
        step(model, 8)
    P = sum(p.numel() for p in model.parameters())
    assert_close(float(asked[2]), float(seen.most + 12 * P), rtol=0.02, atol=0)
    twice = t2t.Config(method="simcse", micro_batch=8, batch_size=4, max_length=40, device="cpu")
    ask(twice)                                            # both readings of its 4 texts are held at once
    assert asked[3] == asked[2]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()                                      # a resumed run has the moments in memory already
    ask(twice)
    assert_close(float(asked[3] - asked[4]), 8.0 * P, rtol=0.01, atol=0)


def test_the_line_names_the_flag_to_lower():
    plain = t2t.Config(micro_batch=8)
    assert memory.compared(2e9, 3e9, plain) == "memory: a step takes about 2 GB more, 3 GB are free"
    line = memory.compared(4e9, 3e9, plain)
    assert line.endswith("are free: lower --micro-batch (now 8), or pass --grad-checkpointing")
    line = memory.compared(4e9, 3e9, t2t.Config(micro_batch=1, grad_checkpointing=True))
    assert line.endswith("are free: lower --max-length (now 64)")


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "Path", lambda _: limit)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e12))
    held = memory.psutil.Process().memory_info().rss
    for text, expected in (("max", 8e12), (str(held + 10**12), 1e12)):
        limit.write_text(text + "\n")
        assert_close(float(memory.free("cpu")), float(expected), rtol=1e-3, atol=0)
    monkeypatch.setattr(memory, "LOCAL_WORLD", 4)         # of torchrun: they share the memory
    assert_close(float(memory.free("cpu")), 0.25e12, rtol=1e-3, atol=0)


def test_a_model_without_such_layers_is_refused_in_a_line():
    with pytest.raises(Error, match="--grad-checkpointing: expected a model whose layers .* got plain"):
        model = torch.nn.Linear(2, 2)
        model.config = SimpleNamespace(model_type="plain")
        memory.recompute_layers(model)
