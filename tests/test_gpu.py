"""What a GPU does otherwise, as far as a CPU can tell: the variable-length kernel, captured steps, which tensors lie
where and when the host waits, tests/gpu.py."""
import copy
import functools
import gc
import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import transformers
from conftest import READS, ROOT
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluate
import latro

CPU = torch.device("cpu")

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=None)


def kernel(query, key, value, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn as it is documented, in plain PyTorch."""
    assert enable_gqa and starts_q.dtype == starts_k.dtype == torch.int32
    parts = []
    starts_q, starts_k = (getattr(x, "here", x).tolist() for x in (starts_q, starts_k))
    for (a, b), (c, d) in zip(zip(starts_q, starts_q[1:]), zip(starts_k, starts_k[1:])):
        assert b - a <= longest_q and d - c <= longest_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).tril(d - c - (b - a))
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


@pytest.fixture
def graphs(monkeypatch):
    """The CUDA graphs that are made, pretended."""
    made, keep = [], evaluate.keep

    def keep_on_gpu(*args):
        cache = keep(*args)
        cache.graphs = cache.graphs or {}
        return cache

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(evaluate, "keep", keep_on_gpu)
    return made


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    return transformers.Phi3Config(**SHAPE, rope_parameters=rope, original_max_position_embeddings=8, sliding_window=9)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("config", [transformers.LlamaConfig(**SHAPE), longrope(),
                                    transformers.MistralConfig(**SHAPE, sliding_window=7)], ids=lambda c: c.model_type)
def test_captured_steps(request, config, captured):
    """Steps of few shapes sample what eager ones do: as they are, and replayed, in later calls and after the weights
    have changed in place."""
    graphs = request.getfixturevalue("graphs") if captured else []
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


class Far(torch.Tensor):
    """A tensor that says it is on a GPU; its numbers lie in .here, on the CPU."""
    device = torch.device("cuda:0")
    is_cuda = True
    reads = copies = 0  # that the host waited for: tensors read from the GPU, and copied to it
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        far = torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype)
        far.here = here
        return far

    def data_ptr(self):
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inputs = tensors((args, kwargs))
        near = [x for x in inputs if not isinstance(x, Far) and x.dim()]
        assert not near, f"{function}: a tensor on the CPU, beside one on the GPU"
        by_mask = "index" in str(function) and any(x.dtype == torch.bool for x in tensors(args[1:]))
        cls.reads += by_mask or function in READS
        args, kwargs = tree_map(lambda x: getattr(x, "here", x), (args, kwargs or {}))
        known = {id(x.here): x for x in inputs if isinstance(x, Far)}  # of operations in place
        out = function(*args, **kwargs)
        for x in tensors(out):
            known.setdefault(id(x), Far(x))
        return tree_map(lambda x: known.get(id(x), x), out)


class GPU(TorchFunctionMode):
    """Makes on the pretended GPU what is asked for there, copies to it and reads from it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.cpu) and isinstance(args[0], Far):
            Far.reads += 1
            return function(args[0].here)
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(x, torch.device) and x == Far.device for x in leaves)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Far):
            there, args = True, (args[0].here, *args[1:])
        args, kwargs = tree_map(lambda x: CPU if isinstance(x, torch.device) else x, (args, kwargs or {}))
        out = function(*args, **kwargs)
        if isinstance(out, Far) or not there:
            return out
        Far.copies += function in (torch.tensor, torch.Tensor.new_tensor, torch.Tensor.to) and out.numel() > 0
        return Far(out)


def move(*modules):
    """Move modules to the pretended GPU, in place; what they share they go on sharing."""
    @functools.cache
    def far(x):
        return nn.Parameter(Far(x.detach()), x.requires_grad) if isinstance(x, nn.Parameter) else Far(x)

    for part in {part for module in modules for part in module.modules()}:
        for held in (part._parameters, part._buffers):
            held.update({name: far(x) for name, x in held.items() if x is not None})


