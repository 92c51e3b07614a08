"""What a GPU does otherwise, as far as a CPU can tell: the variable-length kernel, captured steps, tests/gpu.py."""
import gc
import json
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=None)


def kernel(query, key, value, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn as it is documented, in plain PyTorch."""
    assert enable_gqa and starts_q.dtype == starts_k.dtype == torch.int32
    parts = []
    for (a, b), (c, d) in zip(zip(starts_q, starts_q[1:]), zip(starts_k, starts_k[1:])):
        assert b - a <= longest_q and d - c <= longest_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if window_size[0] >= 0:
            mask = mask.triu(d - c - (b - a) - window_size[0])
        some = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        parts.append(scaled_dot_product_attention(*some, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("segments", [((5, 0), (3, 0), (4, 0), (2, 3), (1, 3), (6, 3)), ((7, 0),), ((4, 0), (3, 1))])
def test_kernel(monkeypatch, segments, window):
    """One call over gathered keys is what attention per segment is, its gradients too."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    tokens = sum(length for length, _ in segments)
    inputs = [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]
    weights = torch.randn(1, tokens, 6, 8, dtype=torch.float64)
    ours = evaluate.varlen_attention(*inputs, segments, 0.3, window)
    expected, _ = evaluate.packed_attention(None, *inputs, None, segments, 0.3, window)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (ours, expected))):
        torch.testing.assert_close(a, b)


class Graph:
    """A CUDA graph on a CPU: the operations of a step, run again on the same memory."""

    def __init__(self):
        self.operations, self.replays = [], 0

    def pool(self):
        return 0, 1

    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.operations:
            for old, new in zip(outputs, tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph, pool=None, capture_error_mode=None):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "it reads the host"
        out = function(*args, **kwargs or {})
        self.graph.operations.append((function, args, kwargs or {}, tensors(out)))
        return out


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    return transformers.Phi3Config(**SHAPE, rope_parameters=rope, original_max_position_embeddings=8, sliding_window=9)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("config", [transformers.LlamaConfig(**SHAPE), longrope(),
                                    transformers.MistralConfig(**SHAPE, sliding_window=7)], ids=lambda c: c.model_type)
def test_captured_steps(monkeypatch, config, captured):
    """Steps of few shapes sample what eager ones do: as they are, and replayed, in later calls and after the weights
    have changed in place."""
    graphs = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    keep = evaluate.keep

    def keep_on_gpu(*args):
        cache = keep(*args)
        cache.graphs = cache.graphs or {}
        return cache

    if captured:
        monkeypatch.setattr(evaluate, "keep", keep_on_gpu)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed").double().eval()
    prompts = [random.Random(n).choices(range(97), k=n) for n in (9, 14, 10, 12)]
    for call, temperature in enumerate((1.0, 0.0, 1.0, 1.0)):
        for parameter in model.parameters():
            parameter.data.mul_(1 + 0.1 * (call == 3))
        options = {"num_samples": 3, "temperature": temperature, "uniforms": torch.rand(12, 20, dtype=torch.float64),
                   "stop": lambda ids: ids[-1] % 11 == 0, "batch_size": 5}
        ours, eager = (evaluate.generate(model, prompts, 20, **options, capture=c) for c in (True, False))
        assert [ids for ids, _ in ours] == [ids for ids, _ in eager]
        for (_, a), (_, b) in zip(ours, eager):
            assert a == pytest.approx(b, abs=1e-9)
    assert len(graphs) == (len(evaluate.KEPT[model].graphs) if captured else 0) and len(graphs) <= 8
    assert sum(graph.replays for graph in graphs) >= 30 * captured


def test_new_slots():
    """They are made anew where they are too small or a weight has moved, and go with their model."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()

    def kept(rows, length):
        evaluate.generate(model, [[1, 2, 3]], length, num_samples=rows, capture=True)
        return evaluate.KEPT[model]

    first = kept(2, 8)
    assert kept(1, 200) is first and first.size == (2, 256)
    second = kept(3, 8)
    assert second is not first and kept(1, 300) is not second and evaluate.KEPT[model].size[0] == 3
    third = kept(1, 8)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert kept(1, 8) is not third
    before = len(evaluate.KEPT)
    del model
    gc.collect()
    assert len(evaluate.KEPT) == before - 1


def test_script(tmp_path):
    """tests/gpu.py runs, with small shapes on a CPU."""
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests/gpu.py"), "--small", "--out", str(out)],
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 7 and all(row["status"] == "ok" for row in rows)


def test_script_cuts(tmp_path):
    """An item that fails, or takes too long, hides no other."""
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests/gpu.py"), "--small", "--seconds", "0", "--only",
                           "machine", "fsdp", "--out", str(out)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "cut after 1 s" in done.stdout
    assert [json.loads(line)["item"] for line in out.read_text().splitlines()] == ["machine", "fsdp"]