@pytest.mark.parametrize("size, takes", [(8, True), (12, False), (256, True), (264, False)])
def test_what_the_kernel_takes(monkeypatch, size, takes):
    """Heads of other sizes go by segments."""
    taken = []
    monkeypatch.setattr(evaluate, "varlen_attention", lambda query, *rest: taken.append(query) or query)
    x = torch.randn(1, 2, 7, size, dtype=torch.bfloat16)
    expected, _ = evaluate.packed_attention(None, x, x, x, None, ((5, 0), (2, 0)))
    with GPU():
        ours, _ = evaluate.packed_attention(None, *[Far(x)] * 3, None, ((5, 0), (2, 0)))
    assert bool(taken) == takes and (takes or torch.equal(ours.here, expected))


@contextmanager
def counted(name, calls):
    """Adds to `calls` whenever evaluate's function of that name is called."""
    right = getattr(evaluate, name)
    with mock.patch.object(evaluate, name, lambda *args: calls.append(name) or right(*args)):
        yield


def waits(work):
    """What work() returns on the pretended GPU, and how many tensors were read from it and copied to it."""
    Far.reads = Far.copies = 0
    with GPU():
        return work(), Far.reads, Far.copies


@pytest.mark.parametrize("captured", [False, True])
def test_generate_on_a_gpu(graphs, captured):
    """A step copies one tensor to the GPU and reads one, an admission copies one more."""
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=7)).eval()
    options = {"num_samples": 3, "temperature": 1.0, "uniforms": torch.rand(9, 20, dtype=torch.float64),
               "stop": lambda ids: ids[-1] % 11 == 0, "batch_size": 5}
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    expected = evaluate.generate(model, prompts, 20, **options)
    steps, prefills = [], []
    move(model)
    with counted("replay" if captured else "step", steps), counted("prefill", prefills):
        ours, reads, copies = waits(lambda: evaluate.generate(model, prompts, 20, **options, capture=captured))
    assert [ids for ids, _ in ours] == [ids for ids, _ in expected]
    assert reads == len(steps) >= 20 and copies == len(steps) + len(prefills) and 1 < len(prefills) <= 3
    assert bool(graphs) == captured


@pytest.mark.parametrize("dtype, per_pass", [("float32", 10), ("bfloat16", 12)])
@pytest.mark.parametrize("passes", [1, 4])
def test_update_on_a_gpu(monkeypatch, graphs, tiny, cups, dtype, per_pass, passes):
    """It learns what it learns on a CPU, with no tensor in the wrong place. A pass reads nothing, and copies ids, positions,
    what is scored, temperatures and, for the kernel, where keys lie, to the policy and to the reference, lengths and what is
    finished to the policy alone. All reads but a step's come at the end of the update, once."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    config = latro.Config(rloo_k=4, response_length=12, per_device_train_batch_size=16 // passes, temperature=1.3,
                          gradient_accumulation_steps=passes, dtype=dtype)
    found, steps = [], []
    for device in (CPU, Far.device):
        model = copy.deepcopy(tiny[0])
        model.set_attn_implementation("packed")
        policy, reference, sampler = models = latro.set_out(model, config, CPU)
        if device == Far.device:
            move(*models)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
        with counted("replay", steps), mock.patch.object(torch.cuda, "synchronize") as waited:
            (rollouts, _, row), reads, copies = waits(lambda: latro.update(
                policy, reference, sampler, optimizer, tiny[1], cups[:4], list("abcd"), config, device))
        found.append((rollouts, row, [getattr(x, "here", x).detach() for x in sampler.parameters()]))
        assert waited.call_count == 4 * (device == Far.device)  # before the clock is read
    assert graphs and reads == len(steps) + 4 and copies == len(steps) + 4 + passes * per_pass
    (rollouts, row, weights), (ours, our_row, our_weights) = found
    if dtype == "float32":
        assert [r.ids for r in ours] == [r.ids for r in rollouts]
        torch.testing.assert_close(our_weights, weights, atol=1e-6, rtol=1e-6)
    # in bfloat16 the kernel rounds otherwise, and other tokens may be drawn
    assert our_row["sampling_gap"] < 0.1 and our_row["reward"] == pytest.approx(row["reward"], abs=0.1)
    assert our_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=0.05)


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
